"""Soft MoE against the slot-by-slot reference; its sums, padding, ledger, cost, and the leak it has to own up to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks import presets
from sparsejax.blocks.context import Context
from sparsejax.blocks.soft import SoftMoELayer, SoftSpec, soft_logits, soft_weights
from sparsejax.model.config import ModelConfig

from reference import soft as slow
from support import (
    MESHES,
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    layer_runner,
    mesh_name,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

ROWS, LENGTH, WIDTH, EXPERTS, SLOTS = 8, 6, 8, 4, 3
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2)
SPEC = SoftSpec(num_experts=EXPERTS, slots_per_expert=SLOTS, d_ff=6)
ARRAYS = host_batch(ROWS, LENGTH)
MASK = ARRAYS["segments"] > 0


@functools.cache
def params():
    """With a scale at which slots are far from the mean of all tokens."""
    found = host_params(lambda key: SoftMoELayer(key, BACKBONE, SPEC))
    found["scale"] = found["scale"].replace(np.float32(6.0))
    return found


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def run(x, arrays=ARRAYS, shape=ONE_DEVICE, mode="train"):
    return layer_runner(SoftMoELayer, SPEC, BACKBONE, shape)(params(), x, arrays, mode=mode)


def test_equals_the_reference():
    x, experts = tokens(), params()["experts"]
    y, report = run(x)
    weights = (params()["phi"][...], 6.0, experts["w_in"][...], experts["w_out"][...])
    rows = [slow.forward(x[b], MASK[b], *weights) for b in range(ROWS)]
    assert_close(y, np.stack([row[0] for row in rows]).astype(np.float32))
    by_expert = sum(row[2].sum((0, 2)) for row in rows)
    np.testing.assert_allclose(report.probability_sum, by_expert, rtol=1e-5)


def test_weights_are_positive_and_sum_to_one_over_tokens_and_over_slots():
    x, phi = jnp.asarray(tokens()), jnp.asarray(params()["phi"][...])
    logits = soft_logits(x, phi, jnp.float32(6.0))
    assert np.abs(logits).max() <= 6.0
    dispatch, combine = map(np.asarray, soft_weights(logits, jnp.asarray(MASK)))
    np.testing.assert_allclose(dispatch.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(combine.sum((2, 3)), MASK, rtol=1e-6)
    assert (dispatch[MASK] > 0).all() and (combine[MASK] > 0).all()
    assert (dispatch[~MASK] == 0).all() and (combine[~MASK] == 0).all()


def test_every_slot_is_assigned_and_processed():
    _, report = run(tokens())
    assert report.assigned.tolist() == report.processed.tolist() == [ROWS * SLOTS] * EXPERTS
    assert report.slots == ROWS * SLOTS * EXPERTS and report.dropped.sum() == report.unserved == 0
    metrics = SPEC.metrics(Report(moe=report), "train")
    assert metrics["moe/load_max_over_mean"] == metrics["moe/balance_loss"] == metrics["moe/slot_utilisation"] == 1
    assert metrics["moe/drop_fraction"] == metrics["moe/dead_experts"] == 0


def test_padding_reaches_nothing():
    """Not the slots, not a sum; and rows of nothing else are neither work nor nan."""
    x, more = tokens(), np.full((ROWS, LENGTH, WIDTH), 9.0, np.float32)
    changed = np.where(MASK[..., None], x, 9.0).astype(np.float32)
    y, report = run(x)
    other_y, other = run(changed)
    assert_close((other_y, other), (y, report), 1e-6)
    assert (y[~MASK] == 0).all()
    arrays = ARRAYS | {"segments": np.where(np.arange(ROWS)[:, None] < 4, ARRAYS["segments"], 0)}
    half_y, half = run(np.where(arrays["segments"][..., None] > 0, x, more), arrays)
    assert_close(half_y[:4], y[:4], 1e-6)
    assert (half_y[4:] == 0).all() and half.processed.tolist() == [4 * SLOTS] * EXPERTS
    assert half.slots == report.slots


def test_tokens_in_another_order_give_the_same():
    x, order = tokens(), np.array([3, 0, 5, 1, 4, 2])
    whole = host_batch(ROWS, LENGTH, padded=0)
    assert_close(run(x[:, order], whole)[0], run(x, whole)[0][:, order], 1e-6)


def test_one_token_is_its_own_mixture():
    """Every slot holds the token itself."""
    x, arrays = tokens()[:, :1], host_batch(ROWS, 1, documents=1, padded=0)
    y, _ = run(x, arrays)
    experts = params()["experts"]
    logits = np.asarray(soft_logits(jnp.asarray(x), jnp.asarray(params()["phi"][...]), jnp.float32(6.0)))[:, 0]
    combine = np.exp(logits) / np.exp(logits).sum((1, 2), keepdims=True)
    outputs = np.stack([slow.feed_forward(x[:, 0], experts["w_in"][e], experts["w_out"][e]) for e in range(EXPERTS)])
    assert_close(y[:, 0], np.einsum("be,ebd->bd", combine.sum(-1), outputs).astype(np.float32))


@functools.cache
def with_gradients(shape):
    """(y, report, gradients in variables and input)."""
    direction = tokens(1)
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: SoftMoELayer(key, BACKBONE, SPEC))

        @jax.jit
        def value_and_grads(params, x, direction, batch):
            def loss(params, x):
                y, report = nnx.merge(graph, params)(x, Context(batch=batch, mode="train"))
                return (y * direction).sum() + 0.01 * report.z_sum, (y, report)

            grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return *out, grads

        rows = put_rows(tokens(), mesh), put_rows(direction, mesh), put_batch(ARRAYS, mesh)
        return to_numpy(value_and_grads(put_params(params(), mesh), *rows))


SHAPES = [pytest.param(m, id=mesh_name(m), marks=[] if m == (2, 2, 2) else [pytest.mark.slow]) for m in MESHES[1:]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_one_device(shape):
    assert_close(with_gradients(shape), with_gradients(ONE_DEVICE))


def test_everything_has_a_gradient():
    grads = with_gradients(ONE_DEVICE)[2][0]
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).max() > 0


def test_a_language_model_has_to_allow_the_leak():
    model = {"d_model": WIDTH, "num_heads": 2, "pattern": ("soft",)}
    with pytest.raises(ConfigError, match=r"depend on the tokens after it.*allow_leak=true accepts that") as error:
        ModelConfig(**model, blocks={"soft": SPEC})
    assert error.value.key == "blocks.soft.allow_leak"
    assert ModelConfig(**model, blocks={"soft": presets.soft_moe()}).num_layers == 2
    x, later = tokens(), tokens(2)
    later[:, :3] = x[:, :3]
    assert np.abs(run(x)[0] - run(later)[0])[:, :3].max() > 1e-3, "the leak is there"


@pytest.mark.parametrize("field", ["num_experts", "slots_per_expert", "d_ff"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ConfigError, match="0 is not positive") as error:
        SoftSpec(**{field: 0})
    assert error.value.key == field


def test_the_experts_cost_what_their_slots_do():
    cost = SPEC.costs(BACKBONE)
    pair = 2 * 2 * WIDTH * 6
    assert cost["experts"].flops(0, row_length=LENGTH) == EXPERTS * SLOTS * pair / LENGTH
    assert cost["router"].per_token == 3 * 2 * WIDTH * EXPERTS * SLOTS
    _, report = run(tokens())
    assert SPEC.processed_flops(Report(moe=report), BACKBONE) == ROWS * cost["experts"].per_row
