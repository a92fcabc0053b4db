"""What a training run writes down: rows, counts, what it spent; one compile; and how it ends when losses are NaN."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.config import from_json
from sparsejax.base.ratios import balance_floor
from sparsejax.base.sharding import shard_batch
from sparsejax.blocks.altup import AltUp
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches, train_rows
from sparsejax.train import diagnose, evaluate, loop
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.diagnose import first_bad_module
from sparsejax.train.state import make_optimizer, new_state
from sparsejax.train.step import Gradients

from runs import EVAL_EVERY, LOG_EVERY, SAVE_EVERY, STEPS, arguments, here, losses, rows, stop_at
from support import on_mesh

LOSSES = {"loss", "cross_entropy", "accuracy", "bits_per_byte", "loss/balance", "loss/router_z"}
SPENT = {"step", "split", "tokens", "flops", "seconds", "learning_rate", "nonfinite_steps"}
SPEED = {"step_seconds", "tokens_per_second", "data_wait_fraction"}
MOE = {
    "moe/drop_fraction",
    "moe/unserved_fraction",
    "moe/load_max_over_mean",
    "moe/load_cv",
    "moe/dead_experts",
    "moe/router_entropy",
    "moe/router_z",
    "moe/capacity_factor",
    "moe/slots_per_token",
    "moe/slot_utilisation",
    "moe/experts_per_token",
    "moe/balance_loss",
    "moe/balance_floor",
}
TRAIN_STEPS = [1, *range(LOG_EVERY, STEPS + 1, LOG_EVERY)]


@pytest.fixture(scope="module")
def config(finished_run):
    return from_json(ExperimentConfig, (finished_run / "config.json").read_text()).config


def spec_of(config):
    return config.model.blocks["moe"]


def routing(workdir, step):
    with np.load(workdir / "routing" / f"{step}.npz") as arrays:
        return dict(arrays)


def test_rows_come_at_the_first_step_every_so_many_and_the_last(finished_run):
    train, evaluation = rows(finished_run, "train"), rows(finished_run, "eval")
    assert list(train) == TRAIN_STEPS
    assert list(evaluation) == [*range(EVAL_EVERY, STEPS, EVAL_EVERY), STEPS]
    assert {int(path.stem) for path in (finished_run / "routing").iterdir()} == set(TRAIN_STEPS)
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == sorted(
        str(step) for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
    )


def test_rows_have_every_metric(finished_run):
    for row in rows(finished_run, "train").values():
        assert set(row) == LOSSES | SPENT | SPEED | MOE | {"grad_norm", "window_steps"}
    for row in rows(finished_run, "eval").values():
        assert set(row) == LOSSES | SPENT | MOE | {"targets", "padding_fraction"}
    for split in ("train", "eval"):
        values = [value for row in rows(finished_run, split).values() for key, value in row.items() if key != "split"]
        assert all(math.isfinite(value) for value in values)


def test_a_run_without_drops_says_how_it_multiplies(tmp_path):
    """A dense fallback of the grouped product is told, not silent."""
    block = {"model__blocks__moe__dispatch": "grouped", "model__blocks__moe__grouped_matmul": "ragged_dot"}
    done = here(*arguments("train", f"--workdir={tmp_path / 'run'}", train__steps=6, **block))
    assert done.status == 0, done.err
    assert "block moe: grouped products by ragged_dot, compiled here to dense products: 8." in done.out
    row = rows(tmp_path / "run", "train")[6]
    assert row["moe/drop_fraction"] == 0 and row["moe/block_fraction"] == 0


def test_a_run_over_devices_without_drops_says_how_full_its_buffers_were(tmp_path):
    words = arguments("train", f"--workdir={tmp_path}/run", "--mesh=2,4,1", train__steps=6)
    done = here(*words, "--config.model.blocks.moe.dispatch=grouped", "--config.model.blocks.moe.buffer_factor=1.25")
    assert done.status == 0, done.err
    assert "grouped products by slots; rows exchanged by all_to_all" in done.out
    row = rows(tmp_path / "run", "train")[6]
    assert 0 < row["moe/buffer_occupancy"] <= 1 < row["moe/safe_buffer_factor"]
    arrays = dict(np.load(tmp_path / "run" / "routing" / "6.npz", allow_pickle=False))
    lost = {name: values for name, values in arrays.items() if name.endswith("/exchange/dropped")}
    assert lost and sum(values.sum() for values in lost.values()) > 0
    for name, values in lost.items():
        assert np.array_equal(values, arrays[name.replace("/exchange", "")])


def test_losses_are_related_as_they_should_be(finished_run):
    for row in [*rows(finished_run, "train").values(), *rows(finished_run, "eval").values()]:
        terms = row["loss/balance"] + row["loss/router_z"]
        assert row["loss"] == pytest.approx(row["cross_entropy"] + terms, rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(row["cross_entropy"] / math.log(2), rel=1e-12)
    curve = losses(finished_run)
    assert curve[STEPS] < curve[1] - 0.1


def test_what_was_spent_adds_up(finished_run, config):
    """Tokens are those of the batches (padding does not count); every row says how many steps its counts are of."""
    per_step = config.data.batch_size * config.data.sequence_length
    previous = 0
    seconds = flops = 0.0
    for step, row in rows(finished_run, "train").items():
        assert row["window_steps"] == step - previous
        assert step * per_step * 0.9 < row["tokens"] <= step * per_step
        assert row["seconds"] > seconds and row["flops"] > flops
        assert 0 <= row["data_wait_fraction"] <= 1
        assert row["tokens_per_second"] * row["step_seconds"] <= per_step * 1.001
        previous, seconds, flops = step, row["seconds"], row["flops"]
    assert rows(finished_run, "eval")[STEPS]["tokens"] == rows(finished_run, "train")[STEPS]["tokens"]


def test_the_learning_rate_is_that_of_the_logged_step(finished_run):
    """tiny.py warms up for 5 steps: step s of them runs at s / 6 of the peak."""
    rates = {step: row["learning_rate"] for step, row in rows(finished_run, "train").items()}
    assert rates[1] == pytest.approx(3e-3 / 6, rel=1e-6)
    assert rates[4] == pytest.approx(3e-3 * 4 / 6, rel=1e-6)
    assert rates[STEPS] < rates[8] < 3e-3


def test_counts_are_integers_and_nothing_is_lost(finished_run, config):
    """`assigned = processed + dropped` for every expert, over all steps since the previous row; a token has k pairs."""
    before = 0
    for step in TRAIN_STEPS:
        arrays = routing(finished_run, step)
        layers = {name.partition("/")[0] for name in arrays}
        assert layers == {layer.name for layer in config.model.layers if layer.block == "moe"}
        seen = rows(finished_run, "train")[step]["tokens"]
        for layer in layers:
            assigned, processed, dropped = (
                arrays[f"{layer}/{field}"] for field in ("assigned", "processed", "dropped")
            )
            for counts in (assigned, processed, dropped):
                assert counts.shape == (spec_of(config).num_experts,)
                assert np.issubdtype(counts.dtype, np.integer)
                assert (counts >= 0).all()
            assert np.array_equal(assigned, processed + dropped)
            assert arrays[f"{layer}/tokens"] == seen - before
            assert assigned.sum() == spec_of(config).experts_per_token * (seen - before)
            assert dropped.sum() > 0, "at this capacity some pairs are dropped; else the test says nothing"
        before = seen


def test_moe_metrics_are_those_of_the_counts(finished_run, config):
    """The definitions of the interface, from the arrays alone."""
    spec = spec_of(config)
    for step in TRAIN_STEPS:
        row, arrays = rows(finished_run, "train")[step], routing(finished_run, step)
        layers = sorted({name.partition("/")[0] for name in arrays})
        of = [
            {
                name.removeprefix(f"{layer}/"): a.astype(float)
                for name, a in arrays.items()
                if name.startswith(f"{layer}/")
            }
            for layer in layers
        ]
        expected = {
            "drop_fraction": [a["dropped"].sum() / a["assigned"].sum() for a in of],
            "unserved_fraction": [a["unserved"] / a["tokens"] for a in of],
            "load_max_over_mean": [a["assigned"].max() / a["assigned"].mean() for a in of],
            "load_cv": [a["assigned"].std() / a["assigned"].mean() for a in of],
            "router_entropy": [a["entropy_sum"] / a["tokens"] / math.log(spec.num_experts) for a in of],
            "router_z": [a["z_sum"] / a["tokens"] for a in of],
            "slots_per_token": [a["slots"] / a["tokens"] for a in of],
            "slot_utilisation": [a["processed"].sum() / a["slots"] for a in of],
            "balance_loss": [a["balance_sum"] / a["balance_units"] for a in of],
            "balance_floor": [balance_floor(int(a["tokens"]), spec.num_experts, spec.experts_per_token) for a in of],
            "capacity_factor": [spec.capacity_factor],
        }
        for name, values in expected.items():
            assert row[f"moe/{name}"] == pytest.approx(np.mean(values), rel=1e-12), name
        dead = sum((a["assigned"] < 0.01 * a["assigned"].mean()).sum() for a in of)
        assert row["moe/dead_experts"] == dead
        loss = sum(a["balance_sum"] / a["balance_units"] for a in of) * spec.router.balance.coefficient
        if row["window_steps"] == 1:
            assert row["loss/balance"] == pytest.approx(loss, rel=1e-6)


def test_the_step_is_compiled_once(tmp_path, monkeypatch):
    """Fifteen steps, two evaluations and five checkpoints see one trace of the step and one of the evaluation."""
    traced = []

    def counting(make, name):
        def made(*args, **settings):
            step = make(*args, **settings)

            @functools.wraps(step)  # by the name, XLA's program is found again
            def counted(state, batch):
                traced.append(name)
                return step(state, batch)

            return counted

        return made

    monkeypatch.setattr(loop, "make_train_step", counting(loop.make_train_step, "train"))
    monkeypatch.setattr(evaluate, "make_eval_step", counting(evaluate.make_eval_step, "eval"))
    assert here(*arguments("train", f"--workdir={tmp_path / 'run'}")).status == 0
    assert traced == ["train", "eval"]


def test_a_mesh_changes_where_and_not_what(finished_run, tmp_path):
    """Eight devices, the batch in four parts and two microbatches: the same losses, and the same integers."""
    workdir = tmp_path / "run"
    done = here(*arguments("train", f"--workdir={workdir}", "--mesh=2,2,2", train__accumulation=2))
    assert done.status == 0, done.err
    for step, loss in losses(finished_run).items():
        assert losses(workdir)[step] == pytest.approx(loss, rel=1e-5)
    ours, theirs = routing(workdir, 1), routing(finished_run, 1)
    for name, counts in theirs.items():
        if np.issubdtype(counts.dtype, np.integer):
            assert np.array_equal(ours[name], counts), name


def test_a_profile_is_written_on_request(tmp_path):
    workdir = tmp_path / "run"
    done = here(*arguments("train", f"--workdir={workdir}", train__profile="(3, 4)"))
    assert done.status == 0, done.err
    assert f"{workdir}/profile" in done.out
    assert [path.suffix for path in (workdir / "profile").rglob("*.xplane.pb")] == [".pb"]


def test_no_profile_and_no_events_unless_wanted(finished_run):
    assert {path.name for path in finished_run.iterdir() if not path.name.startswith(".")} == {
        "config.json",
        "metrics.jsonl",
        "routing",
        "evaluations",
        "checkpoints",
    }


def test_the_last_words_say_what_was_written_and_what_is_next(finished_run, finished_output):
    final = rows(finished_run, "eval")[STEPS]
    quality = f"cross-entropy {final['cross_entropy']:.4f} nats/token, {100 * final['accuracy']:.2f} % right, "
    quality += f"{final['bits_per_byte']:.4f} bits per byte"
    assert f"validation: {quality}" in finished_output
    assert "01_moe" in finished_output and "max/mean" in finished_output
    for name in ("config.json", "metrics.jsonl", "routing", "evaluations", "checkpoints"):
        assert f"  {finished_run}/{name} " in finished_output
    for name in ("tensorboard", "profile"):
        assert name not in finished_output, "it was not written"
    assert f"python -m sparsejax eval --workdir={finished_run}" in finished_output


@functools.cache
def poisoned_at(steps, make):
    """`make_train_step` whose steps with these numbers see parameters that are NaN."""

    @functools.cache
    def made(config, tx):
        step = make(config, tx)

        def poisoned(state, batch):
            bad = jnp.isin(state.step + 1, jnp.array(steps))
            params = jax.tree.map(lambda a: jnp.where(bad, jnp.nan, a), state.params)
            new, report = step(dataclasses.replace(state, params=params), batch)
            kept = jax.tree.map(lambda old, stepped: jnp.where(bad, old, stepped), state.params, new.params)
            return dataclasses.replace(new, params=kept), report

        return poisoned

    return made


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    """Steps 2, 3 and 7 are lost and say so; streaks are shorter than `max_nonfinite`, so the run goes on."""
    monkeypatch.setattr(loop, "make_train_step", poisoned_at((2, 3, 7), loop.make_train_step))
    workdir = tmp_path / "run"
    done = here(*arguments("train", f"--workdir={workdir}", train__max_nonfinite=3))
    assert done.status == 0, done.err
    assert {step: row["nonfinite_steps"] for step, row in rows(workdir, "train").items()} == {1: 0, 4: 2, 8: 3, 12: 3}
    assert rows(workdir, "eval")[STEPS]["nonfinite_steps"] == 3
    assert "step 3: loss or gradient is not finite; the step is skipped (2 in a row)" in done.out
    assert "step 7: loss or gradient is not finite; the step is skipped (1 in a row)" in done.out
    assert math.isfinite(losses(workdir)[STEPS])


def test_accounting_one_step_behind_writes_the_same(finished_run, tmp_path, monkeypatch):
    """As on an accelerator: the host reads a step's report while the next step runs."""
    monkeypatch.setattr(loop, "steps_ahead", lambda: 1)
    behind = []
    add = loop._Run._add
    monkeypatch.setattr(
        loop._Run,
        "_add",
        lambda self, report, batch, state: (
            behind.append(int(state.step) - int(report.step)),
            add(self, report, batch, state),
        ),
    )
    workdir = tmp_path / "run"
    assert here(*arguments("train", f"--workdir={workdir}")).status == 0
    assert set(behind) == {0, 1} and len(behind) == STEPS
    timing = SPEED | {"seconds"}
    for split in ("train", "eval"):
        found, expected = rows(workdir, split), rows(finished_run, split)
        assert list(found) == list(expected)
        for step, row in found.items():
            assert {k: v for k, v in row.items() if k not in timing} == {
                k: v for k, v in expected[step].items() if k not in timing
            }
    for step in TRAIN_STEPS:
        ours, theirs = routing(workdir, step), routing(finished_run, step)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_one_step_behind_a_bad_step_is_still_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "steps_ahead", lambda: 1)
    monkeypatch.setattr(loop, "make_train_step", poisoned_at((2, 3, 7), loop.make_train_step))
    workdir = tmp_path / "run"
    done = here(*arguments("train", f"--workdir={workdir}", train__max_nonfinite=3))
    assert done.status == 0, done.err
    assert "step 3: loss or gradient is not finite; the step is skipped (2 in a row)" in done.out
    assert {step: row["nonfinite_steps"] for step, row in rows(workdir, "train").items()} == {1: 0, 4: 2, 8: 3, 12: 3}


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path, monkeypatch):
    """Two are lost before it, one after."""
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}", train__max_nonfinite=3)
    monkeypatch.setattr(loop, "make_train_step", poisoned_at((2, 3, 7), loop.make_train_step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Display, "update", stop_at(5))
        assert "stopped by SIGTERM after step 5" in here(*words).out
    assert rows(workdir, "train")[5]["nonfinite_steps"] == 2
    assert here(*words).status == 0
    assert rows(workdir, "train")[STEPS]["nonfinite_steps"] == 3


def test_the_status_of_a_stopped_run_can_be_chosen(tmp_path):
    """A script that gets it knows that the run is saved, and not finished."""
    words = arguments("train", f"--workdir={tmp_path / 'run'}", "--stopped-status=75")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Display, "update", stop_at(5))
        assert here(*words).status == 75
    assert here(*words).status == 0
    assert here(*words).status == 0  # it is finished


def test_a_run_that_stays_nan_stops_and_names_the_module(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", poisoned_at(tuple(range(5, STEPS)), loop.make_train_step))
    workdir = tmp_path / "run"
    done = here(*arguments("train", f"--workdir={workdir}", train__max_nonfinite=3))
    assert done.status == 1
    assert done.err.startswith("failed: 3 steps in a row were not finite (train.max_nonfinite): ")
    assert list(rows(workdir, "train")) == [1, 4]
    assert (workdir / "checkpoints" / "3").is_dir()


def test_a_parameter_that_is_nan_from_the_start_is_named(tmp_path, monkeypatch):
    def broken(config, tx):
        state = new_state(config, tx)
        return dataclasses.replace(state, params=planted(state.params, "final_norm.scale", math.nan))

    monkeypatch.setattr(loop, "new_state", broken)
    done = here(*arguments("train", f"--workdir={tmp_path / 'run'}", train__max_nonfinite=2))
    assert done.status == 1
    first, second = done.err.splitlines()[:2]
    assert first.endswith(
        "2 steps in a row were not finite (train.max_nonfinite): parameter final_norm.scale is not finite"
    )
    assert second.startswith("Traceback")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] is None and row["nonfinite_steps"] == 1


def planted(params, path, value, repeat=...):
    """`params` with the numbers of one parameter (or of one repeat of it) replaced."""
    flat = dict(nnx.to_flat_state(params))
    key = next(key for key in flat if ".".join(map(str, key)) == path)
    old = flat[key][...]
    new = np.array(old)
    new[repeat] = value
    flat[key] = flat[key].replace(jax.device_put(new, old.sharding))
    return nnx.from_flat_state(flat)


@pytest.fixture(scope="module")
def sound(config):
    """(config, state, microbatches, mesh) of a model of two repeats."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, repeats=2))
    with on_mesh((1, 1, 1)) as mesh:
        tx = make_optimizer(config)
        state = new_state(config, tx)
        batch = train_rows(open_corpus(config.data), config.data, 0).rows(np.arange(4))
        return config, state, shard_batch(batch | {"rows": np.arange(4, dtype=np.int32)}, mesh, 1), mesh


BLOCKS = "stack.units.blocks"


@pytest.mark.parametrize(
    ("path", "value", "repeat", "named"),
    [
        ("final_norm.scale", math.nan, ..., "parameter final_norm.scale is not finite"),
        ("final_norm.scale", 3e38, ..., "the output of final_norm is not finite"),
        (f"{BLOCKS}.1.feed_forward.router.weight", 3e38, 1, "the output of layer 03_moe is not finite"),
        (f"{BLOCKS}.0.feed_forward.mlp.w_out.weight", 3e38, 1, "the output of layer 02_dense is not finite"),
        (f"{BLOCKS}.0.attention.out.weight", 3e38, 0, "the output of layer 00_dense is not finite"),
    ],
)
def test_the_first_bad_module_is_the_one_that_was_broken(sound, path, value, repeat, named):
    config, state, microbatches, mesh = sound
    with jax.set_mesh(mesh):
        state = dataclasses.replace(state, params=planted(state.params, path, value, repeat))
        assert first_bad_module(config, state, microbatches, int(state.step)) == named


def test_the_first_bad_module_of_a_model_with_streams(config):
    wide = AltUp(embedding="wide", collapse="concatenate")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, repeats=2, streams=wide))
    with on_mesh((1, 1, 1)) as mesh:
        state = new_state(config, make_optimizer(config))
        batch = train_rows(open_corpus(config.data), config.data, 0).rows(np.arange(4))
        microbatches = shard_batch(batch | {"rows": np.arange(4, dtype=np.int32)}, mesh, 1)
        sound = "every module is finite when the step is repeated"
        assert first_bad_module(config, state, microbatches, int(state.step)) == sound
        broken = planted(state.params, f"{BLOCKS}.0.mixer.correction", 3e38, 1)
        state = dataclasses.replace(state, params=broken)
        named = "the output of layer 02_dense is not finite"
        assert first_bad_module(config, state, microbatches, int(state.step)) == named


def test_a_bad_gradient_is_named_when_all_outputs_are_finite(sound, monkeypatch):
    config, state, microbatches, mesh = sound

    def broken(config):
        bad = lambda params: jax.tree.map(lambda a: a / (a.ndim - 1), params)  # noqa: E731  of vectors: 1 / 0
        return lambda params, *_: (None, Gradients(dense=bad(params), rows={}))

    with jax.set_mesh(mesh):
        assert (
            first_bad_module(config, state, microbatches, int(state.step))
            == "every module is finite when the step is repeated"
        )
        monkeypatch.setattr(diagnose, "make_grads_of_step", broken)
        assert (
            first_bad_module(config, state, microbatches, int(state.step))
            == "the gradient of final_norm.scale is not finite"
        )


def test_evaluation_covers_the_split(finished_run, config):
    """As many targets as the rows of that many batches have."""
    corpus = open_corpus(config.data)
    batches = list(eval_batches(corpus, config.data, config.data.batch_size, config.eval.batches))
    assert len(batches) == config.eval.batches
    row = rows(finished_run, "eval")[STEPS]
    assert row["targets"] == sum(int(batch["loss_mask"].sum()) for batch in batches)
    padding = [(batch["segments"] == 0)[(batch["segments"] > 0).any(-1)] for batch in batches]
    assert row["padding_fraction"] == pytest.approx(np.concatenate(padding).mean(), abs=1e-12)


def test_the_sums_of_every_batch_of_an_evaluation_are_kept(finished_run, config):
    """In the order of the batches; what stands in the row is made of them."""
    corpus = open_corpus(config.data)
    batches = list(eval_batches(corpus, config.data, config.data.batch_size, config.eval.batches))
    evaluated = rows(finished_run, "eval")
    assert {int(path.stem) for path in (finished_run / "evaluations").iterdir()} == set(evaluated)
    for step, row in evaluated.items():
        with np.load(finished_run / "evaluations" / f"{step}.npz") as arrays:
            nats, targets = arrays["nats"], arrays["targets"]
        assert (nats.dtype, targets.dtype) == (np.float64, np.int64)
        assert targets.tolist() == [int(batch["loss_mask"].sum()) for batch in batches]
        assert row["cross_entropy"] == pytest.approx(nats.sum() / targets.sum(), rel=1e-12)
        assert len(set(nats)) == len(batches) > 1


def test_the_microbatches_of_a_batch_are_one_in_the_sums(finished_run, tmp_path):
    words = arguments("train", f"--workdir={tmp_path}/run", train__accumulation=2)
    assert here(*words).status == 0
    ours, theirs = (np.load(run / "evaluations" / f"{EVAL_EVERY}.npz") for run in (tmp_path / "run", finished_run))
    assert np.array_equal(ours["targets"], theirs["targets"])
    np.testing.assert_allclose(ours["nats"], theirs["nats"], rtol=1e-3)
