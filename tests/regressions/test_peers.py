"""Defects that public code bases had, each in a few lines. The wider laws that they break are in `tests/contracts`."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Totals
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.nn.mlp import Experts
from sparsejax.ops.assignment import by_token
from sparsejax.ops.capacity import capacity
from sparsejax.ops.losses import load_balance
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import LossFree
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.orders import ORDERS
from sparsejax.routers.router import decide
from sparsejax.routers.scores import Sigmoid
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw, Renormalized

from support import ONE_DEVICE, candidates, host_batch, known, moe_layer_params, moe_layer_runner

BACKBONE = ModelConfig(d_model=8, num_heads=2)
TOP_1 = RouterConfig(selection=TopK(k=1), weight=Raw())


def layer(router=TOP_1, rows=2, length=8, backbone=BACKBONE, **fields):
    """(output, report) of a layer in which every token wants the same experts."""
    spec = MoESpec(**({"num_experts": 4, "d_ff": 4, "capacity_factor": 1.0, "router": router} | fields))
    x = np.tile(np.random.default_rng(0).normal(size=BACKBONE.d_model).astype(np.float32), (rows, length, 1))
    arrays = host_batch(rows, length, padded=0)
    return moe_layer_runner(spec, backbone, ONE_DEVICE)(moe_layer_params(spec, backbone), x, arrays)


def test_a_dropped_token_gets_nothing_and_not_its_own_vector_times_its_weight():
    """transformers issue 37017."""
    y, report = layer()
    assert report.dropped.sum() == 2 * (8 - 2)
    assert (y[:, 2:] == 0).all() and (y[:, :2] != 0).any(-1).all()


def test_places_are_counted_along_tokens_and_not_along_experts():
    """transformers issue 48293: nothing was ever over the capacity."""
    _, report = layer()
    assert sorted(report.processed.tolist()) == [0, 0, 0, 2 * 2]


def test_experts_outside_a_tokens_groups_do_not_win_with_a_0_against_negative_rankings():
    router = RouterConfig(
        score=Sigmoid(), selection=TopK(k=2), limit=GroupLimit(groups=4, kept=1, best=1), controller=LossFree()
    )
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), jnp.float32)
    decision = decide(logits, known(np.ones((2, 9), bool), 9), router, jnp.full((router.controller.rows, 8), -3.0))
    experts = np.asarray(by_token(decision.pairs.expert, decision.pairs))
    assert (experts[..., 0] // 2 == experts[..., 1] // 2).all()
    assert (experts[..., 0] // 2 == np.asarray(logits).argmax(-1) // 2).all()


def test_loads_above_256_are_exact_in_a_bfloat16_model():
    """Megatron-LM pull request 7081."""
    _, report = layer(rows=1, length=515, backbone=dataclasses.replace(BACKBONE, dtype="bfloat16"))
    assert report.assigned.max() == 515 and report.assigned.dtype == np.int32


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("experts", [4, 16])
def test_a_balanced_router_pays_the_same_whatever_k_and_the_number_of_experts(k, experts):
    """DeepSpeed pull request 5156: top-2 paid E times as much; elsewhere k times too much or too little."""
    tokens = 8 * experts
    value = load_balance(jnp.full(experts, tokens * k // experts), jnp.full(experts, 8.0), jnp.int32(tokens), k)
    np.testing.assert_allclose(value, 1, rtol=1e-6)


def test_a_single_expert_with_a_renormalized_weight_is_refused():
    """minimind issue 858: its weight is always 1, and the router learns nothing from the task."""
    with pytest.raises(ConfigError, match="no gradient") as error:
        RouterConfig(selection=TopK(k=1), weight=Renormalized())
    assert error.value.key == "weight"


def test_every_expert_begins_with_values_of_its_own():
    """One key for all experts makes them copies, which only chance in the routing tells apart."""
    experts = Experts(jax.random.key(0), BACKBONE, 4, 12, gated=True, activation="silu")
    for weight in (experts.w_in, experts.w_out, experts.w_gate):
        values = np.asarray(weight[...])
        assert all(np.abs(values[a] - values[b]).max() > 1e-3 for a in range(4) for b in range(a))


def test_layers_that_collapse_on_different_experts_do_not_make_up_for_each_other():
    """transformers issue 28255: one balance loss of all layers' loads, one behind the other."""
    spec = MoESpec(num_experts=2, router=RouterConfig(selection=TopK(k=1), weight=Raw(), balance=LoadBalance()))
    _, one = layer(spec.router, num_experts=2)
    other = dataclasses.replace(one, assigned=one.assigned[::-1], probability_sum=one.probability_sum[::-1])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    totals = Totals(targets=one.tokens, tokens=one.tokens, rows=jnp.int32(2), microbatches=1)
    loss = lambda report: float(spec.losses(SimpleNamespace(moe=report), totals, None)["balance"])  # noqa: E731
    even = spec.router.balance.coefficient
    assert loss(one) > 1.05 * even
    np.testing.assert_allclose(loss(both), 2 * loss(one), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "random"])
def test_of_equal_claims_the_earlier_tokens_get_the_slots(name):
    """A sort that is not stable keeps some of them."""
    router = RouterConfig(selection=TopK(k=1), weight=Raw(), order=ORDERS[name](), allow_leak=True)
    decision = decide(jnp.zeros((1, 64, 4)), known(np.ones((1, 64), bool), 5), router)
    kept = np.asarray(by_token(decision.slots.keep, decision.pairs))[0, :, 0]
    assert np.flatnonzero(kept).tolist() == [0, 1, 2, 3, 4]


def test_experts_do_not_choose_padding_however_high_it_scores():
    """Weighing padding down leaves it chosen where a group has few tokens."""
    scores = np.random.default_rng(0).uniform(0.1, 0.5, (1, 8, 4)).astype(np.float32)
    mask = np.arange(8)[None] < 3
    scores[~mask] = 1
    pairs = ExpertChoice()(candidates(scores, mask, num_slots=5))
    assert (np.asarray(pairs.token)[np.asarray(pairs.valid)] < 3).all() and pairs.valid.sum() == 4 * 3


def test_rounding_up_comes_after_the_capacity_factor():
    """MaxText rounds before it, which is a convention of its own here."""
    assert [capacity(50, 8, 2, 1.5, name) for name in ("per_choice", "maxtext")] == [19, 19]
    assert [capacity(10, 8, 1, 1.5, name) for name in ("per_choice", "maxtext")] == [2, 3]
