"""Dense blocks of which most neurons are silent: the equation, what is reported, and that neither scan, mesh nor tokens
that have left change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.skim_methods import Schedule
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import total
from sparsejax.model.heads import Classes
from sparsejax.model.lm import LanguageModel
from sparsejax.ops.ffn import ACTIVATIONS, statistical_top_k
from sparsejax.train.metrics import layer_metrics

from reference import neurons as slow
from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

SHARE, ROWS, LENGTH = 0.25, 4, 16


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class TestThreshold:
    def test_against_the_equation(self):
        z = random(3, 40) * 2 + 1
        expected = np.stack([slow.statistical_top_k(row.astype(np.float64), SHARE) for row in z])
        assert_close(statistical_top_k(jnp.asarray(z), SHARE), expected.astype(np.float32))

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
    def test_so_many_of_normal_values_are_above_it(self, share):
        active = statistical_top_k(jnp.asarray(random(64, 4096)), share) > 0
        assert float(active.mean()) == pytest.approx(share, abs=0.005)

    def test_equal_values_have_a_finite_gradient(self):
        grad = jax.grad(lambda z: statistical_top_k(z, SHARE).sum())(jnp.ones((2, 8)))
        assert np.isfinite(grad).all()

    def test_silent_neurons_stay_silent(self):
        assert all(float(act(jnp.zeros(()))) == 0 for act in ACTIVATIONS.values())


def model(gated=True, scan=True, active=SHARE, **more):
    dense = DenseSpec(d_ff=24, gated=gated, active=active)
    kind = {"d_model": 16, "num_heads": 2, "vocab_size": 32, "pattern": ("dense",), "repeats": 2}
    return ModelConfig(**kind, blocks={"dense": dense}, scan=scan, **more)


@functools.cache
def params(gated):
    return host_params(lambda key: LanguageModel(key, model(gated)))


def outcome(config, gated, shape=ONE_DEVICE):
    """(logits, reports, gradients of the loss)."""
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: LanguageModel(key, config))

        @jax.jit
        def run(params, batch):
            def loss(params):
                lm = nnx.merge(graph, params)
                out = lm(batch, mode="train", key=jax.random.key(0))
                return lm.losses([out], batch).total, (out.logits, out.reports)

            (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return *found, grads

        batch = put_batch(host_batch(ROWS, LENGTH), mesh)
        return to_numpy(run(put_params(params(gated), mesh), batch))


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_is_the_equation_token_by_token(gated):
    x, spec = random(2, 3, 16), model(gated).blocks["dense"]
    with on_mesh(ONE_DEVICE) as mesh:
        block = spec.build(jax.random.key(1), dataclasses.replace(model(gated), num_heads=4))
        batch = put_batch(host_batch(2, 3, padded=1), mesh)
        with jax.default_matmul_precision("highest"):
            y, report = block.feed_forward(jnp.asarray(x), Context(batch=batch, mode="train"))
        mlp = block.feed_forward.mlp
        weights = [
            None if w is None else np.asarray(w.weight[...], np.float64) for w in (mlp.w_in, mlp.w_out, mlp.w_gate)
        ]
    each = [slow.feed_forward(token.astype(np.float64), *weights, SHARE) for token in x.reshape(-1, 16)]
    assert_close(y.reshape(-1, 16), np.stack([out for out, _ in each]).astype(np.float32))
    real = np.asarray(batch.segments).reshape(-1) > 0
    assert report.tokens == real.sum()
    np.testing.assert_allclose(report.active_sum, np.sum([share for _, share in each], where=real), rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_once_or_unrolled(gated):
    scanned, unrolled = outcome(model(gated), gated), outcome(model(gated, scan=False), gated)
    assert_close(unrolled, scanned, 2e-5, atol=1e-7)
    reported = layer_metrics(model(gated), scanned[1], "train")["neurons/active_fraction"]
    assert 0.1 < reported < 0.5


def test_on_a_mesh():
    """The width of the network is split over `tensor`: the threshold is that of all of it."""
    assert_close(outcome(model(), True, (2, 2, 2)), outcome(model(), True), 5e-5, atol=1e-7)


def test_of_tokens_that_are_left():
    kind = {"causal": False, "head": Classes(classes=3)}
    skim = {"shares": (0.6, 0.3), "ladder": (0.7, 0.5), "stage": "hard"}
    given = host_batch(ROWS, LENGTH, documents=1)
    first = np.arange(LENGTH) == 0
    given |= {"targets": given["targets"] % 3, "loss_mask": (given["positions"] == 0) & first}
    found = {}
    for execution in ("masked", "compact"):
        config = model(scan=False, skim=Schedule(**skim, execution=execution), **kind)
        variables = host_params(lambda key: LanguageModel(key, config))
        with on_mesh(ONE_DEVICE) as mesh:
            lm = nnx.merge(graph_of(lambda key: LanguageModel(key, config)), put_params(variables, mesh))
            out = lm(put_batch(given, mesh), mode="eval")
            found[execution] = to_numpy((out.logits, [report.neurons for report in out.reports.values()]))
    assert_close(found["compact"], found["masked"], 2e-5)


def test_silent_neurons_cost_what_active_ones_do():
    assert total(model()) == total(model(active=None))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_shares_that_make_no_sense(share):
    with pytest.raises(ConfigError) as error:
        DenseSpec(active=share)
    assert error.value.key == "active"
