"""The training step: one loss whatever the accumulation and the mesh, one compilation, and steps that are skipped."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.base.reports import Report
from sparsejax.base.sharding import RULE_NAMES, MeshConfig, Rules, shard_batch
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import moe_layers
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import LossFree, NoController, Quantile
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.optimizer import AdamW
from sparsejax.train.state import init_state, make_optimizer, state_specs
from sparsejax.train.step import make_eval_step, make_train_step

from support import MESHES, ONE_DEVICE, assert_close, host_batch, mesh_name, on_mesh, to_numpy

ROWS, LENGTH, VOCAB, EXPERTS = 16, 6, 16, 4


COEFFICIENT = 0.5
DEFAULT_RULES = Rules()
ALL_AXES = (2, 2, 2)


def moe_spec(scope):
    """Experts with drops, noise, a balance loss that counts and a controller that moves."""
    controllers = {"sequence": LossFree(rate=0.01, rule="momentum"), "global": Quantile()}
    controller = controllers.get(scope, NoController())
    router = RouterConfig(balance=LoadBalance(scope=scope, coefficient=COEFFICIENT), controller=controller, jitter=0.2)
    return MoESpec(num_experts=EXPERTS, d_ff=8, capacity_factor=0.75, router=router)


def experiment(shape=ONE_DEVICE, accumulation=1, scopes=("sequence", "global"), rules=DEFAULT_RULES):
    """A layer for each balance scope; every expert weight is split over what mesh there is."""
    blocks = {scope: moe_spec(scope) for scope in scopes}
    model = {"d_model": 8, "num_heads": 2, "vocab_size": VOCAB, "pattern": scopes, "repeats": 1, "blocks": blocks}
    return ExperimentConfig(
        model=ModelConfig(**model),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2], rules=rules),
        optimizer=AdamW(learning_rate=0.01, clip_norm=None),
        train=TrainConfig(accumulation=accumulation, steps=100),
    )


def gradient_keeper():
    """SGD whose state is the last gradient: 0 · old + new."""
    return optax.sgd(0.1, momentum=0.0)


@functools.cache
def first_state(scopes):
    """On the host."""
    config, tx = experiment(scopes=scopes), gradient_keeper()
    with on_mesh(ONE_DEVICE):
        return to_numpy(jax.jit(lambda: init_state(config, tx))())


@functools.cache
def one_step(shape, accumulation, scopes=("sequence", "global"), rules=DEFAULT_RULES):
    """((gradients, balancing state), report, what JAX asks XLA for, what XLA makes of it) of the first step."""
    config, tx = experiment(shape, accumulation, scopes, rules), gradient_keeper()
    with on_mesh(shape) as mesh:
        specs = jax.tree.leaves(state_specs(config, tx), is_leaf=lambda leaf: isinstance(leaf, P))
        leaves, structure = jax.tree.flatten(first_state(scopes))
        shardings = [jax.NamedSharding(mesh, spec) for spec in specs]
        state = structure.unflatten(map(jax.device_put, leaves, shardings))
        microbatches = shard_batch(host_batch(ROWS, LENGTH, VOCAB), mesh, accumulation)
        lowered = jax.jit(make_train_step(config, tx)).lower(state, microbatches)
        compiled = lowered.compile()
        state, report = to_numpy(compiled(state, microbatches))
    (trace,) = (part.trace for part in state.opt_state if isinstance(part, optax.TraceState))
    return (trace, state.model_state), report, lowered.as_text(), compiled.as_text()


def numbers(*setting, **more):
    return one_step(*setting, **more)[:2]


def layers(report):
    """The MoE reports by scope."""
    return {name.split("_")[1]: moe for name, moe in moe_layers(experiment().model, report.reports).items()}


class TestAccumulation:
    @pytest.mark.parametrize("accumulation", [2, 4])
    def test_is_the_large_batch(self, accumulation):
        """For balance by sequence and by step: the ledger exactly; loss, terms, gradients and norm to 1e-5."""
        assert_close(numbers(ONE_DEVICE, accumulation), numbers(ONE_DEVICE, 1))

    @pytest.mark.slow
    @pytest.mark.parametrize("scope", ["microbatch", "device"])
    def test_of_the_narrower_scopes_only_the_balance_differs(self, scope):
        whole, parts = (numbers(ONE_DEVICE, accumulation, (scope,))[1] for accumulation in (1, 2))
        assert_close((parts.cross_entropy, parts.terms["router_z"]), (whole.cross_entropy, whole.terms["router_z"]))
        assert abs(parts.terms["balance"] - whole.terms["balance"]) > 1e-4 * whole.terms["balance"]
        assert np.array_equal(parts.reports["pattern_0"].moe.assigned, whole.reports["pattern_0"].moe.assigned)

    def test_there_is_something_to_compare(self):
        grads, report = numbers(ONE_DEVICE, 1)
        assert all(layer.dropped.sum() > 0 and layer.masked > 0 for layer in layers(report).values())
        assert report.terms["balance"] > 0.1 * report.loss
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))

    def test_what_is_logged_is_what_enters_the_loss(self):
        _, report = numbers(ONE_DEVICE, 2)
        np.testing.assert_allclose(report.cross_entropy + sum(report.terms.values()), report.loss, rtol=1e-6)
        by_row, by_step = layers(report)["sequence"], layers(report)["global"]
        assert (by_row.balance_units, by_step.balance_units) == (ROWS, 1)
        balance = by_row.balance_sum / ROWS + by_step.balance_sum
        np.testing.assert_allclose(COEFFICIENT * balance, report.terms["balance"], rtol=1e-5)


class TestMeshes:
    @pytest.mark.parametrize("shape", MESHES[1:], ids=mesh_name)
    def test_loss_gradients_and_ledger_are_those_of_one_device(self, shape):
        assert_close(numbers(shape, 2), numbers(ONE_DEVICE, 2))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "whole", [("embed",), ("experts",), ("mlp",), ("heads", "kv_heads"), ("vocab",), RULE_NAMES], ids=str
    )
    def test_the_rules_move_arrays_and_no_number(self, whole):
        """Each kind of parameter on every device, and all of them: no gathering, no exchange, no sum over `tensor`."""
        rules = Rules(**dict.fromkeys(whole))
        assert_close(numbers(ALL_AXES, 2, rules=rules), numbers(ONE_DEVICE, 2))

    def test_the_ledger_conserves(self):
        for shape in MESHES:
            for layer in layers(numbers(shape, 2)[1]).values():
                assert np.array_equal(layer.assigned, layer.processed + layer.dropped)


class TestCollectives:
    """Of the step on 2×4×1: experts over `expert`, every weight split over `data`."""

    def test_tokens_travel_by_all_to_all_twice_each_way_in_each_layer(self):
        _, _, asked, made = one_step((2, 4, 1), 2)
        # The counting pass of a global balance goes through the layers, too.
        assert asked.count('"stablehlo.all_to_all"') >= 4 * 2
        assert len(re.findall(r" all-to-all(?:-start)?\(", made)) >= 4 * 2

    def test_gradients_of_weights_leave_by_reduce_scatter_and_never_whole(self):
        _, _, asked, made = one_step((2, 4, 1), 2)
        weights = 2 * (4 + 1 + 2) + 2  # attention, router and experts of two layers; the table is used twice
        assert asked.count('"stablehlo.reduce_scatter"') == weights
        assert len(re.findall(r" reduce-scatter(?:-start)?\(", made)) == weights
        gathered = rf"f32\[1,{8},{8}\]"  # one device's expert, whole: [E / 4, D, F]
        for line in made.splitlines():
            result = line.partition(" all-reduce(")
            assert not (result[1] and re.search(gathered, result[0])), line


@pytest.fixture(scope="module")
def trained():
    """(config, mesh, states before each step and after the last, reports, jitted step) of AdamW over three batches."""
    config = experiment(ALL_AXES, scopes=("global",))
    with on_mesh(ALL_AXES) as mesh:
        tx = make_optimizer(config)
        states = [jax.block_until_ready(jax.jit(lambda: init_state(config, tx))())]
        step, reports = jax.jit(make_train_step(config, tx)), []
        for seed in range(3):
            batch = shard_batch(host_batch(ROWS, LENGTH, VOCAB, seed=seed), mesh, 1)
            state, report = jax.block_until_ready(step(states[-1], batch))
            states.append(state)
            reports.append(report)
        yield config, mesh, tx, states, reports, step


def spec_of(tree):
    """The layout of every array, written in full: P('data') and P('data', None) are one."""
    return jax.tree.map(lambda leaf: P(*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))), tree)


class TestState:
    def test_three_steps_are_compiled_once(self, trained):
        assert trained[-1]._cache_size() == 1

    def test_moments_lie_where_their_parameters_lie(self, trained):
        _, _, _, states, _, _ = trained
        for state in (states[0], states[-1]):
            parameters = spec_of(state.params)
            adam = [part for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part)]
            assert len(adam) == 1
            assert spec_of(adam[0].mu) == parameters and spec_of(adam[0].nu) == parameters
        experts = states[-1].params["stack"]["units"]["blocks"][0]["feed_forward"]["experts"]
        assert spec_of(experts["w_in"][...]) == P(None, "expert", "data", "tensor")
        assert spec_of(experts["w_out"][...]) == P(None, "expert", "tensor", "data")

    def test_the_layout_is_the_one_declared_and_survives_a_step(self, trained):
        config, mesh, tx, states, _, _ = trained
        with jax.set_mesh(mesh):
            declared = jax.tree.leaves(state_specs(config, tx), is_leaf=lambda leaf: isinstance(leaf, P))
        for state in (states[0], states[-1]):
            actual = jax.tree.leaves(spec_of(state), is_leaf=lambda leaf: isinstance(leaf, P))
            padded = [P(*spec, *[None] * (len(full) - len(spec))) for spec, full in zip(declared, actual, strict=True)]
            assert actual == padded

    def test_steps_are_counted_and_change_every_parameter(self, trained):
        _, _, _, states, reports, _ = trained
        assert [int(state.step) for state in states] == [0, 1, 2, 3]
        assert all(report.finite for report in reports) and int(states[-1].nonfinite) == 0
        changed = jax.tree.map(
            lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), states[0].params, states[1].params
        )
        assert all(jax.tree.leaves(changed))

    def test_a_new_state_has_the_same_values_on_every_mesh(self, trained):
        config = experiment(scopes=("global",))
        with on_mesh(ONE_DEVICE):
            tx = make_optimizer(config)
            assert_close(jax.jit(lambda: init_state(config, tx).params)(), trained[3][0].params, 1e-6)


def _is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


class TestNonfinite:
    def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(self, trained):
        _, mesh, _, states, _, step = trained
        good = states[-1]
        scale = good.params["final_norm"]["scale"]
        poisoned = jax.tree.map(lambda leaf: leaf, good.params)
        poisoned["final_norm"]["scale"] = scale.replace(scale[...].at[0].set(np.inf))
        with jax.set_mesh(mesh):
            batch = shard_batch(host_batch(ROWS, LENGTH, VOCAB), mesh, 1)
            before = dataclasses.replace(good, params=poisoned)
            skipped, report = jax.block_until_ready(step(before, batch))
            twice, _ = jax.block_until_ready(step(skipped, batch))
            mended, after = jax.block_until_ready(step(dataclasses.replace(twice, params=good.params), batch))
        assert not report.finite and after.finite
        kept, given = ((state.params, state.opt_state) for state in (skipped, before))
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), to_numpy(kept), to_numpy(given))))
        assert [int(s.nonfinite) for s in (good, skipped, twice, mended)] == [0, 1, 2, 2]
        assert [int(s.nonfinite_streak) for s in (good, skipped, twice, mended)] == [0, 1, 2, 0]
        assert int(mended.step) == int(good.step) + 3
        assert step._cache_size() == 1


class TestEvaluation:
    def test_sums_are_those_of_the_rows_apart(self):
        """Evaluation draws no noise, and a batch is the sum of its halves."""
        config, tx = experiment(scopes=("global",)), gradient_keeper()
        with on_mesh(ONE_DEVICE) as mesh:
            state = jax.jit(lambda: init_state(config, tx))()
            evaluate = jax.jit(make_eval_step(config))
            arrays = host_batch(ROWS, LENGTH, VOCAB)
            halves = [{k: a[rows] for k, a in arrays.items()} for rows in (slice(0, 8), slice(8, 16))]
            whole, *parts = (to_numpy(evaluate(state, shard_batch(rows, mesh, 1))) for rows in (arrays, *halves))
        assert whole.rows == ROWS and whole.targets == arrays["loss_mask"].sum()
        for name in ("cross_entropy_sum", "correct", "targets", "tokens", "rows"):
            assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
        ledger = lambda report: report.reports["pattern_0"].moe.assigned  # noqa: E731
        assert np.array_equal(sum(map(ledger, parts)), ledger(whole))
        assert isinstance(whole.reports["pattern_0"], Report)
