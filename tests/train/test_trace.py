"""Decisions are recorded as they were taken, in evaluation and training, and can be taken again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.test_router_contract import routers

from sparsejax.ops.assignment import by_token
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.replay import record
from sparsejax.routers.router import decide
from sparsejax.routers.tables import Hash
from sparsejax.routers.weights import Constant, Raw, Renormalized
from sparsejax.train.trace import load_trace

from runs import arguments, here
from support import known


@pytest.fixture(scope="module")
def traced(finished_run, tmp_path_factory):
    """(what an evaluation of the finished run printed, the trace it wrote)."""
    path = tmp_path_factory.mktemp("traced") / "trace.npz"
    return here("eval", f"--workdir={finished_run}", f"--trace={path}").json, path


def test_a_replayed_evaluation_is_the_same(traced, finished_run):
    row, path = traced
    assert here("eval", f"--workdir={finished_run}").json == row
    assert here("eval", f"--workdir={finished_run}", f"--replay={path}").json == row


def test_other_decisions_are_taken_when_they_are_replayed(traced, finished_run, tmp_path):
    """Everything through the first two experts: the ledger and the loss follow."""
    row, path = traced
    trace = load_trace(path)
    same = lambda experts: np.where(experts < 0, -1, np.arange(2, dtype=np.int32))  # noqa: E731
    layers = {name: dataclasses.replace(each, experts=same(each.experts)) for name, each in trace.layers.items()}
    dataclasses.replace(trace, layers=layers).save(tmp_path / "same.npz")
    changed = here("eval", f"--workdir={finished_run}", f"--replay={tmp_path / 'same.npz'}").json
    assert changed["moe/load_max_over_mean"] == pytest.approx(4.0) and changed["cross_entropy"] != row["cross_entropy"]


def test_a_trace_on_another_mesh_is_the_same(traced, finished_run, tmp_path):
    path = tmp_path / "mesh.npz"
    assert here("eval", f"--workdir={finished_run}", "--mesh=2,2,2", f"--trace={path}").status == 0
    one, other = load_trace(traced[1]), load_trace(path)
    assert np.array_equal(one.tokens, other.tokens) and list(one.layers) == list(other.layers) == ["01_moe"]
    for field in ("experts", "kept"):
        assert np.array_equal(getattr(one.layers["01_moe"], field), getattr(other.layers["01_moe"], field))


def test_a_step_of_training_is_traced(tmp_path):
    """What the trace says of the first step is what that step counted, whatever noise and accumulation."""
    workdir = tmp_path / "run"
    settings = {"train__trace": "(1,)", "train__accumulation": 2, "train__steps": 6, "eval__batches": 1}
    router = {"model__blocks__moe__router__noise": "gumbel", "model__blocks__moe__router__jitter": 0.3}
    done = here(*arguments("train", f"--workdir={workdir}", **settings, **router))
    assert done.status == 0, done.err
    counted, trace = np.load(workdir / "routing" / "1.npz"), load_trace(workdir / "traces" / "1.npz")
    layer = trace.layers["01_moe"]
    assert (trace.mode, trace.step, trace.mask.shape) == ("train", 1, (8, 16))
    for field, pairs in (("assigned", layer.experts >= 0), ("processed", layer.kept)):
        count = np.bincount(np.asarray(layer.experts)[pairs], minlength=8)
        assert np.array_equal(count, counted[f"01_moe/{field}"])
    assert np.array_equal((np.asarray(layer.experts) >= 0).any(-1), trace.mask)


TWO_KINDS = """
from sparsejax import default_config
from sparsejax.routers import presets


def get_config():
    config = default_config()
    config.data.name = "synthetic"
    config.data.batch_size, config.model.repeats = 8, 1
    config.model.blocks.hash = "moe"
    config.model.blocks.hash.router = presets.hash()
    config.model.pattern = ("moe", "hash")
    return config
"""

ROUTERS = {name: router for name, router in routers().items() if name.split("=")[0] in ("selection", "order", "weight")}


def decided(router, **more):
    """A decision for 2 groups of 9 tokens and 8 experts, of which each has 3 slots, and what it was given."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 8)), jnp.float32)
    mask = np.arange(18).reshape(2, 9) < 16
    given = {"tokens": jnp.arange(18, dtype=jnp.int32).reshape(2, 9), "training": False} | more
    return decide(logits, known(mask, num_slots=3, **given), router), mask


@pytest.mark.parametrize("name", ROUTERS)
def test_every_selection_can_be_taken_again(name):
    router = ROUTERS[name]
    first, mask = decided(router)
    kept = record(first, 2)
    again, _ = decided(router, experts=kept.experts)
    chosen = kept.experts >= 0
    same = [
        np.array_equal(first.slots.processed, again.slots.processed),
        np.array_equal(first.slots.assigned, again.slots.assigned),
        np.array_equal(kept.kept, by_token(again.slots.keep, again.pairs)),
        np.array_equal(chosen * kept.weights, chosen * record(again, 2).weights),
    ]
    assert all(same)
    assert not np.asarray(kept.kept)[~mask].any() and (np.asarray(kept.experts)[~mask] == -1).all()


@pytest.mark.parametrize("weight", [Constant(), Renormalized(), Raw()])
def test_places_of_no_expert_change_no_weight(weight):
    """A trace fills the choices of every layer up to the most that any of them has."""
    router = RouterConfig(selection=Hash(k=2), weight=weight)
    first, _ = decided(router)
    kept = record(first, 2)
    again, _ = decided(router, experts=jnp.pad(kept.experts, [(0, 0), (0, 0), (0, 2)], constant_values=-1))
    weights = np.where(kept.experts >= 0, record(again, 2).weights[..., :2], 0)
    assert np.array_equal(weights, np.where(kept.experts >= 0, kept.weights, 0))


def test_layers_of_different_k_are_replayed_as_they_were(tmp_path):
    """A table of one expert with constant weights after a layer of two."""
    run, path, file = tmp_path / "run", tmp_path / "trace.npz", tmp_path / "two_kinds.py"
    file.write_text(TWO_KINDS)
    settings = arguments("", train__steps=1, eval__batches=1)[2:]
    done = here("train", f"--config={file}", f"--workdir={run}", *settings)
    assert done.status == 0, done.err
    row = here("eval", f"--workdir={run}", f"--trace={path}").json
    assert {each.experts.shape[-1] for each in load_trace(path).layers.values()} == {1, 2}
    assert here("eval", f"--workdir={run}", f"--replay={path}").json == row


def test_margin_and_best_are_those_of_the_ranking():
    decision, _ = decided(RouterConfig())
    ranking = np.sort(np.asarray(decision.ranking_GSE), axis=-1)[..., ::-1]
    kept = jax.tree.map(np.asarray, record(decision, 2))
    real = kept.experts[..., 0] >= 0
    assert np.array_equal(kept.best, ranking[..., 0])
    assert np.array_equal(kept.margin[real], (ranking[..., 1] - ranking[..., 2])[real])
    assert np.array_equal(kept.ranking[real], ranking[..., :2][real])


def error_of(*words):
    return here(*words).error


def test_wrong_requests_are_one_line(traced, finished_run, tmp_path):
    run, path = f"--workdir={finished_run}", traced[1]
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", mask=np.zeros(3))
    for words, parts in [
        (["--replay=nowhere.npz"], ["nowhere.npz: could not be read"]),
        ([f"--replay={tmp_path / 'text.npz'}"], ["text.npz: not a trace"]),
        ([f"--replay={tmp_path / 'other.npz'}"], ["other.npz: not a trace"]),
        ([f"--replay={path}", "--config.eval.batches=3"], ["--replay: its rows are not those of this evaluation"]),
        ([f"--replay={path}", "--config.model.blocks.moe.num_experts=4"], ["num_experts: 4, but a recorded token"]),
        ([f"--trace={tmp_path / 'no' / 'folder.npz'}"], ["there is no folder"]),
        (["--parity", f"--trace={tmp_path / 'new.npz'}"], ["--trace has no effect with --parity"]),
    ]:
        error = error_of("eval", run, *words)
        assert all(part in error for part in parts), error
    dense = arguments("train", f"--workdir={tmp_path / 'run'}", model__pattern="(dense,)", train__trace="(1,)")
    assert "config.train.trace: (1,) has no effect: the model has no routers" in error_of(*dense)
    late = arguments("train", f"--workdir={tmp_path / 'run'}", train__trace="(13,)")
    assert "config.train.trace: 13 is not one of the steps 1 … train.steps=12" in error_of(*late)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other.npz", "text.npz"]
