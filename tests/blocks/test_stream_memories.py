"""Lookup layers whose content goes to other streams than the one that their layer computes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.context import BlockOutput, Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.hyper_connections import HyperConnections
from sparsejax.blocks.streams import OneStream, StreamedBlock
from sparsejax.memory import presets
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel
from sparsejax.model.tables import prefetch
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.rows import kept_rows, placed

from reference import streams as slow
from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

WIDTH, VOCAB, ROWS, LENGTH, K = 8, 12, 2, 6, 3
BATCH = host_batch(ROWS, LENGTH, VOCAB)
RNG = np.random.default_rng(0)
DELTAS = RNG.normal(size=(3, ROWS, LENGTH, WIDTH)).astype(np.float32)


class Toy(nnx.Module):
    """A block that leaves the same for the other streams in all layers."""

    def __call__(self, x, context, cache=None):
        return BlockOutput(x=x + jnp.tanh(x), report=Report(), aside={1: DELTAS[1], 2: DELTAS[2]})


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("known", [True, False], ids=["active known", "active traced"])
def test_what_a_block_leaves_aside_is_added_after_the_correction(layer, known):
    x = RNG.normal(size=(K, ROWS, LENGTH, WIDTH)).astype(np.float32)
    mixer_of = lambda: AltUp(streams=K).mixer(jax.random.key(0), Backbone(d_model=WIDTH, num_heads=2))  # noqa: E731

    def run(streams, layer, batch):
        block = StreamedBlock(Toy(), mixer_of(), active=(0, 1, 2, 0), layers=(int(layer),) if known else (0, 1, 2, 3))
        return jnp.stack(block(streams, Context(batch=batch, mode="eval", layer=layer)).x)

    with on_mesh(ONE_DEVICE) as mesh:
        given = tuple(put_rows(stream, mesh) for stream in x), put_batch(BATCH, mesh)
        call = lambda streams, batch, at: run(streams, layer if known else at, batch)  # noqa: E731
        found = to_numpy(jax.jit(call)(*given, jnp.int32(layer)))
    j = layer % K
    tokens = x.astype(np.float64).reshape(K, -1, WIDTH).swapaxes(0, 1)
    plain = [slow.altup(token, lambda u: u + np.tanh(u), np.eye(K), np.ones(K), j, "old") for token in tokens]
    expected = np.stack(plain, 1).reshape(x.shape)
    expected[(j + 1) % K] += DELTAS[1]
    expected[(j + 2) % K] += DELTAS[2]
    assert_close(found, expected.astype(np.float32))


def model(residual, **memory) -> ModelConfig:
    return ModelConfig(
        d_model=WIDTH,
        num_heads=2,
        vocab_size=VOCAB,
        pattern=("dense",),
        repeats=1,
        blocks={"dense": DenseSpec(d_ff=16)},
        memory={"ids": presets.token_id(blocks=("dense",), **memory)},
        streams=residual,
    )


def last_streams(config, table) -> np.ndarray:
    """What the stack leaves, `[K, B, T, D]`, with this table."""
    params = host_params(lambda key: LanguageModel(key, config))
    params["tables"]["ids"]["rows"] = params["tables"]["ids"]["rows"].replace(table)

    def run(params, batch):
        model = nnx.merge(graph, params)
        x = model.embedding(batch.tokens)
        context, fetched = Context(batch=batch, mode="eval", embedded=x), prefetch(config, model.tables, batch)
        return jnp.stack(model.stack(model.ends.spread(x), context, None, model.tables, fetched).x)

    with on_mesh(ONE_DEVICE) as mesh:
        graph = graph_of(lambda key: LanguageModel(key, config))
        return to_numpy(jax.jit(run)(put_params(params, mesh), put_batch(BATCH, mesh)))


@pytest.mark.parametrize("place", ["before_attention", "parallel", "after"])
@pytest.mark.parametrize("to", [(1,), (1, 2), (0, 2)], ids=str)
def test_what_is_looked_up_goes_to_the_streams_named(to, place):
    """The first layer computes on stream 0."""
    config = model(AltUp(streams=K), streams=to, place=place)
    table = RNG.normal(size=(1, kept_rows(VOCAB), WIDTH)).astype(np.float32)
    start, found = last_streams(config, 0 * table), last_streams(config, table)
    rows = table[0, np.asarray(placed(jnp.asarray(BATCH["tokens"]), kept_rows(VOCAB)))]
    rows[BATCH["segments"] == 0] = 0
    for stream in range(1, K):
        if 0 in to:  # what the layer computes on takes it, and the correction brings it to all
            assert np.abs(found[stream] - start[stream]).max() > 0.1
        else:
            assert_close(found[stream], start[stream] + (rows if stream in to else 0))
    assert (0 in to) == (np.abs(found[0] - start[0]).max() > 0)


@pytest.mark.parametrize(
    ("residual", "memory", "said"),
    [
        (OneStream(), {"streams": (1,)}, r"there is no other; set model.streams=altup, or streams=\(0,\)"),
        (AltUp(streams=2), {"streams": (1, 2)}, "but there are 2; allowed: 0 … 1"),
        (HyperConnections(streams=3), {"streams": (3,)}, "but there are 3; allowed: 0 … 2"),
    ],
)
def test_streams_that_there_are_not_are_refused(residual, memory, said):
    with pytest.raises(ConfigError, match=said) as error:
        model(residual, **memory)
    assert error.value.key == "memory.ids.streams"


@pytest.mark.parametrize("bad", [(), (2, 1), (1, 1), (-1,)], ids=str)
def test_streams_are_named_in_order(bad):
    with pytest.raises(ConfigError, match="ascending") as error:
        presets.token_id(blocks=("dense",), streams=bad)
    assert error.value.key == "streams"


def test_at_the_embedding_there_is_one_stream():
    with pytest.raises(ConfigError, match="place=embedding"):
        presets.over_encoding(streams=(1,))
