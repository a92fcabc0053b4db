"""Budgets of methods that learn which tokens leave: what they count, their losses over microbatches and meshes, the
price of a hard one, and that who asks for a share of the FLOPs gets it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.config import load
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import to_host
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.blocks import budgets
from sparsejax.blocks.budgets import BUDGETS, HardBudget, Spending
from sparsejax.blocks.skim import SkimmedBlock
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import train_rows
from sparsejax.model.cost import spared_work
from sparsejax.model.lm import layer_reports
from sparsejax.ops.skim import Survivors
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import layer_metrics
from sparsejax.train.state import init_state, make_optimizer
from sparsejax.train.step import make_eval_step, make_grads_of_step, make_train_step

from reference.budgets import flops_share, kl_of_depths
from support import ONE_DEVICE, assert_close, to_numpy

ROWS, LAYERS = 8, 2
CONFIG = {
    "data.name": "synthetic",
    "data.sequence_length": "32",
    "data.batch_size": str(ROWS),
    "data.task": "classify",
    "data.task.classes": "3",
    "model.d_model": "16",
    "model.num_heads": "2",
    "model.vocab_size": "260",
    "model.pattern": "(dense,)",
    "model.repeats": str(LAYERS),
    "model.causal": "false",
    "model.head": "classes",
    "model.head.classes": "3",
    "optimizer.learning_rate": "0.003",
}
METHODS = {
    "ltp": {"model.skim.threshold": "0.03", "model.skim.temperature": "0.002"},
    "power_bert": {"model.skim.rate": "30.0"},
    "transkimmer": {"model.skim.bias": "0.5"},
}


def experiment(method="ltp", budget="hard", **more):
    given = {"model.skim": method, "model.skim.budget": budget} | METHODS[method] | more
    return load(ExperimentConfig, None, list((CONFIG | given).items())).config


class Run:
    """A config's compiled functions on a mesh."""

    def __init__(self, config, shape=ONE_DEVICE, accumulation=1):
        mesh = MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2])
        train = dataclasses.replace(config.train, accumulation=accumulation)
        self.config = dataclasses.replace(config, mesh=mesh, train=train)
        self.mesh, self.accumulation = make_mesh(mesh), accumulation
        self.rows = train_rows(open_corpus(config.data), config.data, 0)
        with jax.set_mesh(self.mesh):
            tx = make_optimizer(self.config)
            self.first = jax.jit(lambda: init_state(self.config, tx))()
            self.step = jax.jit(make_train_step(self.config, tx))
            self.evaluate = jax.jit(make_eval_step(self.config))
            self.grads = jax.jit(make_grads_of_step(self.config))

    def batch(self, number):
        size = self.config.data.batch_size
        arrays = self.rows.rows(np.arange(size * number, size * (number + 1)))
        arrays["rows"] = np.arange(size, dtype=np.int32)
        return shard_batch(arrays, self.mesh, self.accumulation)

    def spending(self, reports) -> Spending:
        found = [report.skim for report in layer_reports(self.config.model, reports).values()]
        works = [spared_work(self.config.model, layer.block) for layer in self.config.model.layers]
        return budgets.spending(found, works, found)


def price_of(state):
    return [float(each) for leaf in jax.tree.leaves(state.model_state) for each in np.asarray(leaf).reshape(-1)]


class TestWhatIsSpent:
    @pytest.mark.parametrize("method", METHODS)
    def test_shares_are_those_written_out(self, method, monkeypatch):
        """Weights of the tokens as blocks of an evaluation see them, against token by token."""
        run = Run(experiment(method, **{"model.scan": "false"}))
        seen, spent = [], None

        def spying(self, begins: Survivors, ends: Survivors, batch):
            jax.debug.callback(lambda a, b: seen.append((a, b)), begins.keep, ends.keep, ordered=True)
            return spy(self, begins, ends, batch)

        spy = SkimmedBlock._spent
        monkeypatch.setattr(SkimmedBlock, "_spent", spying)
        arrays = run.batch(0)
        with jax.set_mesh(run.mesh):
            found = jax.block_until_ready(make_eval_step(run.config)(run.first.variables, arrays))
        spent = run.spending(found.reports)
        begins, ends = (np.stack([np.asarray(pair[i]) for pair in seen]) for i in range(2))
        d, f = 16, 64
        work = [(8 * d * d, 4 * d, 4 * d * f)] * LAYERS
        share = flops_share(begins, ends, np.asarray(arrays["segments"])[0], work)
        np.testing.assert_allclose(float(spent.flops), share, rtol=1e-5)
        np.testing.assert_allclose(float(spent.decided), share, rtol=1e-5, err_msg="evaluation decides hard")

    @pytest.mark.parametrize("kept", [[0.8, 0.5, 0.1], [1.0, 1.0, 1.0], [0.5, 0.5, 0.0]])
    def test_depths_against_their_prior(self, kept):
        spent = Spending(kept=jnp.array(kept), flops=jnp.zeros(()), decided=jnp.zeros(()), price=jnp.zeros(()))
        budget = BUDGETS["kl"](depth=0.4, deviation=0.8)
        np.testing.assert_allclose(budget(spent), kl_of_depths(np.array(kept), 0.4, 0.8), rtol=1e-5)
        assert np.isfinite(jax.grad(budget.__call__)(spent).kept).all()

    def test_losses_by_hand(self):
        spent = Spending(kept=jnp.array([0.9, 0.5]), flops=jnp.array(0.7), decided=jnp.array(0.5), price=jnp.array(2.0))
        expected = {"linear": 0.7, "l1": 0.3, "l2": 0.09}
        for name, value in expected.items():
            budget = BUDGETS[name]() if name == "linear" else BUDGETS[name](target=0.4)
            np.testing.assert_allclose(budget(spent), value, rtol=1e-5)
        hard = HardBudget(target=0.4, rate=0.5, damping=3.0, most=2.01)
        np.testing.assert_allclose(hard(spent), (2 + 3 * 0.1) * 0.3, rtol=1e-5)
        slope = jax.grad(hard.__call__)(spent)
        np.testing.assert_allclose([slope.flops, slope.decided, slope.price], [2.3, 0, 0], rtol=1e-5)
        moved = hard.next_price(jnp.array([1.0, 2.0]), spent)
        np.testing.assert_allclose(moved, [1.05, 2.01], rtol=1e-6)


@functools.cache
def stepped(budget, shape=ONE_DEVICE, accumulation=1, method="ltp"):
    """(loss, its term, gradients; of a hard budget, the price after a step and what that spent), the price being 1.5
    before it."""
    run = Run(experiment(method, budget), shape, accumulation)
    with jax.set_mesh(run.mesh):
        state = dataclasses.replace(
            run.first, model_state=jax.tree.map(lambda price: price + 1.5, run.first.model_state)
        )
        (loss, (_, _, terms, *_)), grads = run.grads(state.params, state.model_state, run.batch(0), state.step)
        found = to_numpy((loss, terms["skim"], grads.dense))
        if budget != "hard":
            return found, [], None
        after, report = jax.block_until_ready(run.step(state, run.batch(0)))
        return found, price_of(after), run.spending(to_host(report.reports))


NONLINEAR = [name for name in BUDGETS if name != "linear"]


@pytest.mark.parametrize("budget", [pytest.param("l1", marks=pytest.mark.slow), "l2", "kl", "hard"])
def test_microbatches_make_the_same_loss_and_gradient(budget):
    whole, price, _ = stepped(budget)
    assert whole[1] != 0
    parts, price_of_parts, _ = stepped(budget, accumulation=2)
    assert_close(parts, whole, 5e-5, atol=1e-6)
    np.testing.assert_allclose(price_of_parts, price, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("budget, method", [*((budget, "ltp") for budget in NONLINEAR), ("hard", "transkimmer")])
def test_on_a_mesh(budget, method):
    whole, price, _ = stepped(budget, method=method)
    spread, price_there, _ = stepped(budget, (2, 2, 2), method=method)
    assert_close(spread, whole, 5e-5, atol=1e-6)
    np.testing.assert_allclose(price_there, price, rtol=1e-6)


def test_the_price_moves_once_a_step_and_not_in_evaluation():
    _, price, spent = stepped("hard")
    budget = experiment().model.skim.budget
    assert len(price) == LAYERS and price[0] == price[1], "one price, kept in every layer"
    np.testing.assert_allclose(price[0], 1.5 + budget.rate * (float(spent.decided) - budget.target), rtol=1e-6)
    run = Run(experiment())
    with jax.set_mesh(run.mesh):
        found = run.evaluate(run.first.variables, run.batch(0))
    row = layer_metrics(run.config.model, to_host(found.reports), "eval")
    assert row["select/price"] == 0.0


class TestRefused:
    @pytest.mark.parametrize(
        "budget, settings, key",
        [
            ("l1", {"target": 0.0}, "target"),
            ("hard", {"target": 1.5}, "target"),
            ("hard", {"rate": 0.0}, "rate"),
            ("hard", {"most": -1.0}, "most"),
            ("hard", {"damping": -1.0}, "damping"),
            ("kl", {"depth": 2.0}, "depth"),
            ("kl", {"deviation": 0.0}, "deviation"),
        ],
    )
    def test_settings_that_make_no_sense(self, budget, settings, key):
        with pytest.raises(ConfigError) as error:
            BUDGETS[budget](**settings)
        assert error.value.key == key

    @pytest.mark.parametrize(
        "given, key",
        [
            ({"model.skim.stage": "hard", "model.skim.budget.target": "0.3"}, "model.skim.budget.name"),
            ({"model.skim.coefficient": "0.3"}, "model.skim.coefficient"),
        ],
    )
    def test_what_has_no_effect(self, given, key):
        with pytest.raises(ConfigError) as error:
            experiment(**given)
        assert error.value.key == key


@pytest.mark.slow
def test_who_asks_for_a_share_of_the_flops_gets_it():
    """400 steps of LTP on the smallest of tasks: evaluation spends 40 % ± 1 %."""
    asked = {"model.skim.budget.target": "0.4", "model.skim.budget.rate": "0.1", "model.skim.budget.damping": "5.0"}
    run = Run(experiment(**asked, **{"model.repeats": "3", "train.steps": "400", "data.batch_size": "16"}))
    with jax.set_mesh(run.mesh):
        state = run.first
        for number in range(400):
            state, _ = jax.block_until_ready(run.step(state, run.batch(number)))
        found = [to_host(run.evaluate(state.variables, run.batch(number))) for number in range(1000, 1020)]
    total = functools.reduce(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b), found)
    assert float(run.spending(total.reports).flops) == pytest.approx(0.4, abs=0.01)
    assert total.correct > 0.9 * total.targets
