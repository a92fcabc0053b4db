"""Losses of tokens reach the policies that chose their experts, whatever compiles the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.base.structs import Batch
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel
from sparsejax.ops.losses import cross_entropies
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.policy import Policy
from sparsejax.routers.weights import Constant
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.state import abstract_model
from sparsejax.train.step import make_eval_step, make_grads_of_step

from support import ONE_DEVICE, assert_close, host_batch, host_params, on_mesh, put_batch, put_params, to_numpy

ROWS, LENGTH, VOCAB = 8, 6, 16
POLICY = Policy(coefficient=0.5, baseline=0.3, entropy=0.2)
BALANCE = LoadBalance(coefficient=0.1, scope="sequence")
STEP = 3
ARRAYS = host_batch(ROWS, LENGTH, VOCAB)


def experiment(shape=ONE_DEVICE, accumulation=1, **fields):
    """A layer of its own, and two stacked ones."""
    router = RouterConfig(selection=POLICY, weight=Constant(), balance=BALANCE, z_loss=0.0)
    spec = MoESpec(num_experts=4, d_ff=8, capacity_factor=0.75, router=router)
    layers = {"prefix": ("policy",), "pattern": ("policy",), "repeats": 2, "blocks": {"policy": spec}}
    return ExperimentConfig(
        model=ModelConfig(d_model=8, num_heads=2, vocab_size=VOCAB, **layers, **fields),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]),
        train=TrainConfig(accumulation=accumulation),
    )


@functools.cache
def parameters():
    """On the host, with baselines that expect something."""
    rng = np.random.default_rng(0)
    params = host_params(lambda key: LanguageModel(key, experiment().model))
    flat = {
        path: leaf.replace(rng.normal(size=leaf.shape).astype(np.float32)) if "router" in path else leaf
        for path, leaf in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(flat)


@functools.cache
def step(shape=ONE_DEVICE, accumulation=1, **fields):
    """((loss, (nll, correct, terms, reports, exits)), gradients)."""
    config = experiment(shape, accumulation, **fields)
    with on_mesh(shape) as mesh:
        grads_of_step = jax.jit(make_grads_of_step(config))
        state = put_params(parameters(), mesh), nnx.State({})
        found, grads = grads_of_step(*state, shard_batch(ARRAYS, mesh, accumulation), jnp.int32(STEP))
        return to_numpy((found, grads.dense))


@functools.cache
def given_advantages():
    """`(advantages by position) -> (choices by position, cross entropies, gradients of the cross entropy alone, and of
    all, advantages being numbers)`."""
    config = experiment()
    targets, tokens = ARRAYS["loss_mask"].sum(), (ARRAYS["segments"] > 0).sum()
    with on_mesh(ONE_DEVICE):
        graph, _, _ = abstract_model(config.model)

    @jax.jit
    def call(params, batch, advantages):
        key = jax.random.fold_in(jax.random.key(config.train.seed), STEP)

        def losses(params):
            out = nnx.merge(graph, params)(batch, mode="train", key=key)
            nll_BT, learnt = cross_entropies(out.logits, batch.targets, batch.loss_mask), jnp.float32(0)
            choices = {position: report.moe.choices for position, report in out.reports.items()}
            for position, each in choices.items():
                advantage, entropy = advantages[position], out.reports[position].moe.entropy_sum.sum()
                learnt -= POLICY.coefficient * (advantage * each.log_probability).sum() / targets
                learnt -= POLICY.baseline * 2 * (advantage * each.baseline).sum() / targets
                learnt -= POLICY.entropy * entropy / tokens
                learnt += BALANCE.coefficient * out.reports[position].moe.balance_sum.sum() / ROWS
            return (nll_BT.sum() / targets, learnt), (choices, nll_BT)

        (nll, _), pull, (choices, nll_BT) = jax.vjp(losses, params, has_aux=True)
        one, none = jnp.ones_like(nll), jnp.zeros_like(nll)
        return choices, nll_BT, pull((one, none))[0], pull((one, one))[0]

    def run(advantages):
        with on_mesh(ONE_DEVICE) as mesh:
            return to_numpy(call(put_params(parameters(), mesh), put_batch(ARRAYS, mesh), advantages))

    return run


@functools.cache
def explained():
    """(advantages of the step, what `given_advantages` makes of them)."""
    none = {"prefix_0": np.zeros((ROWS, LENGTH)), "pattern_0": np.zeros((2, ROWS, LENGTH))}
    choices, nll_BT, *_ = given_advantages()(jax.tree.map(np.float32, none))
    found = {p: np.where(ARRAYS["loss_mask"], -nll_BT - each.baseline, 0) for p, each in choices.items()}
    return found, given_advantages()(found)


def test_cross_entropy_alone_leaves_the_routers_alone():
    _, (_, _, of_nll, _) = explained()
    for path, leaf in nnx.to_flat_state(of_nll):
        assert ("router" in path) == (np.abs(leaf[...]).max() == 0), path


def test_the_terms_are_those_of_the_losses_of_tokens():
    advantages, (choices, nll_BT, _, _) = explained()
    _, (nll, _, terms, *_) = step()[0]
    targets = ARRAYS["loss_mask"].sum()
    policy = sum((-advantages[p] * choices[p].log_probability).sum() for p in choices)
    error = sum(np.square(advantages[p]).sum() for p in choices)
    np.testing.assert_allclose(nll, nll_BT.sum() / targets, rtol=1e-5)
    np.testing.assert_allclose(terms["policy"], POLICY.coefficient * policy / targets, rtol=1e-5)
    np.testing.assert_allclose(terms["baseline"], POLICY.baseline * error / targets, rtol=1e-5)
    assert terms["entropy"] < 0
    np.testing.assert_allclose(step()[0][0], nll + sum(terms.values()), rtol=1e-6)


def test_the_gradient_is_that_of_fixed_advantages():
    _, (_, _, _, of_all) = explained()
    assert_close(step()[1], of_all)
    assert all(np.abs(leaf[...]).max() > 0 for path, leaf in nnx.to_flat_state(of_all) if "router" in path)


@pytest.mark.parametrize(
    "setting",
    [
        {"scan": False, "remat": "full"},
        {"shape": (2, 2, 2), "accumulation": 2},
    ],
    ids=str,
)
def test_however_it_is_compiled(setting):
    assert_close(step(**setting), step())


def test_reports_that_are_added_hold_sums_alone():
    """In evaluation, too; and a model without a policy never holds anything else."""
    with on_mesh(ONE_DEVICE) as mesh:
        variables = put_params(parameters(), mesh)
        batch = shard_batch(ARRAYS, mesh, 1)
        state = type("Variables", (), {"params": variables, "model_state": nnx.State({})})
        report = jax.eval_shape(lambda arrays: make_eval_step(experiment())(state, arrays), batch)
        plain = ModelConfig(d_model=8, num_heads=2, vocab_size=VOCAB)
        model = lambda batch: LanguageModel(jax.random.key(0), plain)(batch, mode="train").reports  # noqa: E731
        reports = jax.eval_shape(model, Batch(**{name: rows[0] for name, rows in batch.items()}))
    for each in (report.reports["pattern_0"].moe, report.reports["prefix_0"].moe, reports["pattern_1"].moe):
        assert each.choices is None
    assert report.reports["pattern_0"].moe.policy_sum.shape == (2,)
    assert reports["pattern_1"].moe.policy_sum is None


def test_the_report_of_a_step_is_settled():
    for position, layers in (("prefix_0", ()), ("pattern_0", (2,))):
        moe = step()[0][1][3][position].moe
        assert moe.choices is None and moe.policy_sum.shape == moe.baseline_sum.shape == layers
        assert np.array_equal(moe.assigned, moe.processed + moe.dropped) and moe.dropped.sum() > 0
