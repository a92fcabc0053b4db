"""The exit table of a model against what NumPy makes of its logits, and the command that writes it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import cli
from sparsejax.base import devices
from sparsejax.base.config import to_json
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.data.tasks import Classify
from sparsejax.infer import exit_evaluation
from sparsejax.infer.exit_evaluation import exit_flops, make_measures, table_of
from sparsejax.infer.exit_rules import RULES, fit_temperatures, leave
from sparsejax.infer.exit_table import ExitTable, exit_table
from sparsejax.model.cost import mean_keys, total
from sparsejax.model.exits import ExitHeads
from sparsejax.model.heads import Classes
from sparsejax.model.partial import logits_at
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import EvalConfig, ExperimentConfig
from sparsejax.train.state import abstract_model, init_state, make_optimizer

from support import host_batch, on_mesh, put_batch
from tiny import ONE, SPARSE, mesh_of, variables

MODEL = dataclasses.replace(SPARSE, vocab_size=256, exits=ExitHeads(layers=(1,), head="own"))
CONFIG = ExperimentConfig(
    model=MODEL,
    data=DataConfig(name="synthetic", sequence_length=16, batch_size=4),
    eval=EvalConfig(batches=2),
)


@pytest.mark.parametrize("shape", [ONE, (2, 1, 2)])
def test_measures_are_those_of_the_logits(shape, monkeypatch):
    monkeypatch.setattr("sparsejax.ops.head_loss.AT_ONCE", 4 * 6 * 256)  # in pieces
    arrays = host_batch(4, 12, vocab=256)
    with on_mesh(shape) as mesh:
        model, batch = variables(MODEL, mesh), put_batch(arrays, mesh)
        graph = abstract_model(MODEL)[0]

        @jax.jit
        def logits(model, batch):
            lm = nnx.merge(graph, model.params, model.model_state)
            out = lm(batch, mode="eval")
            features = (*out.exits, out.features)
            return [logits_at(lm, x, depth) for x, depth in zip(features, (1, 2), strict=True)], features

        found = jax.tree.map(np.asarray, jax.jit(make_measures(MODEL))(model, batch))
        said, features = jax.tree.map(np.asarray, jax.block_until_ready(logits(model, batch)))
    flat = lambda each: np.stack([a.reshape(48, -1) for a in each], 1)  # noqa: E731
    targets = arrays["targets"].reshape(-1)
    want = exit_table(flat(said), targets, cost=np.arange(2), depth=np.arange(2), states_NED=flat(features))
    for name, values in found.items():
        np.testing.assert_allclose(values.reshape(48, 2), getattr(want, name), rtol=2e-4, atol=2e-6, err_msg=name)


ROWS_OF_CLASSES = ExperimentConfig(
    model=dataclasses.replace(MODEL, vocab_size=260, causal=False, head=Classes(classes=3)),
    data=DataConfig(name="synthetic", sequence_length=16, batch_size=4, task=Classify(classes=3, validation_rows=3)),
)


def test_a_classifiers_examples_are_rows():
    config = ROWS_OF_CLASSES
    graph_of = lambda: abstract_model(config.model)[0]  # noqa: E731
    corpus = open_corpus(config.data)
    with on_mesh(ONE) as mesh:
        model = variables(config.model, mesh)
        table = table_of(config, model, corpus, mesh)
        graph, said, states, targets = graph_of(), [], [], []
        run = jax.jit(lambda model, batch: nnx.merge(graph, model.params, model.model_state)(batch, mode="eval"))
        for batch in eval_batches(corpus, config.data, 4):
            out = jax.block_until_ready(run(model, put_batch(batch, mesh)))
            real = batch["loss_mask"][:, 0]
            features = [np.asarray(x)[real, 0] for x in (*out.exits, out.features)]
            own = nnx.merge(graph, model.params, model.model_state)
            weights = [own.exits.heads[0].weight[...], own.head.weight[...]]
            logits = [5 * np.tanh(x @ np.asarray(w) / 5) for x, w in zip(features, weights, strict=True)]
            said.append(np.stack(logits, 1))
            states.append(np.stack(features, 1))
            targets.append(batch["targets"][real, 0])
    assert len(table) == 9 and table.classes == 3 and len(np.unique(table.group)) == 9
    flops = exit_flops(config.model, 16)
    more = {"cost": flops, "depth": np.array([1, 2]), "states_NED": np.concatenate(states), "keep_logits": True}
    want = exit_table(np.concatenate(said), np.concatenate(targets), **more)
    for field in dataclasses.fields(ExitTable):
        if field.name not in ("group", "score"):
            found, expected = getattr(table, field.name), getattr(want, field.name)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5, err_msg=field.name)
    for name in ("max_prob", "margin", "entropy", "patience", "similarity_patience", "state_similarity"):
        np.testing.assert_array_equal(leave(RULES[name](), table), leave(RULES[name](), want))
    assert len(fit_temperatures(table)) == 2
    # A product with the classes for each exit, once for a row, is part of it.
    assert flops[-1] == 16 * total(config.model).flops(16, 16)


def test_the_last_exit_costs_the_model():
    flops = exit_flops(MODEL, 16)
    # `total` counts both heads, too.
    assert flops[-1] == total(MODEL).flops(mean_keys(MODEL, 16), 16)
    assert 0 < flops[0] < flops[1]


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


def test_the_command_writes_a_table_that_agrees_with_evaluation(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
    path = tmp_path / "exits.npz"
    assert cli.main(["eval", f"--workdir={run_folder}", f"--exit-table={path}"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = ExitTable.load(path)
    assert (table.depth == [1, 2]).all() and said["examples"] == len(table)
    assert cli.main(["eval", f"--workdir={run_folder}"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["targets"] == len(table) and len(np.unique(table.group)) == 8
    np.testing.assert_allclose(table.loss.mean(0), [row["exit/01/cross_entropy"], row["cross_entropy"]], rtol=1e-5)
    assert said["exit/01"]["cross_entropy"] == pytest.approx(row["exit/01/cross_entropy"], rel=1e-5)


def test_a_model_without_exits_has_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(CONFIG, model=SPARSE), {}, {}))
    assert cli.main(["eval", f"--workdir={tmp_path}", "--exit-table=exits.npz"]) == 2
    assert "the model has no exits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--exit-table=nowhere/exits.npz"], "there is no folder nowhere"),
        (["--exit-table=exits.csv"], "has to end in .npz"),
        (["--exit-table=exits.npz", "--trace=t.npz"], "--trace has no effect with --exit-table"),
    ],
)
def test_what_cannot_be_written_is_one_line(run_folder, flags, said, monkeypatch, capsys):
    monkeypatch.setattr(devices, "prepare_devices", lambda count: None)
    monkeypatch.setattr(exit_evaluation, "table_of", None)
    assert cli.main(["eval", f"--workdir={run_folder}", *flags]) == 2
    assert said in (told := capsys.readouterr()).err and told.err.count("\n") == 1
