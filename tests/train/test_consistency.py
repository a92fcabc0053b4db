"""Two passes that draw apart, and the price of their disagreement (THOR, arXiv:2110.04260)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import TRAINING, forward_flops
from sparsejax.model.lm import LanguageModel
from sparsejax.ops.losses import symmetric_kls
from sparsejax.routers.presets import thor
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.metrics import Window
from sparsejax.train.optimizer import AdamW
from sparsejax.train.state import abstract_state, make_optimizer
from sparsejax.train.step import make_grads_of_step, make_train_step

from reference.consistency import symmetric_kl
from support import ONE_DEVICE, assert_close, host_batch, host_params, on_mesh, put_params, to_numpy

ROWS, LENGTH, VOCAB, EXPERTS = 8, 6, 16, 4
ARRAYS = host_batch(ROWS, LENGTH, VOCAB)


def experiment(consistency, block="thor", shape=ONE_DEVICE, accumulation=1):
    blocks = {"thor": MoESpec(num_experts=EXPERTS, d_ff=8, router=thor()), "dense": DenseSpec(d_ff=8)}
    layers = {"pattern": (block,), "repeats": 2, "blocks": blocks}
    return ExperimentConfig(
        model=ModelConfig(d_model=8, num_heads=2, vocab_size=VOCAB, **layers),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]),
        train=TrainConfig(consistency=consistency, accumulation=accumulation),
        optimizer=AdamW(),
    )


@functools.cache
def parameters(block, alike=False):
    """On the host; `alike` experts are all the first one."""
    params = host_params(lambda key: LanguageModel(key, experiment(None, block).model))
    flat = nnx.to_flat_state(params)
    same = lambda leaf: leaf.replace(np.tile(leaf[...][:, :1], (1, EXPERTS, 1, 1)))  # noqa: E731
    return nnx.from_flat_state([(path, same(leaf) if alike and "experts" in path else leaf) for path, leaf in flat])


@functools.cache
def step(consistency, block="thor", shape=ONE_DEVICE, accumulation=1, alike=False):
    """((loss, (nll, correct, terms, reports, exits)), gradients)."""
    config = experiment(consistency, block, shape, accumulation)
    with on_mesh(shape) as mesh:
        grads_of_step = jax.jit(make_grads_of_step(config))
        state = put_params(parameters(block, alike), mesh), nnx.State({})
        found, grads = grads_of_step(*state, shard_batch(ARRAYS, mesh, accumulation), jnp.int32(0))
        return to_numpy((found, grads.dense))


def test_the_divergence_against_the_equation():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, True]])
    expected = sum(symmetric_kl(left[b, t], right[b, t]) for b, t in np.argwhere(mask))
    assert_close(symmetric_kls(left, right, mask).sum(), np.float32(expected))


def test_without_draws_it_is_twice_the_plain_loss():
    """And the experts agree with themselves: the coefficient changes nothing."""
    (plain, (nll, *_)), gradients = step(None, "dense")
    (loss, (mean, _, terms, *_)), twice = step(3.0, "dense")
    np.testing.assert_allclose((loss, mean, terms["second_pass"]), (2 * plain, nll, nll), rtol=1e-6)
    assert abs(terms["consistency"]) < 1e-6
    assert_close(twice, jax.tree.map(lambda leaf: 2 * leaf, gradients))


def test_experts_that_are_alike_agree_and_others_do_not():
    (_, (nll, _, alike, report, _)), _ = step(2.0, alike=True)
    (_, (_, _, terms, *_)), _ = step(2.0)
    np.testing.assert_allclose(alike["second_pass"], nll, rtol=1e-6)
    assert abs(alike["consistency"]) < 1e-6 < 1e-3 < terms["consistency"]
    assert (report["pattern_0"].moe.assigned > 0).sum() > 2, "the passes drew apart"


@pytest.mark.slow
def test_the_coefficient_multiplies_the_disagreement_alone():
    (loss, (nll, _, terms, *_)), _ = step(2.0)
    (without, (same, _, none, *_)), _ = step(0.0)
    assert none["consistency"] == 0 and nll == same
    np.testing.assert_allclose(loss - terms["consistency"], without, rtol=1e-6)
    np.testing.assert_allclose(loss, nll + sum(terms.values()), rtol=1e-6)


@pytest.mark.parametrize("shape, accumulation", [((2, 2, 2), 2)])
def test_meshes_and_accumulation_change_nothing(shape, accumulation):
    (loss, (nll, _, terms, *_)), gradients = step(2.0, shape=shape, accumulation=accumulation)
    (whole, (mean, _, parts, *_)), expected = step(2.0)
    assert_close((loss, nll, terms, gradients), (whole, mean, parts, expected))


def test_tokens_count_once_and_work_twice():
    config, real = experiment(1.0), ARRAYS["segments"] > 0
    with on_mesh(ONE_DEVICE) as mesh:
        tx = make_optimizer(config)
        zeros = lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec)  # noqa: E731
        state = jax.tree.map(zeros, abstract_state(config, tx, mesh))
        _, report = jax.jit(make_train_step(config, tx))(state, shard_batch(ARRAYS, mesh, 1))
    keys = np.where(real, ARRAYS["positions"] + 1, 0).sum()
    once = forward_flops(config.model, real.sum(), keys)
    assert Window(config.model).add(report) == (real.sum(), 2 * TRAINING * once)


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ConfigError, match="negative") as error:
        TrainConfig(consistency=-1.0)
    assert error.value.key == "consistency"
