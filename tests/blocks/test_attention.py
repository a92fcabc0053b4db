"""Blocks of attention alone, and a table in the place of a network's up-projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.attention import AttentionSpec
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.memory import presets
from sparsejax.memory.contents import GateRow
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs, total
from sparsejax.model.lm import LanguageModel
from sparsejax.model.tables import prefetch
from sparsejax.ops.rows import kept_rows, placed

from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

D, F, VOCAB = 8, 24, 12
BATCH = host_batch(2, 6, VOCAB, padded=0)
STEM = {"gates": presets.stem(content=GateRow(d_ff=F), blocks=("block",))}


def model(block, memory) -> ModelConfig:
    return ModelConfig(
        d_model=D, num_heads=2, vocab_size=VOCAB, pattern=("block",), repeats=1, blocks={"block": block}, memory=memory
    )


def states(config, params) -> np.ndarray:
    """What the stack leaves."""

    def run(params, batch):
        model = nnx.merge(graph, params)
        x_BTD = model.embedding(batch.tokens)
        fetched = prefetch(config, model.tables, batch)
        return model.stack(x_BTD, Context(batch=batch, mode="eval"), None, model.tables, fetched).x

    with on_mesh(ONE_DEVICE) as mesh:
        graph = graph_of(lambda key: LanguageModel(key, config))
        return to_numpy(jax.jit(run)(put_params(params, mesh), put_batch(BATCH, mesh)))


def alone_and_with_stem():
    """What attention leaves without and with the lookup layer, whose parameters come third."""
    config, rng = model(AttentionSpec(), STEM), np.random.default_rng(0)
    params = host_params(lambda key: LanguageModel(key, config))
    alone = states(config, params)
    table = params["tables"]["gates"]["rows"]
    params["tables"]["gates"]["rows"] = table.replace(rng.normal(size=table.shape).astype(np.float32))
    return alone, states(config, params), params


def test_the_row_is_the_up_projection_of_the_layers_only_network():
    x, found, params = alone_and_with_stem()
    of_layer = params["stack"]["units"]["blocks"][0]["memories"]["gates"]
    w_gate, w_out = (of_layer["consume"][name]["weight"][...][0].astype(np.float64) for name in ("w_gate", "w_out"))
    table = params["tables"]["gates"]["rows"][...][0]
    rows = table[np.asarray(placed(jnp.asarray(BATCH["tokens"]), len(table)))]
    h = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + ModelConfig().norm_epsilon)
    gate = h @ w_gate
    expected = x + (gate / (1 + np.exp(-gate)) * rows) @ w_out
    assert_close(found, expected.astype(np.float32))
    assert np.abs(found - x).max() > 0.1


def test_neither_its_weights_nor_its_products_are_there():
    """Beside a gated network of the same width: one matrix less, in the model and in the ledger."""
    gated, stem = model(DenseSpec(d_ff=F, gated=True), {}), model(AttentionSpec(), STEM)
    size = lambda config: sum(  # noqa: E731
        leaf.size for leaf in jax.tree.leaves(host_params(lambda key: LanguageModel(key, config)))
    )
    with on_mesh(ONE_DEVICE):
        built = size(gated) - (size(stem) - kept_rows(VOCAB) * F)
    table = component_costs(stem)["memory_table"].parameters
    assert table == VOCAB * F and "mlp" not in component_costs(stem)
    assert built == total(gated).parameters - (total(stem).parameters - table) == D * F
    assert total(gated).per_token - total(stem).per_token == 2 * D * F


def test_beside_no_network_there_is_no_place():
    with pytest.raises(ConfigError, match="no feed-forward network to be beside; allowed: after") as error:
        model(AttentionSpec(), {"ids": presets.token_id(blocks=("block",), place="parallel")})
    assert error.value.key == "memory.ids.place"
