"""Models whose layers compute on every k-th token, however they are compiled: unrolled, recomputed, on a mesh, with
a cache. Coefficients are not what they are at first."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import cut, on_rows, parted, results

from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.sequence import AveragePooling, SequenceAltUp, StrideAndSkip
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.train.metrics import layer_metrics

from support import assert_close, host_batch, to_numpy

ROWS, LENGTH, VOCAB = 8, 14, 32  # two documents of seven tokens a row
BASE = ModelConfig(
    d_model=16,
    num_heads=2,
    vocab_size=VOCAB,
    pattern=("dense", "short"),
    repeats=2,
    blocks={"dense": DenseSpec(d_ff=16), "short": DenseSpec(d_ff=16)},
    sequence=SequenceAltUp(stride=3, blocks=("short",), documents=2),
)


@pytest.fixture(scope="module")
def scanned():
    params = parted(BASE)
    return params, results(BASE, params, LENGTH)


@pytest.mark.parametrize(
    ("fields", "mesh"),
    [({"scan": False, "remat": "full"}, (1, 1, 1)), ({}, (2, 2, 2))],
    ids=("unrolled and recomputed", "2x2x2"),
)
def test_loss_gradients_and_reports_are_the_same(scanned, fields, mesh):
    params, expected = scanned
    assert_close(results(dataclasses.replace(BASE, **fields), params, LENGTH, mesh), expected, 2e-5)


def test_every_coefficient_learns_and_anchors_are_reported(scanned):
    _, (_, reports, grads) = scanned
    sequences = {position: report.sequence for position, report in reports.items()}
    assert sequences["pattern_0"] is None
    tokens = ROWS * LENGTH - 3
    assert sequences["pattern_1"].tokens.tolist() == [tokens] * 2
    assert sequences["pattern_1"].anchors.tolist() == [ROWS * 6 - 1] * 2
    row = layer_metrics(BASE, reports, "train")
    assert row["sequence/anchor_fraction"] == (ROWS * 6 - 1) / tokens and row["sequence/unplaced_fraction"] == 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "fields",
    [
        {"streams": AltUp(streams=2)},
        pytest.param({"sequence": StrideAndSkip(stride=3, blocks=("short",))}, marks=pytest.mark.slow),
    ],
    ids=("altup in streams", "skip"),
)
def test_decoding_gives_the_logits_of_the_whole_row(fields):
    """A chunk that ends between two anchors, then token by token; the cache has a slot for every third."""
    model, length = dataclasses.replace(BASE, **fields), 8
    arrays = host_batch(2, length, VOCAB, documents=1, padded=0)
    with jax.set_mesh(make_mesh(MeshConfig())):
        forward = on_rows(model, parted(model))
        whole = to_numpy(forward(arrays).logits)
        caches = init_caches(model, 2, length)
        assert caches["pattern_1"].attention.k.shape[:3] == (2, 2, 3)
        assert caches["pattern_0"].attention.k.shape[:3] == (2, 2, 8)
        for start, stop in ((0, 2), *((at, at + 1) for at in range(2, length))):
            out = forward(cut(arrays, start, stop), caches)
            caches = out.caches
            assert_close(to_numpy(out.logits), whole[:, start:stop])


def test_rows_at_different_positions_go_on_together():
    """One row's token is an anchor where the other's is none; a padded prompt leaves the cache as it should be."""
    length, lengths = 8, (3, 5)
    arrays = host_batch(2, length, VOCAB, documents=1, padded=0)
    prompt = cut(arrays, 0, 5)
    prompt["segments"] = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int32)
    with jax.set_mesh(make_mesh(MeshConfig())):
        forward = on_rows(BASE, parted(BASE))
        whole = to_numpy(forward(arrays).logits)
        caches = forward(prompt, init_caches(BASE, 2, length)).caches
        for step in range(3):
            at = np.array(lengths)[:, None] + step
            one = {n: np.take_along_axis(a, at, 1) if a.ndim == 2 else a for n, a in arrays.items()}
            out = forward(one, caches)
            caches = out.caches
            assert_close(to_numpy(out.logits)[:, 0], whole[[0, 1], at[:, 0]])


def test_pooling_cannot_go_on_from_a_cache():
    pooled = dataclasses.replace(BASE, sequence=AveragePooling(blocks=("short",), allow_leak=True))
    with pytest.raises(ConfigError, match="pool averages tokens that are not there yet") as error:
        init_caches(pooled, 1, 8)
    assert error.value.key == "model.sequence.name"
