"""Dropout on the hidden layers of experts: the same units on any mesh, with any movement and grouping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.dropout import Dropout, drop_units
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.top_k import TopK

from reference import dropout as slow_dropout
from reference import moe as slow
from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    moe_layer_params,
    moe_layer_runner,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

ROWS, LENGTH, WIDTH, EXPERTS, HIDDEN, RATE = 8, 6, 8, 8, 12, 0.4
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2)
SPEC = MoESpec(
    num_experts=EXPERTS, d_ff=HIDDEN, capacity_factor=2.0, router=RouterConfig(selection=TopK(k=2)), expert_dropout=RATE
)
X, DIRECTION = np.random.default_rng(0).normal(size=(2, ROWS, LENGTH, WIDTH)).astype(np.float32)
BATCH = host_batch(ROWS, LENGTH)
KEY = jax.random.key(3)


def run(spec, key=KEY, mode="train", batch=BATCH):
    return moe_layer_runner(spec, BACKBONE, ONE_DEVICE)(moe_layer_params(spec, BACKBONE), X, batch, key=key, mode=mode)[
        0
    ]


def with_grads(spec, shape):
    """(output, gradients in variables and input)."""
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))

        @jax.jit
        def find(params, x, direction, batch):
            def loss(params, x):
                y, _ = nnx.merge(graph, params)(x, Context(batch=batch, mode="train", key=KEY))
                return (y * direction).sum(), y

            grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return y, grads

        params = put_params(moe_layer_params(spec, BACKBONE), mesh)
        return to_numpy(find(params, put_rows(X, mesh), put_rows(DIRECTION, mesh), put_batch(BATCH, mesh)))


@pytest.mark.parametrize("gated", [False, True])
def test_against_the_reference(gated):
    spec = dataclasses.replace(SPEC, gated=gated)
    params = moe_layer_params(spec, BACKBONE)
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, row), 13) for row in range(ROWS)]
    seeds = np.concatenate([np.asarray(jax.random.bits(key, (LENGTH,))) for key in keys]).tolist()
    layer = slow.Layer(
        router=params["router"]["weight"][...],
        **{name: params["experts"][name][...] for name in (["w_gate"] if gated else []) + ["w_in", "w_out"]},
        k=2,
        factor=(2, 1),
        group_size=LENGTH,
        stays=lambda token, e: slow_dropout.stays(seeds[token], int(e), HIDDEN, RATE),
    )
    assert_close(run(spec), slow.forward(layer, X, BATCH["segments"] > 0).y.astype(np.float32), 1e-5)


ELSEWHERE = {
    "einsum": ({"dispatch": "einsum"}, ONE_DEVICE),
    "groups of two rows": ({"group_size": 2 * LENGTH, "capacity_factor": 4.0}, ONE_DEVICE),
    "mesh": ({}, (2, 2, 2)),
    "mesh, einsum": ({"dispatch": "einsum", "gated": True}, (1, 4, 2)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_numbers_are_those_of_one_device(name):
    fields, shape = ELSEWHERE[name]
    ample = dataclasses.replace(SPEC, capacity_factor=4.0, gated=fields.get("gated", False))
    assert_close(with_grads(dataclasses.replace(ample, **fields), shape), with_grads(ample, ONE_DEVICE))


def test_steps_and_rows_differ_and_evaluation_drops_nothing():
    plain = dataclasses.replace(SPEC, expert_dropout=0.0)
    assert not np.array_equal(run(SPEC), run(SPEC, jax.random.key(4)))
    other = BATCH | {"rows": BATCH["rows"] + 1}
    assert not np.array_equal(run(SPEC), run(SPEC, batch=other))
    for mode in ("eval", "generate"):
        assert np.array_equal(run(SPEC, None, mode), run(plain, None, mode))


def test_without_a_rate_nothing_is_drawn():
    def program(rate):
        spec = dataclasses.replace(SPEC, expert_dropout=rate)
        with on_mesh(ONE_DEVICE) as mesh:
            graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))
            params, x, batch = moe_layer_params(spec, BACKBONE), put_rows(X, mesh), put_batch(BATCH, mesh)
            call = lambda key: nnx.merge(graph, params)(x, Context(batch=batch, mode="train", key=key))  # noqa: E731
            return str(jax.make_jaxpr(call)(KEY))

    assert "random" not in program(0.0) and "random" in program(RATE)


def test_a_share_is_dropped_the_mean_stays_and_units_are_independent():
    rows, units = 4000, 50
    seeds = jax.random.bits(jax.random.key(0), (rows,))
    dropout = Dropout(rate=RATE, seed_N=seeds, unit_F=jnp.arange(units))
    found = np.asarray(drop_units(jnp.ones((rows, units)), dropout))
    assert np.allclose(np.unique(found), [0, 1 / (1 - RATE)])
    dropped = (found == 0).astype(np.float64)
    deviation = (RATE * (1 - RATE)) ** 0.5
    assert abs(dropped.mean() - RATE) < 4 * deviation / dropped.size**0.5
    for axis, draws in ((0, rows), (1, units)):
        assert np.abs(dropped.mean(axis) - RATE).max() < 5 * deviation / draws**0.5
    correlation = np.corrcoef(dropped, rowvar=False) - np.eye(units)
    assert np.abs(correlation).max() < 5 / rows**0.5
    part = drop_units(jnp.ones((rows, 20)), Dropout(rate=RATE, seed_N=seeds, unit_F=jnp.arange(20, 40)))
    assert np.array_equal(part, found[:, 20:40])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"expert_dropout": 1.0}, "expert_dropout: 1.0 is outside"),
        ({"expert_dropout": 0.1, "dispatch": "grouped"}, "allowed: 0, or dispatch=gather"),
    ],
)
def test_what_cannot_be_is_refused(fields, line):
    with pytest.raises(ConfigError, match=line):
        MoESpec(**fields)
