"""Slices by name: how many hosts, and what is on each."""

import pytest

from sparsejax.launch.topology import parse_slice


@pytest.mark.parametrize(
    "name, hosts, chips, devices",
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x4", 1, 8, 8),
        ("v5e:4x4", 4, 4, 4),
        ("v6e:16x16", 64, 4, 4),
        ("v4:2x2x1", 1, 4, 4),
        ("v5p:8x8x8", 128, 4, 4),
        ("v5p:4x12x20", 240, 4, 4),
        ("tpu7x:4x4x8", 32, 4, 8),
        ("h100:2x8", 2, 8, 8),
        ("a100-80gb:16x4", 16, 4, 4),
    ],
)
def test_hosts_and_chips(name, hosts, chips, devices):
    piece = parse_slice(name, gpus=True)
    assert (piece.hosts, piece.chips, piece.devices) == (hosts, chips, devices)
    assert name == f"{piece.name}:{piece.shape}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x2x2"])
def test_libtpu_counts_the_same_devices(name):
    pytest.importorskip("libtpu")
    from sparsejax.base.sharding import MeshConfig
    from sparsejax.plan.topology import described_mesh

    piece = parse_slice(name, gpus=False)
    devices = piece.hosts * piece.devices
    with described_mesh(name, MeshConfig(data=devices)) as mesh:
        assert mesh.size == devices
        assert len({device.process_index for device in mesh.devices.flat}) == piece.hosts
