"""Layers that compute on every k-th token: the paper's equations, document by document, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.ratios import sequence_ratios
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.sequence import AveragePooling, SequenceAltUp, StrideAndSkip
from sparsejax.blocks.soft import SoftSpec
from sparsejax.memory.config import MemorySpec
from sparsejax.model.config import ModelConfig

from reference.sequence import average_pooling, sequence_altup, stride_and_skip
from support import (
    ONE_DEVICE,
    OneLayer,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

WIDTH, LENGTH, ROWS = 8, 13, 2  # documents of 7 and 6 tokens: the second's anchors are no third tokens of the row
ARRAYS = host_batch(ROWS, LENGTH, padded=2)


BACKBONE = OneLayer(d_model=WIDTH, num_heads=2)
X = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def build(settings):
    return lambda key: settings.around(DenseSpec(d_ff=16).build(key, BACKBONE), key, BACKBONE, (0,))


@functools.cache
def compiled(settings):
    """`(variables, x, batch) -> (y, report)` of a layer."""

    def call(params, x, batch):
        with_values = nnx.merge(graph_of(build(settings)), params)
        out = with_values(x, Context(batch=batch, mode="eval"))
        return out.x, out.report.sequence

    return jax.jit(call)


PARAMS = host_params(lambda key: SequenceAltUp().around(DenseSpec(d_ff=16).build(key, BACKBONE), key, BACKBONE, (0,)))


def run(settings, x=X, arrays=ARRAYS, alpha=(1.0, 0.0), beta=1.0):
    """(y, report) of a layer whose block is the same for all settings."""
    params = nnx.to_flat_state(PARAMS)
    if isinstance(settings, SequenceAltUp):
        told = {"prediction": np.float32(alpha), "correction": np.float32(beta)}
        params = [(path, leaf.replace(told[path[-1]]) if path[-1] in told else leaf) for path, leaf in params]
    else:
        params = [(path, leaf) for path, leaf in params if path[0] == "block"]
    with on_mesh(ONE_DEVICE) as mesh:
        placed = put_params(nnx.from_flat_state(params), mesh)
        return to_numpy(compiled(settings)(placed, put_rows(x, mesh), put_batch(arrays, mesh)))


@functools.cache
def plain():
    """The block as the references want it, from the model's own block on single documents."""

    def call(params, x, positions):
        block = nnx.merge(graph_of(build(StrideAndSkip(stride=1))), params)
        zeros = jnp.zeros_like(positions)
        fields = dict.fromkeys(("tokens", "targets", "domains"), zeros) | {"rows": zeros[:, 0], "loss_mask": zeros > 0}
        batch = Batch(segments=zeros + 1, positions=positions, **fields)
        return block.block(x, Context(batch=batch, mode="eval")).x

    traced = jax.jit(call)

    def layer(x, positions):
        with on_mesh(ONE_DEVICE) as mesh:
            params = [(path, leaf) for path, leaf in nnx.to_flat_state(PARAMS) if path[0] == "block"]
            placed = put_params(nnx.from_flat_state(params), mesh)
            rows = put_rows(np.float32(x)[None], mesh), put_rows(np.int32(positions)[None], mesh)
            return to_numpy(traced(placed, *rows))[0]

    return layer


def documents(arrays=ARRAYS):
    """(row, slice) of each document."""
    for row, segments in enumerate(arrays["segments"]):
        for segment in np.unique(segments[segments > 0]):
            where = np.flatnonzero(segments == segment)
            yield row, slice(where[0], where[-1] + 1)


ALPHA, BETA = (0.7, 0.4), 1.3
POOL = AveragePooling(stride=3, allow_leak=True)
TABLE = {"table": MemorySpec(blocks=("dense",))}


def model(sequence, memory=None, soft=False):
    blocks = {"dense": DenseSpec(), "moe": SoftSpec(allow_leak=True) if soft else MoESpec()}
    return ModelConfig(d_model=WIDTH, num_heads=2, sequence=sequence, memory=memory or {}, blocks=blocks)


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (SequenceAltUp(stride=3), lambda x: sequence_altup(x, plain(), ALPHA, BETA, 3)),
        (StrideAndSkip(stride=3), lambda x: stride_and_skip(x, plain(), 3)),
        (POOL, lambda x: average_pooling(x, plain(), 3)),
    ],
    ids=("altup", "skip", "pool"),
)
def test_every_document_as_the_equations_say(settings, reference):
    """Wherever it is packed, and whatever its length; padding passes."""
    y, report = run(settings, alpha=ALPHA, beta=BETA)
    for row, where in documents():
        np.testing.assert_allclose(y[row, where], reference(X[row, where]), rtol=2e-5, atol=2e-6)
    padding = ARRAYS["segments"] == 0
    assert padding.any() and (y[padding] == X[padding]).all()
    assert (report.tokens, report.anchors, report.unplaced) == ((~padding).sum(), 10, 0)


class TestLimits:
    def test_with_every_token_an_anchor_it_is_the_layer(self):
        expected, _ = run(StrideAndSkip(stride=1))
        for settings in (SequenceAltUp(stride=1), AveragePooling(stride=1)):
            y, report = run(settings, alpha=ALPHA)
            assert (y == expected).all() and report.anchors == report.tokens

    def test_anchors_are_exactly_what_the_layer_makes_of_them(self):
        settings = dict(stride=3)
        corrected, skipped = run(SequenceAltUp(**settings), alpha=ALPHA)[0], run(StrideAndSkip(**settings))[0]
        anchors = (ARRAYS["positions"] % 3 == 0) & (ARRAYS["segments"] > 0)
        assert (corrected[anchors] == skipped[anchors]).all() and (skipped[anchors] != X[anchors]).all()

    def test_without_correction_it_is_the_identity(self):
        assert (run(SequenceAltUp(stride=3), beta=0.0)[0] == X).all()

    def test_at_first_a_token_gets_what_the_layer_adds_to_its_anchor(self):
        y, _ = run(SequenceAltUp(stride=3))
        added = (y - X)[:, :6].reshape(ROWS, 2, 3, WIDTH)  # the first document of each row
        np.testing.assert_allclose(added, np.broadcast_to(added[:, :, :1], added.shape), atol=1e-5)
        assert np.abs(added).max() > 0.1


class TestRoom:
    def test_anchors_beyond_it_are_counted_and_their_tokens_stay(self):
        """Thirteen documents of one token have as many anchors; there is room for those of two documents."""
        arrays = host_batch(ROWS, LENGTH, documents=LENGTH, padded=0)
        y, report = run(SequenceAltUp(stride=3, documents=2), arrays=arrays)
        assert (report.slots, report.anchors, report.unplaced) == (2 * 5, 2 * 5, 2 * 8)
        assert (y[:, 5:] == X[:, 5:]).all() and (y[:, :5] != X[:, :5]).all()
        assert sequence_ratios(report)["sequence/unplaced_fraction"] == 8 / 13

    def test_it_holds_the_anchors_of_as_many_documents_however_they_are_cut(self):
        rng = np.random.default_rng(0)
        for stride, documents in ((2, 1), (3, 4), (4, 8)):
            slots = SequenceAltUp(stride=stride, documents=documents).room(40)
            for _ in range(50):
                cuts = np.sort(rng.choice(np.arange(1, 40), documents - 1, replace=False))
                lengths = np.diff([0, *cuts, 40])
                assert np.ceil(lengths / stride).sum() <= slots < 40
            assert SequenceAltUp(stride=stride, documents=documents).room(40, cached=True) == -(-40 // stride)


def test_the_pooled_mean_looks_ahead_and_no_other_form_does():
    later = X.copy()
    later[:, 5] += 1  # the last token of the first document: positions 3, 4 and 5 are pooled
    for settings, first in ((SequenceAltUp(stride=3), 5), (StrideAndSkip(stride=3), 5), (POOL, 3)):
        changed = (run(settings)[0] != run(settings, later)[0]).any(-1)
        assert changed[:, first].all() and not changed[:, :first].any()
        assert not changed[:, 7:].any(), "a document sees another"


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "key", "message"),
        [
            (lambda: SequenceAltUp(stride=0), "stride", "0 is not positive"),
            (lambda: SequenceAltUp(documents=0), "documents", "0 is not positive"),
            (lambda: model(SequenceAltUp(blocks=("dens",))), "sequence.blocks", "no layer.*Did you mean 'dense'"),
            (
                lambda: model(SequenceAltUp(), soft=True),
                "sequence.blocks",
                "moe: .*whole rows of tokens; blocks that can be named: dense",
            ),
            (
                lambda: model(SequenceAltUp(blocks=("dense",)), TABLE),
                "sequence.blocks",
                "dense: its memory 'table' reads.*named: moe",
            ),
            (lambda: model(AveragePooling(blocks=("dense",))), "sequence.allow_leak", "up to 3 after it.*allow_leak"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings, key, message):
        with pytest.raises(ConfigError, match=message) as error:
            settings()
        assert error.value.key == key

    def test_what_goes(self):
        model(SequenceAltUp(blocks=("dense",)))
        model(AveragePooling(blocks=("dense",), stride=1))
        assert set(AveragePooling(stride=1).unused()) == {"documents", "allow_leak"}
        assert not AveragePooling().unused()
