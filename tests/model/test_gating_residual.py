"""Routers that add to the logits of the one below (MoE++): against the equations, however it is compiled."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import ROWS, cut, on_rows, parted, results
from flax import nnx

from sparsejax.base.config_view import unused
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.model.partial import embedded, run_layers
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Constant
from sparsejax.train.state import abstract_model

from reference import moe as slow_moe
from reference.transformer import rms_norm, scores, self_attention
from support import assert_close, host_batch, put_batch, put_params, to_numpy

LENGTH, EXPERTS = 8, 4
ROUTER = RouterConfig(selection=TopK(k=2), residual=True)
MOE = MoESpec(num_experts=EXPERTS, d_ff=8, zero_experts=1, eval_capacity_factor=5.0, router=ROUTER)
BLOCKS = {"dense": DenseSpec(d_ff=16), "moe": MOE}
SHAPE = {"d_model": 16, "num_heads": 2, "vocab_size": 32}
MODEL = ModelConfig(**SHAPE, prefix=("moe",), pattern=("dense", "moe"), repeats=2, suffix=("moe",), blocks=BLOCKS)
PARAMS = parted(MODEL)


def with_router(model=MODEL, **changed):
    moe = dataclasses.replace(MOE, router=dataclasses.replace(ROUTER, **changed))
    return dataclasses.replace(model, blocks={**BLOCKS, "moe": moe})


def slow_logits(values, blocks, arrays, config):
    """[B, T, V], each MoE layer's logits being x W + those of the one before, times the layer's own matrix."""
    mask, table = arrays["segments"] > 0, values["embedding"]["table"]
    x, logits = np.sqrt(table.shape[1]) * table[arrays["tokens"]], np.zeros((*mask.shape, EXPERTS + 1))
    for block in blocks:
        x = x + self_attention(
            block["attention"], rms_norm(x, block["attention_norm"]["scale"], config.norm_epsilon), arrays, config
        )
        normed = rms_norm(x, block["feed_forward_norm"]["scale"], config.norm_epsilon)
        part = block["feed_forward"]
        if "mlp" in part:
            x = x + slow_moe.feed_forward(normed, **{name: each["weight"] for name, each in part["mlp"].items()})
            continue
        below = logits, part["router"]["residual"]
        kind = {"k": 2, "zero": 1, "group_size": LENGTH, "factor": (5, 1), "below": below}
        found = slow_moe.forward(
            slow_moe.Layer(router=part["router"]["weight"], **part["experts"], **kind), normed, mask
        )
        x, logits = x + found.y, found.logits
    return scores(values, x, config)


def test_logits_of_the_model():
    values = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(PARAMS))
    units = values["stack"]["units"]["blocks"]
    middle = [jax.tree.map(lambda leaf, r=r: leaf[r], units[i]) for r in range(2) for i in range(2)]
    blocks = [values["stack"]["prefix"][0], *middle, values["stack"]["suffix"][0]]
    arrays = host_batch(ROWS, LENGTH, 32)
    with jax.set_mesh(make_mesh(MeshConfig())):
        actual = to_numpy(on_rows(MODEL, PARAMS)(arrays)).logits
    real = arrays["segments"] > 0
    assert_close(actual[real], slow_logits(values, blocks, arrays, MODEL)[real].astype(np.float32))


@pytest.fixture(scope="module")
def scanned():
    return results(MODEL, PARAMS, LENGTH)


@pytest.mark.parametrize(
    "changed, how",
    [
        ({"scan": False}, {}),
        ({"remat": "full"}, {}),
        ({}, {"mesh": (2, 2, 2)}),
        ({}, {"mesh": (1, 4, 2), "accumulation": 1}),
    ],
    ids=["unrolled", "remat", "2x2x2", "1x4x2"],
)
def test_however_it_is_compiled(scanned, changed, how):
    assert_close(results(dataclasses.replace(MODEL, **changed), PARAMS, LENGTH, **how), scanned, 3e-5, 1e-7)


def test_gradients_go_through_the_layers_below(scanned):
    """The last layer's matrix has one, and so has the first router's through it; the first layer's has none."""
    found = {jax.tree_util.keystr(path): np.abs(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(scanned[2])}
    residual = {path: leaf for path, leaf in found.items() if "residual" in path}
    (first,), (last,) = ([leaf for path, leaf in residual.items() if end in path] for end in ("prefix", "suffix"))
    (middle,) = [leaf for path, leaf in residual.items() if "units" in path]
    assert first.max() == 0 and last.max() > 0 and middle.shape[0] == 2 and (middle.max((1, 2)) > 0).all()


def test_a_matrix_of_zeros_changes_nothing():
    """That is how it begins."""
    zeroed = jax.tree_util.tree_map_with_path(lambda path, leaf: 0 * leaf if "residual" in str(path) else leaf, PARAMS)
    without = nnx.from_flat_state(
        {path: leaf for path, leaf in nnx.to_flat_state(PARAMS) if "residual" not in str(path)}
    )
    loss, reports, _ = results(MODEL, zeroed, LENGTH)
    assert_close((loss, reports), results(with_router(residual=False), without, LENGTH)[:2])


def test_decoding_goes_on_from_a_cache():
    arrays = host_batch(ROWS, LENGTH, 32, documents=1, padded=0)
    with jax.set_mesh(make_mesh(MeshConfig())):
        run = on_rows(MODEL, PARAMS)
        whole = to_numpy(run(arrays))
        caches = init_caches(MODEL, ROWS, LENGTH)
        found = []
        for place in range(LENGTH):
            out = run(cut(arrays, place, place + 1), caches)
            caches = out.caches
            found.append(to_numpy(out.logits))
        assert_close(np.concatenate(found, 1), whole.logits)
        model = unrolled(MODEL)
        unstacked = jax.jit(lambda params: unrolled_variables(MODEL, params))(
            put_params(PARAMS, jax.sharding.get_mesh())
        )
        assert_close(to_numpy(on_rows(model, to_numpy(unstacked))(arrays)).logits, whole.logits)


def test_layers_by_parts_are_refused():
    model = unrolled(MODEL)
    with jax.set_mesh(make_mesh(MeshConfig())), pytest.raises(RequestError, match=r"router\.residual"):
        graph, params, state = abstract_model(model)
        batch = put_batch(host_batch(ROWS, LENGTH, 32), jax.sharding.get_mesh())

        def some(params):
            whole = nnx.merge(graph, params, state)
            x, context, caches = embedded(whole, batch, None)
            return run_layers(whole, x, context, caches, [0])[0]

        jax.eval_shape(some, params)


def test_the_ledger_counts_its_matrix():
    plain = with_router(residual=False).blocks["moe"].costs(MODEL)["router"]
    found = MODEL.blocks["moe"].costs(MODEL)["router"]
    assert found.parameters - plain.parameters == (EXPERTS + 1) ** 2
    assert found.per_token - plain.per_token == 2 * (EXPERTS + 1) ** 2


def test_one_router_has_none_below():
    model = dataclasses.replace(MODEL, prefix=(), pattern=("moe",), repeats=1, suffix=())
    assert "below" in unused(model)["blocks.moe.router.residual"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: RouterConfig(residual=True, selection=Hash(), weight=Constant()), "has no logits"),
        (lambda: dataclasses.replace(MODEL, layer_dropout=0.1), "hand it on"),
        (
            lambda: dataclasses.replace(
                MODEL, suffix=("other",), blocks={**BLOCKS, "other": dataclasses.replace(MOE, num_experts=2)}
            ),
            "as many in all",
        ),
    ],
)
def test_what_does_not_go_with_it(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
