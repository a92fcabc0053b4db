"""Each finding where it belongs, and not where it does not."""

import dataclasses

import pytest

from sparsejax.base.sharding import MeshConfig, Rules
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.plan.collectives import Collective
from sparsejax.plan.layout import layout
from sparsejax.plan.live import Buffer
from sparsejax.plan.products import Dot
from sparsejax.plan.sentinel import (
    activation_axes,
    dense_fallback,
    gathered_experts,
    idle_mesh_axes,
    idle_rules,
    replicated,
)
from sparsejax.train.config import ExperimentConfig

BLOCKS = {"dense": DenseSpec(d_ff=32), "moe": MoESpec(num_experts=4, d_ff=32)}
CONFIG = ExperimentConfig(
    model=ModelConfig(d_model=16, num_heads=4, vocab_size=64, repeats=1, blocks=BLOCKS),
    data=DataConfig(batch_size=8, sequence_length=8),
)


def on(data, expert, tensor, model=CONFIG.model, **rules):
    mesh = MeshConfig(data=data, expert=expert, tensor=tensor, rules=Rules(**rules))
    return dataclasses.replace(CONFIG, mesh=mesh, model=model)


def test_large_tensors_that_lie_on_several_devices():
    config = on(2, 2, 1)
    (experts,) = {t.bytes_per_device for t in layout(config).tensors if t.name.endswith("experts.w_in")}
    found = {each.what: each for each in replicated(layout(config), memory=100 * 512)}
    dense = found["params.stack.units.blocks.0.feed_forward.mlp.w_in.weight along expert"]
    assert dense.bytes == 16 * 32 * 4 // 2 // 2 and "embed, mlp" in dense.cause
    assert not list(replicated(layout(config), memory=100 * 10**6))
    assert not any("experts.w_in" in what for what in found)
    whole = {each.what for each in replicated(layout(on(2, 2, 1, experts=None, embed=None)), memory=100 * experts)}
    assert any("experts.w_in along data+expert" in what for what in whole)


def test_a_logical_axis_that_splits_nothing():
    assert not list(idle_rules(on(2, 2, 2), layout(on(2, 2, 2))))
    dense = dataclasses.replace(CONFIG.model, pattern=("dense",))
    (idle,) = idle_rules(on(2, 2, 2, dense), layout(on(2, 2, 2, dense)))
    assert idle.kind == "idle logical axis" and "rules.experts=expert" in idle.what and "no layer" in idle.cause
    assert not list(idle_rules(on(2, 1, 2, dense), layout(on(2, 1, 2, dense))))


def test_a_mesh_axis_that_splits_no_activation():
    assert activation_axes(on(2, 2, 2)) == {"data", "expert", "tensor"}
    recomputed = dataclasses.replace(CONFIG.model, remat="full")
    assert activation_axes(on(2, 2, 2, recomputed)) == {"data", "expert", "tensor"}, "as if nothing were recomputed"
    assert not list(idle_mesh_axes((2, 1, 2), {"data", "tensor"}, 1000))
    (idle,) = idle_mesh_axes((2, 4, 1), {"data"}, 1000)
    assert (idle.what, idle.bytes) == ("mesh.expert=4 splits no activation", 750)


def gather(axes, size, scope="jit(step)/while/body/closed_call/feed_forward/shard_map/experts/all_gather"):
    return Collective(kind="all-gather", axes=axes, scope=scope, once=size, times=3, loop_unknown=False)


@pytest.mark.parametrize(
    ("collective", "found"),
    [
        (gather(("expert",), 2**22), True),
        (gather(("data", "expert"), 2**22), True),
        (gather(("tensor",), 2**22), True),
        (gather(("data",), 2**22), False),  # parameters, as FSDP stores them
        (gather(("expert",), 4096), False),  # counts
        (gather(("expert",), 2**22, "jit(step)/feed_forward/exchange/all_gather"), False),  # exchange=all_gather
        (dataclasses.replace(gather(("expert",), 2**22), kind="all-to-all"), False),
    ],
)
def test_gathers_of_experts(collective, found):
    told = list(gathered_experts([collective]))
    assert [each.bytes for each in told] == ([3 * 2**22] if found else [])
    assert all("feed_forward/experts" in each.what for each in told)


def test_a_dense_fallback():
    dot = Dot(name="d", scope="jit(f)/feed_forward/shard_map/experts/dot", once=100, times=8, loop_unknown=False)
    other = dataclasses.replace(dot, scope="jit(f)/attention/dot", once=10**6)
    held = [Buffer(kind="f32[8]", scope=dot.scope, bytes=32), Buffer(kind="f32[99]", scope=other.scope, bytes=396)]
    (found,) = dense_fallback([dot, other], 100, held)
    assert (found.bytes, found.kind) == (32, "dense fallback") and "8.0 ×" in found.what
    assert not list(dense_fallback([dot, other], 790, held))
    assert not list(dense_fallback([other], 0, held)), "a model without experts"
