"""Balance by importance and load, and by entropies: against the equations, and in the cases they were made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.ops.losses import smooth_load, squared_variation
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.entropy import Entropy
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.noise import Gaussian, Gumbel
from sparsejax.routers.router import decide
from sparsejax.routers.top_k import SecondExpert, TopK
from sparsejax.routers.variation import ImportanceLoad
from sparsejax.routers.weights import Raw

from reference import balance as slow
from reference import routing as slow_routing
from support import assert_close, known

SIZE, EXPERTS, K = 7, 5, 2
RNG = np.random.default_rng(0)
CLEAN, NOISE = RNG.normal(size=(2, SIZE, EXPERTS)).astype(np.float32)
DEVIATION = (0.3 + RNG.random((SIZE, EXPERTS))).astype(np.float32)
NOISY = CLEAN + DEVIATION * NOISE
MASK = np.arange(SIZE) < 6


class Known(Gaussian):
    """Noise whose draws are known."""

    def draw(self, noise, num_experts):
        return jnp.asarray(NOISE)[None]


def measured(balance, *, noisy=True, **settings):
    """`[N, E]` sums over the unmasked tokens."""
    config = RouterConfig(noise=Known(), balance=balance, **settings)
    inputs = known(MASK[None], SIZE, noise=object() if noisy else None, domains=jnp.arange(SIZE)[None] % 3)
    spread = jnp.asarray(DEVIATION)[None] if noisy else None
    decision = decide(jnp.asarray(CLEAN)[None], inputs, config, spread_GSE=spread)
    return np.asarray(decision.measured_GSNE)[0][MASK].sum(0)


def value(balance, rows, tokens=6):
    return float(balance(None, None, jnp.int32(tokens), K, jnp.asarray(rows)))


def softmax(logits):
    return np.stack([slow_routing.score(row.astype(np.float64), "softmax") for row in logits])


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
@pytest.mark.parametrize("others", [True, False])
def test_the_load_is_that_of_the_equations(k, others):
    if others and k == EXPERTS:
        expected = np.ones(CLEAN.shape)  # nobody to beat
    else:
        expected = slow.load_by_chance(*(x.astype(np.float64) for x in (CLEAN, NOISY, DEVIATION)), k, others)
    assert_close(smooth_load(CLEAN, NOISY, DEVIATION, k, others), expected.astype(np.float32), 1e-5)


def test_the_load_is_on_average_how_often_an_expert_is_chosen():
    """Shazeer's; V-MoE's, which an expert can miss by its own luck, is not."""
    draws = 4000
    noisy = CLEAN + DEVIATION * np.random.default_rng(1).normal(size=(draws, SIZE, EXPERTS)).astype(np.float32)
    chosen = (noisy.argsort(-1).argsort(-1) >= EXPERTS - K).mean(0)
    by_chance = {o: np.asarray(smooth_load(CLEAN, noisy, DEVIATION, K, o)).mean(0) for o in (True, False)}
    sigma = np.sqrt(0.25 / draws)
    assert np.abs(by_chance[True] - chosen).max() < 5 * sigma < np.abs(by_chance[False] - chosen).max()
    np.testing.assert_allclose(by_chance[True].sum(), K * SIZE, rtol=0.02)


def test_without_spread_the_load_is_the_count():
    load = np.asarray(smooth_load(CLEAN, CLEAN, np.float32(1e-6) * np.ones_like(CLEAN), K, True))
    assert np.array_equal(load.sum(0), (CLEAN.argsort(-1).argsort(-1) >= EXPERTS - K).sum(0))


class TestImportanceLoad:
    @pytest.mark.parametrize("form", ["shazeer", "vmoe"])
    def test_against_the_equations(self, form):
        balance = ImportanceLoad(form=form, importance=0.3, load=0.2)
        rows, paper = measured(balance), form == "shazeer"
        importance = slow.gates(softmax(NOISY), K) if paper else softmax(CLEAN)
        load = slow.load_by_chance(*(x.astype(np.float64) for x in (CLEAN, NOISY, DEVIATION)), K, paper)
        expected = np.stack([importance[MASK].sum(0), load[MASK].sum(0)])
        assert_close(rows, expected.astype(np.float32), 1e-5)
        loss = 0.3 * slow.squared_variation(expected[0]) + 0.2 * slow.squared_variation(expected[1])
        assert balance.coefficient * (value(balance, rows) - 1) == pytest.approx(loss, rel=1e-4)

    def test_vmoe_load_loss_without_noise_is_left_out_and_not_nan(self):
        """V-MoE's load divides by the deviation of a noise that evaluation does not have."""
        balance = ImportanceLoad(form="vmoe", importance=0.3, load=0.2)
        rows = measured(balance, noisy=False)
        assert rows.shape == (1, EXPERTS)
        expected = 0.3 * slow.squared_variation(softmax(CLEAN)[MASK].sum(0))
        assert balance.coefficient * (value(balance, rows) - 1) == pytest.approx(expected, rel=1e-4)

    def test_load_moves_the_router_though_counts_cannot(self):
        def loss(clean):
            load = smooth_load(clean, clean + DEVIATION * NOISE, DEVIATION, K, True)
            return squared_variation(load.sum(0))

        grad = jax.grad(loss)(jnp.asarray(CLEAN))
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-3

    def test_even_is_one_and_a_unit_without_tokens_nothing(self):
        balance = ImportanceLoad()
        assert value(balance, np.ones((2, EXPERTS), np.float32)) == 1
        assert value(balance, np.zeros((2, EXPERTS), np.float32), tokens=0) == 0
        grad = jax.grad(lambda rows: balance(None, None, jnp.int32(0), K, rows))(jnp.zeros((2, EXPERTS)))
        assert (grad == 0).all()

    @pytest.mark.parametrize("noise", [None, Gumbel()])
    def test_a_load_needs_normal_noise(self, noise):
        settings = {} if noise is None else {"noise": noise}
        with pytest.raises(ConfigError, match="noise=gaussian, learned") as error:
            RouterConfig(balance=ImportanceLoad(), **settings)
        assert error.value.key == "balance"
        assert RouterConfig(balance=ImportanceLoad(load=0.0), **settings).balance.coefficient == 0.005

    def test_nothing_is_no_balance(self):
        with pytest.raises(ConfigError, match="balance = 'none'"):
            ImportanceLoad(importance=0.0, load=0.0)


class TestEntropy:
    @pytest.mark.parametrize("domains, least", [(1, 2.0), (1, None), (3, 4.0)])
    def test_against_the_equations(self, domains, least):
        balance = Entropy(local=0.3, overall=0.2, domains=domains, least=least)
        p, of = softmax(NOISY), np.arange(SIZE) % 3 % domains
        parts = [p[MASK & (of == d)] for d in range(domains)]
        terms = np.mean([slow.entropies(part, EXPERTS if least is None else least) for part in parts], axis=0)
        found = balance.coefficient * (value(balance, measured(balance)) - 1)
        assert found == pytest.approx(0.3 * terms[0] + 0.2 * terms[1], rel=1e-4)

    def test_sure_tokens_that_use_all_experts_are_at_the_best(self):
        balance = Entropy()
        sure = np.stack([np.ones(EXPERTS), np.zeros(EXPERTS)]).astype(np.float32)  # each expert one sure token
        assert value(balance, sure) == pytest.approx(1, abs=1e-6)
        assert value(balance, 0 * sure, tokens=0) == 0

    def test_a_domain_that_is_not_there_counts_for_nothing(self):
        one, two = Entropy(), Entropy(domains=2)
        rows = measured(one)
        absent = np.stack([rows[0], 0 * rows[0], rows[1], 0 * rows[1]])
        assert value(two, absent) == pytest.approx(value(one, rows), rel=1e-6)


class TestFirstChoices:
    def test_are_counted_alone(self):
        balance = LoadBalance(count="first")
        rows = measured(balance, selection=SecondExpert(policy="all"))
        first = np.bincount(NOISY[MASK].argmax(-1), minlength=EXPERTS)
        assert np.array_equal(rows, first[None])
        p = softmax(NOISY)[MASK]
        found = balance(None, jnp.asarray(p.sum(0), jnp.float32), jnp.int32(6), K, jnp.asarray(rows))
        assert float(found) == pytest.approx(slow_routing.balance(first, p, 1), rel=1e-5)

    def test_k_of_one_has_no_others(self):
        logits, inputs = jnp.asarray(CLEAN)[None], known(MASK[None], SIZE)
        settings = {"selection": TopK(k=1), "weight": Raw()}
        decision = decide(logits, inputs, RouterConfig(balance=LoadBalance(count="first"), **settings))
        assert np.array_equal(np.asarray(decision.measured_GSNE)[0, MASK, 0].sum(0), decision.slots.assigned)

    def test_experts_that_choose_have_none(self):
        config = {"selection": ExpertChoice(), "allow_leak": True}
        with pytest.raises(ConfigError, match="nobody's first choice"):
            RouterConfig(balance=LoadBalance(count="first"), **config)
        assert dataclasses.replace(RouterConfig(**config)).balance.count == "all"
