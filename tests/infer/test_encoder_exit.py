"""Classifiers whose rows leave early: as if all had run and chosen afterwards, each row by itself, on any mesh; and the
command that evaluates them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import cli
from sparsejax.base import devices
from sparsejax.base.config import to_json
from sparsejax.base.errors import RequestError
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.selection import MixtureOfDepths
from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import Classify
from sparsejax.infer.encoder_exit import ExitingEncoder, ladder_of
from sparsejax.infer.encoder_report import as_row, exit_costs, reported
from sparsejax.infer.exit_rules import RULES, MaxProb, fit_temperatures, leave
from sparsejax.infer.exit_table import ExitTable, exit_table
from sparsejax.memory.config import MEMORIES
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import layer_cost
from sparsejax.model.exits import ExitHeads, NoExits
from sparsejax.model.heads import Classes
from sparsejax.model.partial import logits_at
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import abstract_model, init_state, make_optimizer

from support import put_batch
from tiny import CUBE, ONE, mesh_of, variables

ROWS, LENGTH, CLASSES = 8, 12, 4
DENSE = ModelConfig(
    d_model=16,
    num_heads=2,
    vocab_size=64,
    causal=False,
    pattern=("dense",),
    repeats=4,
    blocks={"dense": DenseSpec(d_ff=32), "moe": MoESpec(num_experts=4, d_ff=16, eval_capacity_factor=0.6)},
    head=Classes(classes=CLASSES),
    exits=ExitHeads(layers=(1, 2, 3), head="own"),
)
MODELS = {
    "dense": DENSE,
    "experts that are too small": dataclasses.replace(DENSE, pattern=("dense", "moe"), repeats=2),
    "streams": dataclasses.replace(DENSE, streams=AltUp(streams=2), head=Classes(classes=CLASSES, pool="first")),
    "lookup": dataclasses.replace(DENSE, memory={"lookup": MEMORIES["lookup"](blocks=("dense",))}),
    "some tokens": dataclasses.replace(DENSE, select=MixtureOfDepths(capacity=0.5)),
}


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Rows of one document of various lengths, one of them empty."""
    rng = np.random.default_rng(0)
    lengths = np.array([12, 3, 7, 12, 5, 0, 9, 1])[:, None]
    order = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    real, zero = order < lengths, np.zeros((ROWS, LENGTH), np.int32)
    return {
        "tokens": np.where(real, rng.integers(0, 64, (ROWS, LENGTH)), 0).astype(np.int32),
        "targets": np.where(real & (order == 0), rng.integers(0, CLASSES, (ROWS, 1)), 0).astype(np.int32),
        "segments": real.astype(np.int32),
        "positions": np.where(real, order, 0).astype(np.int32),
        "loss_mask": real & (order == 0),
        "domains": zero,
        "rows": np.arange(ROWS, dtype=np.int32),
    }


@functools.cache
def masked(name: str) -> tuple[np.ndarray, ExitTable]:
    """(logits of every exit `[N, E, C]`, the table of the rows that are not empty), from the whole scanned model."""
    config = MODELS[name]
    with jax.set_mesh(mesh_of(ONE)):
        mesh = mesh_of(ONE)
        model, graph = variables(config, mesh), abstract_model(config)[0]

        @jax.jit
        def run(model, batch):
            lm = nnx.merge(graph, model.params, model.model_state)
            out = lm(batch, mode="eval")
            features = (*out.exits, out.features)
            return [logits_at(lm, x, depth) for x, depth in zip(features, (1, 2, 3, 4), strict=True)], features, out

        said, features, out = jax.tree.map(np.asarray, run(model, put_batch(arrays(), mesh)))
    logits, states = (np.stack([each[:, 0] for each in given], 1) for given in (said, features))
    np.testing.assert_array_equal(logits[:, -1], out.logits[:, 0])
    real = arrays()["segments"].any(-1)
    more = {"cost": exit_costs(config, LENGTH), "depth": np.arange(1, 5), "keep_logits": True}
    return logits, exit_table(logits[real], arrays()["targets"][real, 0], states_NED=states[real], **more)


@functools.cache
def encoder_of(name: str, shape=ONE) -> ExitingEncoder:
    with jax.set_mesh(mesh_of(shape)):
        ladder = ladder_of(ROWS, shape[0] * shape[1])
        return ExitingEncoder(MODELS[name], variables(MODELS[name], mesh_of(shape)), LENGTH, ladder)


def run(name: str, rule, rows=range(ROWS), shape=ONE):
    """What becomes of some rows of the batch, in this order."""
    encoder = encoder_of(name, shape)
    with jax.set_mesh(mesh_of(shape)):
        return encoder({key: each[np.array(rows)] for key, each in arrays().items()}, rule)


def between(values: np.ndarray, share: float) -> float:
    """A threshold that no value is near."""
    ordered = np.sort(values.ravel())
    at = int(share * (len(ordered) - 1))
    return float(ordered[at : at + 2].mean())


def rules(table: ExitTable) -> dict:
    """Each rule so that rows leave at several exits."""
    early = lambda values: values[:, 1:-1]  # noqa: E731
    return {
        "max_prob": MaxProb(threshold=between(early(table.max_prob), 0.6)),
        "margin": RULES["margin"](threshold=between(early(table.margin), 0.6)),
        "entropy": RULES["entropy"](threshold=between(early(table.entropy), 0.4)),
        "patience": RULES["patience"](patience=1),
        "similarity_patience": RULES["similarity_patience"](
            threshold=between(early(table.divergence), 0.5), patience=1
        ),
        "state_similarity": RULES["state_similarity"](threshold=abs(between(early(table.similarity), 0.5))),
        "by exit": MaxProb(
            threshold=(1.0, between(table.max_prob[:, 1], 0.5), between(table.max_prob[:, 2], 0.5), 0.0)
        ),
        "calibrated": RULES["calibrated"](temperatures=fit_temperatures(table), threshold=0.5),
    }


def assert_left(found, wanted_exits, logits):
    """Rows left there, with those answers."""
    np.testing.assert_array_equal(found.exits, wanted_exits)
    want = np.where(wanted_exits[:, None] < 0, 0, logits[np.arange(len(logits)), wanted_exits])
    np.testing.assert_allclose(found.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())


def expected_exits(name: str, rule) -> np.ndarray:
    exits = np.full(ROWS, -1)
    exits[arrays()["segments"].any(-1)] = leave(rule, masked(name)[1])
    return exits


class TestCompact:
    @pytest.mark.parametrize("rule", rules(masked("dense")[1]))
    def test_it_is_the_masked_run_for_every_rule(self, rule):
        chosen = rules(masked("dense")[1])[rule]
        want = expected_exits("dense", chosen)
        assert len(set(want[want >= 0])) > 1
        assert_left(run("dense", chosen), want, masked("dense")[0])

    @pytest.mark.parametrize("name", [name for name in MODELS if name != "dense"])
    def test_it_is_the_masked_run_of_every_model(self, name):
        rule = rules(masked(name)[1])["entropy"]
        want = expected_exits(name, rule)
        assert len(set(want[want >= 0])) > 1
        assert_left(run(name, rule), want, masked(name)[0])

    def test_a_threshold_that_never_fires_gives_the_full_models_answers(self):
        found = run("dense", MaxProb(threshold=1.0))
        real = arrays()["segments"].any(-1)
        np.testing.assert_array_equal(found.exits, np.where(real, 3, -1))
        assert found.rungs == (8, 8, 8, 8)  # seven rows are left
        assert_left(found, np.where(real, 3, -1), masked("dense")[0])

    @pytest.mark.parametrize("name", ["dense", "experts that are too small"])
    def test_a_row_leaves_where_it_would_alone_and_in_any_company(self, name):
        rule, logits = rules(masked(name)[1])["entropy"], masked(name)[0]
        together = run(name, rule)
        for rows in ([6], [2], [1, 0], [7, 6, 5, 4, 3, 2, 1, 0], [3, 3, 1]):
            assert_left(run(name, rule, rows), together.exits[rows], logits[rows])

    def test_a_mesh_changes_nothing(self):
        rule = rules(masked("experts that are too small")[1])["entropy"]
        found = run("experts that are too small", rule, shape=CUBE)
        assert_left(found, expected_exits("experts that are too small", rule), masked("experts that are too small")[0])
        assert all(rung % 4 == 0 for rung in found.rungs)

    def test_the_survivors_run_in_the_smallest_rung_that_holds_them_compiled_once(self):
        encoder, rule = encoder_of("dense", ONE), rules(masked("dense")[1])["entropy"]
        found = run("dense", rule)
        left = [int((found.exits >= number).sum()) for number in range(4)]
        assert found.rungs == tuple(min(r for r in encoder.ladder if r >= n) for n in left if n)
        assert found.rungs[-1] < found.rungs[0]
        programs = dict(encoder._compiled)
        assert {(number, number, rung) for number, rung in enumerate(found.rungs)} <= set(programs)
        patient = run("dense", RULES["patience"](patience=2))
        assert (0, 2, patient.rungs[0]) in encoder._compiled and len(set(patient.rungs[:3])) == 1
        programs = dict(encoder._compiled)
        again = run("dense", rule)
        assert encoder._compiled == programs
        np.testing.assert_array_equal(again.logits, found.logits)

    def test_a_batch_of_padding_runs_nothing(self):
        found = run("dense", MaxProb(), rows=[5])
        assert found.rungs == () and found.exits.tolist() == [-1] and not found.logits.any()


def test_the_ladder_halves_and_has_steps_between():
    assert ladder_of(32) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert ladder_of(1) == (1,) and ladder_of(20) == (1, 2, 3, 4, 5, 8, 10, 15, 20)
    assert ladder_of(16, 4) == (4, 8, 12, 16)


class TestReport:
    def test_flops_by_hand(self):
        rule = rules(masked("dense")[1])["entropy"]
        found = run("dense", rule)
        report = reported(DENSE, arrays(), found)
        lengths, exits = arrays()["segments"].sum(-1), found.exits
        layer, head = layer_cost(DENSE, "dense"), 2 * 16 * CLASSES
        of_row = lambda tokens, layers: layers * tokens * (layer.per_token + tokens * layer.per_key)  # noqa: E731
        real = [n for n in range(ROWS) if lengths[n]]
        ideal = sum(of_row(lengths[n], exits[n] + 1) + (exits[n] + 1) * head for n in real)
        assert report.ideal == ideal
        assert report.padded == sum(found.rungs) * (of_row(LENGTH, 1) + head)
        assert report.full == sum(of_row(lengths[n], 4) + head for n in real)
        assert report.compiled > 0.5 * report.padded
        assert report.rows == 7 and report.left.tolist() == np.bincount(exits[exits >= 0], minlength=4).tolist()
        table, leaves = masked("dense")[1], leave(rule, masked("dense")[1])
        assert report.correct == table.correct[np.arange(7), leaves].sum()
        np.testing.assert_allclose(report.cross_entropy, table.loss[np.arange(7), leaves].sum(), rtol=1e-5)
        row = as_row(DENSE, report)
        assert row["exits"]["mean_layer"] == (leaves + 1).mean() and row["accuracy"] == report.correct / 7

    def test_a_row_costs_what_its_layers_do(self):
        costs = exit_costs(MODELS["experts that are too small"], 8)
        assert (np.diff(costs) > 0).all() and costs[1] - costs[0] > costs[0] - 2 * 16 * CLASSES


class TestRefused:
    @pytest.mark.parametrize(
        "change, ladder, said",
        [
            ({"head": ModelConfig().head, "causal": True}, (8,), "model.head=classes"),
            ({"exits": ModelConfig().exits}, (8,), "the model has no exits"),
            ({}, (), "ascending multiples of 1"),
            ({}, (4, 2), "ascending multiples of 1"),
            (
                {"pattern": ("moe",), "blocks": {"moe": MoESpec(group_size=24)}},
                (8,),
                r"model\.blocks\.moe\.group_size: 24: a group may hold tokens of several rows",
            ),
        ],
    )
    def test_what_cannot_leave(self, change, ladder, said):
        with jax.set_mesh(mesh_of(ONE)), pytest.raises(RequestError, match=said):
            ExitingEncoder(dataclasses.replace(DENSE, **change), None, LENGTH, ladder)

    def test_rows_do_not_share_devices_unevenly_or_compete_for_room(self):
        grouped = dataclasses.replace(DENSE, pattern=("moe",), blocks={"moe": MoESpec(dispatch="grouped")})
        with jax.set_mesh(mesh_of(CUBE)):
            with pytest.raises(RequestError, match="ascending multiples of 4"):
                ExitingEncoder(DENSE, None, LENGTH, (2, 4))
            with pytest.raises(RequestError, match="rows compete for the room"):
                ExitingEncoder(grouped, None, LENGTH, (4,))


CONFIG = ExperimentConfig(
    model=dataclasses.replace(DENSE, vocab_size=260, head=Classes(classes=3), blocks={"dense": DenseSpec(d_ff=32)}),
    data=DataConfig(
        name="synthetic", sequence_length=LENGTH, batch_size=4, task=Classify(classes=3, validation_rows=3)
    ),
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with jax.set_mesh(mesh_of(ONE)):
        state = jax.jit(lambda: init_state(CONFIG, make_optimizer(CONFIG)))()
    (folder / "config.json").write_text(to_json(CONFIG, {}, {}))
    checkpoints = Checkpoints(folder / "checkpoints", every=1, keep=1)
    checkpoints.save(1, state, {"tokens": 0, "flops": 0.0})
    checkpoints.close()
    return folder


class TestCommand:
    def test_it_tells_accuracy_exits_flops_and_throughput(self, run_folder, monkeypatch, capsys):
        monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
        said = []
        for flags in (
            [],
            ["--exit-rule=max_prob", "--exit-threshold=1"],
            ["--exit-rule=patience", "--exit-threshold=1"],
        ):
            assert cli.main(["eval", f"--workdir={run_folder}", *flags]) == 0
            said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        plain, never, patient = said
        assert never["accuracy"] == plain["accuracy"] and never["targets"] == plain["targets"] == 9
        assert never["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-5)
        assert never["exits"]["histogram"] == {"1": 0, "2": 0, "3": 0, "4": 9} and never["exits"]["mean_layer"] == 4
        assert patient["exit_rule"] == {"name": "patience", "patience": 1} and patient["examples_per_second"] > 0
        assert patient["exits"]["histogram"]["1"] == 0
        assert patient["exits"]["flops"]["ideal"] < never["exits"]["flops"]["ideal"]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--exit-rule=max_probs"], "exit rule 'max_probs'; known: max_prob, margin"),
            (["--exit-rule=max_prob", "--exit-threshold=2"], "2.0 is outside [0, 1]"),
            (["--exit-rule=patience", "--exit-threshold=1.5"], "1.5 is not a number of exits"),
            (["--exit-rule=patience", "--exit-threshold=0"], "0 is not positive"),
            (["--exit-rule=patience", "--exit-threshold=inf"], "inf is not finite"),
            (["--exit-rule=learned"], "it needs the scores of a learned exit head"),
            (["--exit-threshold=0.5"], "--exit-threshold has no effect without --exit-rule"),
            (["--exit-rule=entropy", "--trace=t.npz"], "--trace has no effect with --exit-rule"),
            (["--exit-rule=entropy", "--exit-table=t.npz"], "--exit-rule has no effect with --exit-table"),
            (["--exit-rule=entropy", "--parity"], "--exit-rule has no effect with --parity"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, run_folder, flags, said, monkeypatch, capsys):
        monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
        assert cli.main(["eval", f"--workdir={run_folder}", *flags]) == 2
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and not told.out

    def test_a_run_without_exits_is_refused(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
        without = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, exits=NoExits()))
        (tmp_path / "config.json").write_text(to_json(without, {}, {}))
        assert cli.main(["eval", f"--workdir={tmp_path}", "--exit-rule=entropy"]) == 2
        assert "the model has no exits" in capsys.readouterr().err
