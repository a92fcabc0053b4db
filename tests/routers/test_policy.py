"""A router that draws its experts, and how it learns from what they returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.assignment import by_token
from sparsejax.ops.losses import reinforce_sums
from sparsejax.routers.balance import NoBalance
from sparsejax.routers.candidates import Noise
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.policy import Policy
from sparsejax.routers.presets import rl_r, routing_network
from sparsejax.routers.reinforce import Reinforce
from sparsejax.routers.router import decide
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Constant

from reference import policy as slow
from support import ONE_DEVICE, assert_close, candidates, host_batch, known, on_mesh, put_batch, to_numpy

MANY = 20_000
RNG = np.random.default_rng(0)


def noise(length, seed=0):
    """For one row of so many tokens."""
    return Noise(keys_B=jax.random.split(jax.random.key(seed), 1), row_length=length, groups=(1, length))


def drawn(scores_E, limit=None, noise=None, length=MANY):
    """(experts, pair scores) of so many equal tokens."""
    some = candidates(np.tile(np.asarray(scores_E, np.float32), (1, length, 1)), noise=noise)
    if limit is not None:
        some = type(some)(logits=some.logits, scores=some.scores, ranking=limit(some.ranking), inputs=some.inputs)
    pairs = Policy()(some)
    return np.asarray(by_token(pairs.expert, pairs))[0, :, 0], np.asarray(by_token(pairs.weight, pairs))[0, :, 0]


class TestDraws:
    def test_experts_are_drawn_from_the_scores_over_their_sum(self):
        scores = np.array([0.1, 0.6, 0.0, 0.5])
        experts, weights = drawn(scores, noise=noise(MANY))
        pi = scores / scores.sum()
        found = np.bincount(experts, minlength=4) / MANY
        assert (np.abs(found - pi) <= 4 * np.sqrt(pi * (1 - pi) / MANY)).all()
        np.testing.assert_allclose(weights, pi[experts], rtol=1e-6)

    def test_what_a_limit_excludes_is_never_drawn_and_has_no_part_in_the_policy(self):
        scores = np.array([0.4, 0.3, 0.1, 0.2])
        experts, weights = drawn(scores, GroupLimit(groups=2, kept=1, best=1), noise(MANY))
        assert set(experts.tolist()) == {0, 1}
        np.testing.assert_allclose(weights, (scores[:2] / 0.7)[experts], rtol=1e-6)

    def test_without_noise_the_likeliest_is_taken_and_of_equals_the_first(self):
        assert set(drawn([0.2, 0.5, 0.3], length=3)[0]) == {1}
        assert set(drawn([0.2, 0.4, 0.4], length=3)[0]) == {1}


class TestReinforce:
    def test_against_the_equations(self):
        rows, length, experts = 2, 5, 3
        logits = RNG.normal(size=(rows, length, experts)).astype(np.float32)
        rewards, baselines = RNG.normal(size=(2, rows, length)).astype(np.float32)
        actions, mask = RNG.integers(0, experts, (rows, length)), RNG.random((rows, length)) < 0.7

        def sums(logits, baselines, rewards):
            log_pi = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]
            return reinforce_sums(log_pi, baselines, rewards, mask)

        flat = lambda array: np.asarray(array, array.dtype).reshape(rows * length, *array.shape[2:])  # noqa: E731
        operands = [flat(each).astype(np.float64) for each in (logits, rewards, baselines)]
        policy, error, of_logits, of_baselines = slow.reinforce(
            operands[0], flat(actions), operands[1], operands[2], flat(mask)
        )
        assert_close(sums(logits, baselines, rewards), (np.float32(policy), np.float32(error)))
        of_policy = jax.grad(lambda *values: sums(*values)[0], argnums=(0, 1, 2))(logits, baselines, rewards)
        of_error = jax.grad(lambda *values: sums(*values)[1], argnums=(0, 1, 2))(logits, baselines, rewards)
        assert_close(of_policy[0], of_logits.reshape(logits.shape).astype(np.float32))
        assert_close(of_error[1], of_baselines.reshape(rewards.shape).astype(np.float32))
        for nothing in (*of_policy[1:], of_error[0], of_error[2]):
            assert (np.asarray(nothing) == 0).all()

    @pytest.mark.parametrize("baseline", [0.0, -2.6], ids=["no baseline", "baseline"])
    def test_the_estimate_of_a_bandit_is_the_policy_gradient(self, baseline):
        """Two experts with known rewards: E[estimate] = −∂/∂ℓ Σ_a π(a) r(a), whatever the baseline."""
        estimates, exact = bandit(baseline)
        error = estimates.std(0) / np.sqrt(MANY)
        assert (np.abs(estimates.mean(0) - exact) <= 4 * error).all()
        assert (np.abs(exact) > 20 * error).all(), "else anything would pass"

    def test_a_baseline_takes_variance_away(self):
        assert (bandit(-2.6)[0].var(0) < 0.1 * bandit(0.0)[0].var(0)).all()

    def test_the_expected_reward_has_no_gradient_in_what_it_is_expected_of(self):
        x = RNG.normal(size=(1, 4, 3)).astype(np.float32)
        parameters = {"baseline_weight": jnp.array([1.0, -2.0, 0.5]), "baseline_bias": jnp.float32(0.3)}
        learner = Reinforce(policy=1.0, baseline=1.0, entropy=0.0)
        expected = x @ np.array([1.0, -2.0, 0.5], np.float32) + np.float32(0.3)
        assert_close(learner.expected(x, parameters), expected, 1e-6)
        grad_x, grads = jax.grad(lambda x, p: learner.expected(x, p).sum(), argnums=(0, 1))(x, parameters)
        assert (np.asarray(grad_x) == 0).all()
        assert_close(grads["baseline_weight"], x.sum((0, 1)))
        assert {name: v.shape for name, v in learner.init(3).items()} == {k: v.shape for k, v in parameters.items()}


def bandit(baseline):
    """(one estimate of the gradient in the two logits from each draw, the exact gradient)."""
    logits, rewards = np.array([0.3, -0.2], np.float32), np.array([-2.0, -3.5], np.float32)
    router = RouterConfig(selection=Policy(), weight=Constant(), balance=NoBalance(), z_loss=0.0)
    inputs = known(np.ones((1, MANY), bool), MANY, noise=noise(MANY))

    @jax.grad
    def estimate(logits_GSE):
        decision = decide(logits_GSE, inputs, router, baseline_GS=jnp.full((1, MANY), baseline))
        experts = by_token(decision.pairs.expert, decision.pairs)[..., 0]
        choices, everyone = decision.choices, jnp.ones((1, MANY), bool)
        assert choices is not None
        return reinforce_sums(choices.log_probability, choices.baseline, jnp.asarray(rewards)[experts], everyone)[0]

    estimates = np.asarray(jax.jit(estimate)(jnp.tile(logits, (1, MANY, 1))))[0].astype(np.float64)
    pi = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    return estimates, -pi * (rewards - pi @ rewards)


class TestPass:
    """The action of routing networks that leaves a token as it is: an expert whose output is 0, beside a pool."""

    SPEC = MoESpec(num_experts=3, zero_experts=1, pooled=True, d_ff=6, router=routing_network())
    BACKBONE = ModelConfig(d_model=8, num_heads=2)

    def test_who_passes_gets_nothing_takes_no_slot_and_is_learnt_from(self):
        x = jnp.asarray(RNG.normal(size=(4, 6, 8)), jnp.float32)
        with on_mesh(ONE_DEVICE) as mesh:
            layer = MoELayer(jax.random.key(0), self.BACKBONE, self.SPEC)
            pool = self.SPEC.build_pool(jax.random.key(1), self.BACKBONE)
            batch = put_batch(host_batch(4, 6, padded=0), mesh)
            graph, params = nnx.split(layer)

            def learnt(params):
                context = Context(batch=batch, mode="train", key=jax.random.key(2), record=True, pool=pool)
                y, moe = nnx.merge(graph, params)(x, context)
                passes = moe.decisions.experts[..., 0] == 3
                return jnp.where(passes, moe.choices.log_probability, 0).sum(), (y, moe, passes)

            grads, (y, moe, passes) = to_numpy(jax.jit(jax.grad(learnt, has_aux=True))(params))
        assert 0 < passes.sum() < passes.size
        assert (y[passes] == 0).all() and (y[moe.decisions.kept[..., 0] & ~passes] != 0).any(-1).all()
        assert moe.assigned.shape == (4,) and moe.assigned[3] == moe.processed[3] == passes.sum()
        assert moe.assigned.sum() == passes.size and moe.slots % 3 == 0
        assert np.abs(grads["router"]["weight"][...]).max() > 0


class TestConfig:
    def test_a_constant_weight_goes_with_a_policy_and_not_with_ranking(self):
        assert rl_r().learned
        with pytest.raises(ConfigError, match="policy"):
            RouterConfig(selection=TopK(k=2), weight=Constant())

    def test_wrong_coefficients(self):
        for field in ("coefficient", "baseline"):
            with pytest.raises(ConfigError, match="is not positive"):
                Policy(**{field: 0.0})
        with pytest.raises(ConfigError, match="negative"):
            Policy(entropy=-1.0)

    def test_parameters_are_counted(self):
        parameters = rl_r().init(jax.random.key(0), 8, 4)
        assert sum(value.size for value in parameters.values()) == rl_r().size(8, 4)[0] == 8 * 4 + 8 + 1
