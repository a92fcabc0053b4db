"""What is random in training beside the noise on logits: its frequencies, and that nothing else moves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.assignment import by_token
from sparsejax.routers.candidates import Noise
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.exploration import drop_inputs, explore, jitter, mask_outputs
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.plans import Sinkhorn
from sparsejax.routers.router import decide
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw

from support import ONE_DEVICE, assert_close, host_batch, known, moe_layer_params, moe_layer_runner

ROWS, LENGTH, EXPERTS = 40, 50, 8


def noise(seed=0, rows=ROWS):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    return Noise(keys_B=keys, row_length=LENGTH, groups=(rows, LENGTH))


def close_to(share, expected, draws):
    return abs(share - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


class TestJitter:
    def test_is_within_bounds_centred_and_a_rows_own(self):
        x = jnp.ones((4, 50, 20))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(4))
        draw = lambda x, keys: np.asarray(jitter(x, Noise(keys_B=keys, row_length=50, groups=x.shape[:2]), 0.1))  # noqa: E731
        noise = draw(x, keys)
        assert noise.min() >= 0.9 and noise.max() <= 1.1 and noise.max() - noise.min() > 0.19
        np.testing.assert_allclose(noise.mean(), 1.0, atol=4 * 0.2 / math.sqrt(12 * noise.size))
        alone = draw(x[2:3], keys[2:3])
        assert np.array_equal(alone[0], noise[2]) and not np.array_equal(noise[1], noise[2])

    def test_none_or_zero_leaves_the_input_alone(self):
        x = jnp.ones((2, 3, 4))
        assert jitter(x, None, 0.5) is x
        keys = jax.random.split(jax.random.key(0), 2)
        assert jitter(x, Noise(keys_B=keys, row_length=3, groups=(2, 3)), 0.0) is x


class TestInputDropout:
    def test_a_share_is_zero_and_the_mean_stays(self):
        x = np.asarray(drop_inputs(jnp.ones((ROWS, LENGTH, 10)), noise(), 0.2))
        assert set(np.unique(x).tolist()) == {0.0, 1.25} and close_to((x == 0).mean(), 0.2, x.size)

    def test_none_or_zero_leaves_the_input_alone(self):
        x = jnp.ones((2, 3, 4))
        assert drop_inputs(x, None, 0.5) is x and drop_inputs(x, noise(), 0.0) is x


class TestExploration:
    LOGITS = (2 * np.random.default_rng(0).normal(size=(ROWS, LENGTH, EXPERTS))).astype(np.float32)

    def decided(self, share, training=True, **fields):
        config = RouterConfig(selection=TopK(k=1), weight=Raw(), exploration=share, **fields)
        inputs = known(np.ones((ROWS, LENGTH), bool), LENGTH, training=training, noise=noise() if training else None)
        pairs = jax.jit(lambda x: decide(x, inputs, config).pairs)(jnp.asarray(self.LOGITS))
        return [np.asarray(by_token(values, pairs))[..., 0] for values in (pairs.expert, pairs.weight)]

    def test_a_token_is_as_likely_to_explore_as_was_said(self):
        """An explorer finds its best expert by chance, one time in E."""
        expert, _ = self.decided(0.4)
        astray = (expert != self.LOGITS.argmax(-1)).mean()
        assert close_to(astray, 0.4 * (1 - 1 / EXPERTS), ROWS * LENGTH)

    def test_all_experts_are_equally_likely_to_an_explorer(self):
        expert, _ = self.decided(1.0)
        shares = np.bincount(expert.ravel(), minlength=EXPERTS) / expert.size
        assert all(close_to(share, 1 / EXPERTS, expert.size) for share in shares)

    def test_the_weight_is_the_score_of_whoever_was_chosen(self):
        expert, weight = self.decided(0.5)
        scores = np.asarray(jax.nn.softmax(self.LOGITS, axis=-1))
        assert_close(weight, np.take_along_axis(scores, expert[..., None], axis=-1)[..., 0], 1e-6)

    def test_evaluation_does_not_explore(self):
        expert, _ = self.decided(1.0, training=False)
        assert np.array_equal(expert, self.LOGITS.argmax(-1))

    def test_a_ranking_is_shuffled_within_its_token(self):
        shuffled = np.asarray(explore(jnp.asarray(self.LOGITS), noise(), 1.0))
        assert np.array_equal(np.sort(shuffled, axis=-1), np.sort(self.LOGITS, axis=-1))

    def test_an_explorer_takes_distinct_experts_and_keeps_to_the_limit(self):
        config = RouterConfig(selection=TopK(k=2), exploration=1.0, limit=GroupLimit(groups=4, kept=1, best=1))
        inputs = known(np.ones((ROWS, LENGTH), bool), LENGTH, noise=noise())
        pairs = decide(jnp.asarray(self.LOGITS), inputs, config).pairs
        experts = np.asarray(by_token(pairs.expert, pairs))
        assert (experts[..., 0] != experts[..., 1]).all() and (experts[..., 0] // 2 == experts[..., 1] // 2).all()

    def test_where_no_ranking_is_read_it_has_no_effect(self):
        plan = RouterConfig(selection=Sinkhorn(), weight=Raw(), allow_leak=True)
        table = RouterConfig(selection=Hash(), weight=Raw())
        assert "exploration" in plan.unused() and "exploration" in table.unused()
        assert "exploration" not in RouterConfig().unused()


class TestOutputMasking:
    BACKBONE = ModelConfig(d_model=8, num_heads=2)
    SPEC = MoESpec(num_experts=4, d_ff=6, capacity_factor=4.0, shared_experts=0)

    def test_whole_tokens_get_nothing_and_the_mean_stays(self):
        y = np.asarray(mask_outputs(jnp.ones((ROWS, LENGTH, 10)), noise(), 0.2))
        assert (y == y[..., :1]).all(), "a token is masked as a whole"
        assert set(np.unique(y).tolist()) == {0.0, 1.25} and close_to((y[..., 0] == 0).mean(), 0.2, ROWS * LENGTH)

    def test_in_a_layer_of_which_evaluation_is_untouched(self):
        masking = dataclasses.replace(self.SPEC, router=RouterConfig(output_masking=0.5))
        params, arrays = moe_layer_params(self.SPEC, self.BACKBONE), host_batch(4, 8, padded=0)
        x = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
        run = moe_layer_runner(masking, self.BACKBONE, ONE_DEVICE)
        plain, _ = moe_layer_runner(self.SPEC, self.BACKBONE, ONE_DEVICE)(params, x, arrays)
        y, moe = run(params, x, arrays, key=jax.random.key(0))
        masked = (y == 0).all(-1)
        assert 0 < masked.mean() < 1 and moe.processed.sum() == moe.assigned.sum()
        assert_close(y[~masked], 2 * plain[~masked])
        assert np.array_equal(run(params, x, arrays, mode="eval")[0], run(params, x, arrays)[0])


@pytest.mark.parametrize("field, value", [("input_dropout", 1.0), ("output_masking", -0.1), ("exploration", 1.1)])
def test_what_is_no_probability_is_refused(field, value):
    with pytest.raises(ConfigError, match=str(value)) as error:
        RouterConfig(**{field: value})
    assert error.value.key == field
