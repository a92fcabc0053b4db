"""What a router learns: every kind of logits against its equations, and what each is made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel, init_caches
from sparsejax.ops.product_key import product_key_top_k
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.document_logits import SequenceLogits
from sparsejax.routers.logits import LOGITS
from sparsejax.routers.projections import Cosine, Linear, ProductKey, grid
from sparsejax.routers.smooth_step import DSelectK, smooth_step

from reference import logits as slow
from support import ONE_DEVICE, assert_close, host_batch, known, on_mesh, put_batch, to_numpy

GROUPS, SIZE, D_MODEL, EXPERTS = 2, 6, 8, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(GROUPS, SIZE, D_MODEL)).astype(np.float32)
DOMAINS = RNG.integers(0, 11, (GROUPS, SIZE)).astype(np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [1, 2, 0, 0, 1, 2]], np.int32)  # a document goes over into the second group


def inputs(**more):
    given = {"domains": jnp.asarray(DOMAINS), "positions": jnp.asarray(POSITIONS)}
    return known(np.ones((GROUPS, SIZE), bool), **(given | more))


def made(entry, seed=0, num_experts=EXPERTS):
    """(arrays by name, function of vectors)."""
    parameters = {n: p[...] for n, p in entry.init(jax.random.key(seed), D_MODEL, num_experts).items()}
    return to_numpy(parameters), lambda x, **more: np.asarray(
        entry(jnp.asarray(x), parameters, inputs(**more), num_experts)
    )


def each_token(function):
    return np.stack([[function(X[g, s], g, s) for s in range(SIZE)] for g in range(GROUPS)]).astype(np.float32)


@pytest.mark.parametrize("name", LOGITS)
def test_the_size_is_that_of_the_parameters(name):
    entry = LOGITS[name]()
    parameters, logits = made(entry)
    assert entry.size(D_MODEL, EXPERTS)[0] == sum(p.size for p in parameters.values())
    assert logits(X).shape == (GROUPS, SIZE, EXPERTS) and logits(X).dtype == np.float32


def test_linear_may_start_from_zero():
    assert (made(Linear(start="zeros"))[0]["weight"] == 0).all() and (made(Linear())[0]["weight"] != 0).any()


class TestCosine:
    def test_against_the_equations(self):
        parameters, logits = made(Cosine(width=3))
        assert_close(logits(X), each_token(lambda x, g, s: slow.cosine(x, parameters, 0.01)), 1e-5)

    def test_a_logit_is_at_most_one_over_the_temperature_and_lengths_do_not_count(self):
        _, logits = made(Cosine(width=1, temperature=0.25))
        np.testing.assert_allclose(np.abs(logits(X)), 4.0, rtol=1e-5)  # in one dimension all directions are ±1
        _, logits = made(Cosine(width=4, temperature=0.25))
        assert np.abs(logits(X)).max() <= 4.0
        assert_close(logits(1000 * X), logits(X), 1e-5)

    def test_the_temperature_stops_at_the_lowest(self):
        entry = Cosine(temperature=0.5, lowest=0.1)
        parameters, _ = made(entry)
        cold = {**parameters, "log_scale": jnp.full((1,), 9.0)}
        value = lambda p: entry(jnp.asarray(X), p, inputs(), EXPERTS)  # noqa: E731
        assert np.abs(value(cold)).max() <= 10.0 + 1e-4 and np.abs(value(cold)).max() > 5.0
        assert jax.grad(lambda p: value(p).max())(cold)["log_scale"] == 0
        assert jax.grad(lambda p: value(p).max())(parameters)["log_scale"] > 0

    def test_a_vector_of_zeros_is_like_nobody_and_has_a_gradient(self):
        entry = Cosine()
        parameters, logits = made(entry)
        assert (logits(0 * X) == 0).all()
        grad = jax.grad(lambda x: entry(x, parameters, inputs(), EXPERTS).sum())(jnp.zeros_like(X))
        assert np.isfinite(grad).all()

    @pytest.mark.parametrize("field, value", [("width", 0), ("lowest", 0.0), ("temperature", 0.005)])
    def test_settings_out_of_range(self, field, value):
        with pytest.raises(ConfigError) as error:
            Cosine(**{field: value})
        assert error.value.key == field


class TestProductKey:
    def test_against_the_equations(self):
        parameters, logits = made(ProductKey(width=4))
        assert parameters["rows"].shape == (2, 2) and parameters["columns"].shape == (2, 3)
        assert_close(logits(X), each_token(lambda x, g, s: slow.product_key(x, parameters)), 1e-5)

    @pytest.mark.parametrize("experts, expected", [(1, (1, 1)), (7, (1, 7)), (16, (4, 4)), (24, (4, 6))])
    def test_the_grid_holds_every_expert_once(self, experts, expected):
        assert grid(experts) == expected

    @pytest.mark.parametrize("rows, columns, k", [(64, 64, 16), (3, 5, 15), (4, 9, 6), (1, 7, 3)])
    @pytest.mark.parametrize("scales", [(1, 1), (1, 100), (100, 1)])  # far apart in one, all k are of the other
    def test_the_best_sums_are_those_of_brute_force(self, rows, columns, k, scales):
        first, second = (
            (scale * RNG.normal(size=(5, n)) ** 3).astype(np.float32)
            for n, scale in zip((rows, columns), scales, strict=True)
        )
        sums = (first[:, :, None] + second[:, None, :]).reshape(5, -1)
        values, indices = to_numpy(jax.jit(product_key_top_k, static_argnums=2)(first, second, k))
        assert np.array_equal(indices, np.argsort(-sums, axis=-1, kind="stable")[:, :k])
        assert np.array_equal(values, np.take_along_axis(sums, indices, axis=-1))

    def test_the_best_experts_of_the_router_are_the_best_sums(self):
        parameters, logits = made(ProductKey(width=4), num_experts=16)
        first, second = np.split(X @ parameters["query"], 2, axis=-1)
        _, experts = product_key_top_k(jnp.asarray(first @ parameters["rows"]), second @ parameters["columns"], 3)
        assert np.array_equal(experts, np.argsort(-logits(X), axis=-1)[..., :3])

    def test_an_odd_query_has_no_halves(self):
        with pytest.raises(ConfigError, match="7 is odd"):
            ProductKey(width=7)


class TestByDomain:
    def test_against_the_equations(self):
        entry = LOGITS["by_domain"](domains=4)
        parameters, logits = made(entry)
        assert_close(logits(X), each_token(lambda x, g, s: slow.by_domain(DOMAINS[g, s], parameters)), 1e-5)

    def test_all_tokens_of_a_domain_have_the_same_experts_whatever_they_are(self):
        _, logits = made(LOGITS["by_domain"]())
        one = logits(X, domains=jnp.full((GROUPS, SIZE), 3))
        assert (one == one[0, 0]).all() and np.array_equal(one, logits(-X, domains=jnp.full((GROUPS, SIZE), 3)))
        assert "jitter" in RouterConfig(logits=LOGITS["by_domain"]()).unused()


POOLS = ("first", "prefix_mean", "mean")


class TestBySequence:
    @pytest.mark.parametrize("pool", POOLS)
    def test_against_the_equations_document_by_document(self, pool):
        parameters, logits = made(SequenceLogits(pool=pool))
        pooled = slow.pooled(X.reshape(-1, D_MODEL).astype(np.float64), POSITIONS.ravel(), pool)
        expected = np.stack([slow.linear(x, parameters) for x in pooled]).reshape(GROUPS, SIZE, EXPERTS)
        assert_close(logits(X), expected.astype(np.float32), 1e-5)

    @pytest.mark.parametrize("pool", POOLS)
    def test_padding_is_pooled_with_nothing(self, pool):
        _, logits = made(SequenceLogits(pool=pool))
        mask = np.ones((GROUPS, SIZE), bool)
        mask[1, 4:] = False  # within the last document
        masked = dataclasses.replace(inputs(), mask=jnp.asarray(mask))
        parameters, _ = made(SequenceLogits(pool=pool))
        entry = SequenceLogits(pool=pool)
        find = lambda x: np.asarray(entry(jnp.asarray(x), parameters, masked, EXPERTS))[mask]  # noqa: E731
        other = np.where(mask[..., None], X, 100)
        assert np.array_equal(find(other), find(X))
        assert pool != "mean" or not np.array_equal(find(X), logits(X)[mask])

    def test_generation_is_refused_in_a_line_that_says_what_cannot_be(self):
        blocks = {"moe": MoESpec(num_experts=4, d_ff=4, router=RouterConfig(logits=SequenceLogits()))}
        config = ModelConfig(d_model=8, num_heads=2, vocab_size=16, pattern=("moe",), repeats=1, blocks=blocks)
        line = (
            "config.model.blocks.moe.router.logits: by_sequence needs the vectors of the whole document, which "
            "generation lacks; such a model can be trained and evaluated"
        )
        with on_mesh(ONE_DEVICE) as mesh:
            with pytest.raises(ConfigError) as error:
                init_caches(config, 2, 6)
            assert str(error.value) == line
            model, batch = LanguageModel(jax.random.key(0), config), put_batch(host_batch(2, 6, 16), mesh)
            assert jax.eval_shape(lambda: model(batch, mode="generate")).logits.shape[:2] == (2, 6)  # whole documents


@pytest.mark.parametrize("name", LOGITS)
def test_logits_need_the_whole_document_exactly_when_they_say_so(name):
    """As when a token goes on from a cache: alone, but at its position."""
    entry = LOGITS[name]()
    parameters, logits = made(entry)
    domains, positions = jnp.asarray(DOMAINS[:1, 4:5]), jnp.asarray(POSITIONS[:1, 4:5])
    alone = known(np.ones((1, 1), bool), domains=domains, positions=positions)
    found = entry(jnp.asarray(X[:1, 4:5]), parameters, alone, EXPERTS)[0, 0]
    assert np.allclose(found, logits(X)[0, 4], rtol=1e-5, atol=1e-6) != entry.traits.whole


class TestDSelectK:
    @pytest.mark.parametrize("num_experts", [1, 2, 5, 6, 8])
    @pytest.mark.parametrize("gamma", [0.5, 4.0])
    def test_against_the_equations(self, num_experts, gamma):
        entry = DSelectK(selectors=3, gamma=gamma)
        parameters = {n: 50 * p / gamma for n, p in made(entry, num_experts=num_experts)[0].items()}
        found = entry(jnp.asarray(X), parameters, inputs(), num_experts)
        assert_close(found, each_token(lambda x, g, s: slow.dselect_k(x, parameters, num_experts, gamma)), 1e-5)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)

    def test_settled_bits_leave_one_expert_a_selector_and_no_gradient(self):
        entry = DSelectK(selectors=2)
        parameters = made(entry)[0]
        settled = parameters | {"codes": 1e6 * parameters["codes"]}
        value = lambda p: entry(jnp.asarray(X), p, inputs(), EXPERTS)  # noqa: E731
        assert ((np.asarray(value(settled)) > 0).sum(-1) <= 2).all() and (np.asarray(value(parameters)) > 0).all()
        grads = [jax.grad(lambda p: (value(p) * jnp.arange(EXPERTS)).sum())(p)["codes"] for p in (settled, parameters)]
        assert (grads[0] == 0).all() and np.abs(grads[1]).max() > 0

    def test_the_step_is_smooth(self):
        slope = jax.vmap(jax.grad(lambda t: smooth_step(t, 2.0)))
        assert smooth_step(jnp.array([-9.0, -1, 0, 1, 9]), 2.0).tolist() == [0, 0, 0.5, 1, 1]
        np.testing.assert_allclose(slope(jnp.array([-1.001, -0.999, 0, 0.999, 1.001])), [0, 0, 0.75, 0, 0], atol=2e-3)

    @pytest.mark.parametrize("field", ["selectors", "gamma"])
    def test_settings_out_of_range(self, field):
        with pytest.raises(ConfigError, match="0 is not positive"):
            DSelectK(**{field: 0})
