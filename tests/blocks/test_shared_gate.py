"""A gate between routed and shared experts (NLLB's conditional MoE routing): value, dropout, budget, ledger."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import parted, results

from sparsejax.base.config_view import unused
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.balance import NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw

from reference import moe as slow
from support import ONE_DEVICE, assert_close, host_batch, moe_layer_params, moe_layer_runner

WIDTH, LENGTH, ROWS = 8, 6, 8
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2, vocab_size=32)
ROUTER = RouterConfig(selection=TopK(k=1), weight=Raw(), balance=NoBalance())
SPEC = MoESpec(num_experts=4, d_ff=6, capacity_factor=4.0, shared_experts=1, shared_gate=0.3, router=ROUTER)
PARAMS = moe_layer_params(SPEC, BACKBONE)
X = np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
BATCH = host_batch(ROWS, LENGTH)
REAL = BATCH["segments"] > 0
GATES = 1 / (1 + np.exp(-(X @ PARAMS["shared_mixing"]["weight"][...])[..., 0].astype(np.float64)))


def run(spec=SPEC, shape=ONE_DEVICE, **more):
    return moe_layer_runner(spec, BACKBONE, shape)(PARAMS, X, BATCH, **more)


@pytest.mark.parametrize("shape", [ONE_DEVICE, (2, 2, 2)])
def test_equals_the_equations(shape):
    matrices = ("w_in", "w_out")
    layer = slow.Layer(
        router=PARAMS["router"]["weight"][...],
        **{name: PARAMS["experts"][name][...] for name in matrices},
        shared=tuple(PARAMS["shared"][name]["weight"][...] for name in matrices),
        shared_gate=PARAMS["shared_mixing"]["weight"][...],
        k=1,
        weight="raw",
        factor=(4, 1),
        group_size=LENGTH,
    )
    y, moe = run(shape=shape)
    assert_close(y[REAL], slow.forward(layer, X, REAL).y[REAL].astype(np.float32))
    np.testing.assert_allclose(moe.gate_sum, GATES[REAL].sum(), rtol=1e-5)
    assert moe.gated == REAL.sum()


def test_dropout_leaves_some_tokens_to_the_shared_experts():
    dropping = dataclasses.replace(SPEC, shared_gate_dropout=0.4)
    alone, _ = run(dataclasses.replace(SPEC, shared_gate_dropout=1 - 1e-6), key=jax.random.key(0))
    plain, counted = run()
    y, moe = run(dropping, key=jax.random.key(0))
    shared = np.isclose(y, alone, atol=1e-6).all(-1)
    assert 0.2 < shared.mean() < 0.6
    assert_close(y[~shared], plain[~shared])
    assert_close(moe.gate_sum, counted.gate_sum)
    assert_close(run(dropping, mode="eval"), run(mode="eval"))
    assert_close(run(dropping, (2, 2, 2), key=jax.random.key(0)), (y, moe))


MODEL = ModelConfig(
    d_model=WIDTH,
    num_heads=2,
    vocab_size=32,
    pattern=("moe",),
    repeats=2,
    blocks={"moe": dataclasses.replace(SPEC, shared_gate_coefficient=2.0)},
)


def test_the_budget_is_of_the_whole_step():
    """|mean of g − p|, summed over layers: with microbatches as without, loss and gradients."""
    params = parted(MODEL)
    whole = results(MODEL, params, LENGTH)
    parts = results(MODEL, params, LENGTH, accumulation=2)
    sums = lambda found: (found[1]["pattern_0"].moe.gate_sum, found[1]["pattern_0"].moe.gated)  # noqa: E731
    assert_close((parts[0], sums(parts), parts[2]), (whole[0], sums(whole), whole[2]), 3e-5, 1e-7)
    free = dataclasses.replace(MODEL, blocks={"moe": dataclasses.replace(SPEC, shared_gate_coefficient=0.0)})
    moe = whole[1]["pattern_0"].moe
    expected = 2.0 * np.abs(moe.gate_sum / moe.gated - 0.3).sum()
    np.testing.assert_allclose(whole[0] - results(free, params, LENGTH)[0], expected, rtol=1e-4)
    assert SPEC.metrics(Report(moe=jax.tree.map(lambda leaf: leaf[0], moe)), "train")["moe/shared_gate"] == (
        pytest.approx(moe.gate_sum[0] / moe.gated[0])
    )


def test_the_ledger_counts_the_gate():
    plain = dataclasses.replace(SPEC, shared_gate=None).costs(BACKBONE)["shared_experts"]
    assert SPEC.costs(BACKBONE)["shared_experts"].parameters == plain.parameters + WIDTH
    assert SPEC.costs(BACKBONE)["shared_experts"].per_token == plain.per_token + 2 * WIDTH


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"shared_gate": 1.5}, r"outside \[0, 1\]"),
        ({"mix_shared": True}, "weighs routed and shared experts already"),
        ({"shared_gate_dropout": 1.0}, r"outside \[0, 1\)"),
        ({"shared_gate_coefficient": -1.0}, "negative"),
    ],
)
def test_what_is_refused(changed, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(SPEC, **changed)


def test_without_shared_experts_there_is_no_gate():
    reasons = unused(dataclasses.replace(SPEC, shared_experts=0))
    assert {"shared_gate", "shared_gate_coefficient", "shared_gate_dropout"} <= set(reasons)
