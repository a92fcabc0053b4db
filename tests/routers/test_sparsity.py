"""The adaptive L1 of ReMoE: its loss against a loop, its coefficient's direction, and where both together end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks.context import Totals
from sparsejax.blocks.moe import MoESpec
from sparsejax.routers.balance import NoBalance
from sparsejax.routers.candidates import Noise
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import LossFree, NoController
from sparsejax.routers.limits import GroupLimit, NoLimit
from sparsejax.routers.router import decide, report
from sparsejax.routers.scores import Relu
from sparsejax.routers.sparsity import Sparsity
from sparsejax.routers.top_k import Positive, TopK
from sparsejax.routers.weights import Raw

from reference import selection as slow
from support import known

GROUPS, SIZE, EXPERTS, K = 2, 12, 8, 2
MASK = np.ones((GROUPS, SIZE), bool)
MASK[1, 7:] = False
LOGITS = np.random.default_rng(0).normal(size=(GROUPS, SIZE, EXPERTS)).astype(np.float32)
ROUTER = RouterConfig(
    score=Relu(), selection=Positive(k=K), controller=Sparsity(initial=0.1), weight=Raw(), balance=NoBalance(), z_loss=0
)


def state_after(steps: float):
    return jnp.stack([jnp.zeros(EXPERTS), jnp.full(EXPERTS, steps)])


def reported(logits, state, mask=MASK):
    return report(decide(logits, known(mask, SIZE), ROUTER, state), jnp.asarray(mask))


class TestLoss:
    @pytest.mark.parametrize("steps", [0, 7, -3])
    def test_against_a_loop(self, steps):
        moe = reported(jnp.asarray(LOGITS), state_after(steps))
        expected = 0.1 * 1.2**steps * slow.pressed(np.maximum(LOGITS[MASK], 0), K)
        assert float(Sparsity().loss(moe, jnp.int32(MASK.sum()), K)) == pytest.approx(expected, rel=1e-5)

    def test_it_is_a_term_of_the_layers_loss(self):
        spec = MoESpec(num_experts=EXPERTS, router=ROUTER)
        totals = Totals(targets=jnp.int32(1), tokens=jnp.int32(MASK.sum()), rows=jnp.int32(2), microbatches=1)
        state = state_after(2)
        value, grad = jax.value_and_grad(
            lambda x: spec.losses(Report(moe=reported(x, state)), totals, None)["sparsity"]
        )(jnp.asarray(LOGITS))
        assert float(value) == pytest.approx(0.1 * 1.2**2 * slow.pressed(np.maximum(LOGITS[MASK], 0), K), rel=1e-5)
        positive = (LOGITS > 0) & MASK[..., None]
        assert (np.asarray(grad)[positive] > 0).all() and (np.asarray(grad)[~positive] == 0).all()
        plain = MoESpec(num_experts=EXPERTS).losses(Report(moe=reported(jnp.asarray(LOGITS), state)), totals, None)
        assert "sparsity" not in plain

    def test_the_state_has_no_gradient_and_moves_no_ranking(self):
        grad = jax.grad(lambda s: Sparsity().loss(reported(jnp.asarray(LOGITS), s), jnp.int32(19), K))(state_after(1))
        assert (grad == 0).all()
        moved, still = (reported(jnp.asarray(LOGITS), state_after(steps)).assigned for steps in (0, 50))
        assert np.array_equal(moved, still)


class TestCoefficient:
    @pytest.mark.parametrize("per_token, step", [(K + 1, 1), (K, 0), (K - 1, -1)])
    def test_goes_up_exactly_when_the_layer_is_too_dense(self, per_token, step):
        scores = np.zeros((1, SIZE, EXPERTS), np.float32)
        scores[..., :per_token] = 1
        moe = reported(jnp.asarray(scores), state_after(4), np.ones((1, SIZE), bool))
        assert ROUTER.controller.update(state_after(4), moe, K).tolist() == state_after(4 + step).tolist()

    def test_no_tokens_no_move_and_repeats_are_apart(self):
        dense, empty = np.ones((1, SIZE, EXPERTS), np.float32), np.zeros((1, SIZE), bool)
        both = [reported(jnp.asarray(dense), state_after(0), mask) for mask in (empty, ~empty)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
        moved = ROUTER.controller.update(jnp.stack([state_after(0)] * 2), stacked, K)
        assert moved[:, 1, 0].tolist() == [0, 1] and (moved[:, 0] == 0).all()

    def test_scores_that_want_to_be_dense_end_at_the_wanted_number(self):
        """Scores that are drawn to values half of which are positive; K of 8 stay."""
        wanted = jnp.asarray(LOGITS)

        @jax.jit
        def step(logits, state):
            def loss(logits):
                moe = reported(logits, state)
                total = Sparsity().loss(moe, jnp.int32(MASK.sum()), K)
                return 0.5 * jnp.square(logits - wanted).sum() / MASK.sum() + total, moe

            grad, moe = jax.grad(loss, has_aux=True)(logits)
            return logits - 2 * grad, ROUTER.controller.update(state, moe, K), moe.assigned.sum() / MASK.sum()

        logits, state, density = wanted, state_after(0), []
        for _ in range(150):
            logits, state, chosen = step(logits, state)
            density.append(float(chosen))
        assert density[0] > 1.7 * K and np.mean(density[-60:]) == pytest.approx(K, abs=0.15 * K)


class TestRanking:
    """What moves the ranking does nothing where all the positive are taken, and is refused there."""

    ROUTERS = {most: dataclasses.replace(ROUTER, selection=Positive(k=K, most=most)) for most in (None, 3)}

    def chosen(self, most, **fields):
        router = dataclasses.replace(self.ROUTERS[most], **fields)
        keys = jax.random.split(jax.random.key(0), GROUPS)
        given = known(MASK, 3, noise=Noise(keys_B=keys, row_length=SIZE, groups=(GROUPS, SIZE)))
        bias = jnp.linspace(-2, 2, EXPERTS)[None]
        state = bias if router.controller.rows == 1 else None
        decision = decide(jnp.asarray(LOGITS), given, router, state)
        return jax.tree.leaves((decision.pairs, decision.slots))

    @pytest.mark.parametrize("fields", [{"exploration": 1.0}, {"controller": LossFree()}], ids=["exploration", "bias"])
    def test_it_counts_only_with_a_bound(self, fields):
        plain = {"controller": NoController()}
        for most in self.ROUTERS:
            same = all(map(np.array_equal, self.chosen(most, **plain), self.chosen(most, **(plain | fields))))
            assert same == (most is None)
            (name,) = fields
            assert (name in dataclasses.replace(self.ROUTERS[most], **(plain | fields)).unused()) == (most is None)

    def test_what_makes_them_sparse_counts_always(self):
        assert all("controller" not in router.unused() for router in self.ROUTERS.values())

    def test_a_limit_counts_always(self):
        before, after = (self.chosen(None, limit=limit) for limit in (NoLimit(), GroupLimit(groups=4, kept=1)))
        assert not all(map(np.array_equal, before, after))


class TestConfig:
    def test_a_fixed_number_of_experts_cannot_be_controlled(self):
        with pytest.raises(ConfigError, match="selection=positive") as error:
            RouterConfig(selection=TopK(), controller=Sparsity())
        assert error.value.key == "controller"

    @pytest.mark.parametrize("field, value", [("initial", 0.0), ("factor", 1.0)])
    def test_numbers_without_effect_are_refused(self, field, value):
        with pytest.raises(ConfigError) as error:
            Sparsity(**{field: value})
        assert error.value.key == field

    def test_a_limit_below_the_mean_is_refused(self):
        with pytest.raises(ConfigError, match="3 is less than k=4") as error:
            Positive(k=4, most=3)
        assert error.value.key == "most"
