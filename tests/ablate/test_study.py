"""Studies and their arms: what is refused, how arms are made equal, which pairs are unfair."""

import dataclasses
import json
from pathlib import Path

import pytest

from sparsejax.ablate import Arm, Study, grid
from sparsejax.ablate.arms import flops_per_token, resolve, training_flops
from sparsejax.ablate.fairness import refuse, unfair, unfair_runs
from sparsejax.ablate.match import BY_LEDGER, at_budget, matched
from sparsejax.ablate.study import chosen, load_study
from sparsejax.base.errors import RequestError

ROOT = Path(__file__).parents[2]
DENSE = {"model.pattern": ("dense", "dense")}


def study(base=Arm(), **more) -> Study:
    arm = more.pop("arm", Arm())
    settings = dict(question="Which?", config="configs/tiny.py", arms={"base": base, "arm": arm}, base="base") | more
    return Study(**settings)


def kinds(a_study: Study) -> list[str]:
    """Of the unfair pairs."""
    arms = {name: resolve(a_study, ROOT, name) for name in a_study.arms}
    return sorted({each.kind for each in unfair(a_study, arms)})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base": "bse"}, "base='bse' is no arm; arms: base, arm"),
        ({"arms": {"base": Arm()}}, "at least two arms"),
        ({"equal": "flops"}, "equal='flops'; allowed: active_flops"),
        ({"allow": ("axis",)}, "allow='axis'.*Did you mean 'axes'"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": 3}, "seeds=3; allowed: a tuple of int"),
        ({"seeds": (True,)}, "allowed: a tuple of int"),
        ({"varies": "model"}, "varies='model'; allowed: a tuple of str"),
        ({"budgets": ("2",)}, "allowed: a tuple of int or float"),
        ({"arms": {"base": Arm(), "arm": "x"}}, "arm 'arm' is 'x'; allowed: an Arm"),
        ({"budgets": (1.0,)}, "not 1, which is the base itself"),
        ({"effect": 0.0}, "effect=0.0; allowed: None, or more than 0"),
        ({"deviation": -0.1}, "deviation=-0.1; allowed: None, or more than 0"),
        ({"arms": {"base": Arm(exploratory=True), "arm": Arm()}}, "is exploratory"),
        ({"arms": {"base": Arm(), "a/b": Arm()}}, "a name has letters"),
        ({"arms": {"base": Arm(begin="arm"), "arm": Arm()}}, "begin='arm' is no arm before it"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(settings, message):
    fields = dict(question="Which?", config="configs/tiny.py", arms={"base": Arm(), "arm": Arm()}, base="base")
    with pytest.raises(RequestError, match=message):
        Study(**fields | settings)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "defines no STUDY"),
        ("STUDY = 1", "defines no STUDY"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_without_a_study_is_refused(tmp_path, text, message):
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        load_study(path)
    with pytest.raises(RequestError, match="no such study"):
        load_study(tmp_path / "other.py")


def test_a_grid_has_an_arm_for_every_combination():
    arms = grid(k={"k1": {"a": 1}, "k2": {"a": 2}}, c={"c1": {"b": 1}, "c2": {"b": 2}})
    assert {name: dict(arm.edits) for name, arm in arms.items()} == {
        "k1-c1": {"a": 1, "b": 1},
        "k1-c2": {"a": 1, "b": 2},
        "k2-c1": {"a": 2, "b": 1},
        "k2-c2": {"a": 2, "b": 2},
    }


def test_the_base_and_what_an_arm_begins_with_are_kept():
    arms = {"base": Arm(), "first": Arm(), "other": Arm(), "second": Arm(begin="first")}
    few = chosen(study(arms=arms), ["second"], [7])
    assert list(few.arms) == ["base", "first", "second"] and few.seeds == (7,)
    with pytest.raises(RequestError, match=r"--arms=secnd: no such arm.*Did you mean 'second'"):
        chosen(study(arms=arms), ["secnd"], None)


def test_an_error_of_an_arm_names_it():
    with pytest.raises(RequestError, match=r"^arm arm: config.model.d_modl"):
        resolve(study(arm=Arm(edits={"model.d_modl": 3})), ROOT, "arm")


def test_arms_get_the_flops_of_the_base():
    wide = study(arm=Arm(edits=DENSE, size="model.blocks.dense.d_ff"))
    arms = matched(wide, ROOT, (), BY_LEDGER["active_flops"])
    assert arms["arm"].config.model.blocks["dense"].d_ff == arms["arm"].sized["model.blocks.dense.d_ff"]
    assert training_flops(arms["arm"].config) == pytest.approx(training_flops(arms["base"].config), rel=0.01)
    assert flops_per_token(resolve(wide, ROOT, "arm").config) < 0.95 * flops_per_token(arms["base"].config)


def test_what_is_done_for_a_row_is_among_its_flops():
    """Soft MoE computes slots, not tokens."""
    sized = Arm(argument="encoder_soft_moe", size="model.blocks.moe.d_ff")
    soft = study(base=Arm(argument="encoder_dense"), arm=sized, config="configs/routing_arm.py")
    arms = matched(soft, ROOT, (), BY_LEDGER["active_flops"])
    assert training_flops(arms["arm"].config) == pytest.approx(training_flops(arms["base"].config), rel=0.01)
    assert arms["arm"].config.model.blocks["moe"].d_ff < 256 - 32  # logits, dispatch and combine are taken from it


def test_fewer_steps_keep_the_share_of_warm_up_and_so_the_schedule():
    narrow = study(arm=Arm(edits={"model.d_model": 64, "train.steps": 1000}, size="train.steps"), varies=("model",))
    arms = matched(narrow, ROOT, (("train.steps", "1000"),), BY_LEDGER["active_flops"])
    steps = arms["arm"].config.train.steps
    assert steps < 600 and arms["arm"].sized["optimizer.schedule.warmup_steps"] == max(1, round(5 * steps / 1000))
    assert unfair(narrow, arms) == []


def test_arms_are_matched_by_parameters_and_by_tokens():
    few = study(arm=Arm(edits={"model.blocks.moe.num_experts": 4}, size="model.blocks.moe.d_ff"), varies=("model",))
    arms = matched(few, ROOT, (), BY_LEDGER["total_parameters"])
    assert 240 < arms["arm"].sized["model.blocks.moe.d_ff"] < 270
    half = study(arm=Arm(edits={"data.batch_size": 4}, size="train.steps"))
    assert matched(half, ROOT, (), BY_LEDGER["tokens"])["arm"].config.train.steps == 40


def test_what_an_arm_begins_with_counts_as_spent():
    half = Arm(edits={"train.steps": 10})
    begun, on = dataclasses.replace(half, exploratory=True), dataclasses.replace(half, begin="begun")
    arms = {"begun": begun, "base": Arm(), "on": on}
    found = matched(study(arms=arms), ROOT, (), BY_LEDGER["active_flops"])
    assert {name: arm.config.train.steps for name, arm in found.items()} == {"begun": 10, "base": 20, "on": 10}
    with pytest.raises(RequestError, match=r"arms on and base cannot be matched: active_flops is 0\.500"):
        matched(study(arms={"base": Arm(), "on": half}), ROOT, (), BY_LEDGER["active_flops"])
    with pytest.raises(RequestError, match="base, which on begins with, has spent"):
        matched(study(arms={"base": Arm(), "on": Arm(begin="base")}), ROOT, (), BY_LEDGER["active_flops"])


@pytest.mark.parametrize(
    "arm, message",
    [
        (Arm(edits=DENSE), "neither Study.size nor Arm.size names a key"),
        (Arm(edits=DENSE, size="model.blocks.dense.d_ff", multiple=128), "the nearest is model.blocks.dense.d_ff="),
        (Arm(edits=DENSE, size="model.attention"), "what is solved for is a whole number"),
    ],
)
def test_arms_that_cannot_be_matched_are_refused(arm, message):
    with pytest.raises(RequestError, match=message):
        matched(study(arm=arm), ROOT, (), BY_LEDGER["active_flops"])


def test_the_base_at_another_budget_keeps_its_schedule():
    double = at_budget(study(), ROOT, (), 2.0).config
    assert (double.train.steps, double.optimizer.schedule.warmup_steps) == (40, 10)


@pytest.mark.parametrize(
    "edits, kind",
    [
        ({"train.seed": 1}, "data_order"),
        ({"data.batch_size": 4}, "data_order"),
        ({"optimizer.schedule.warmup_steps": 10}, "schedule"),
        ({"optimizer.schedule.final_fraction": 0.5}, "schedule"),
        ({"eval.batches": 3}, "evaluation"),
        ({"model.d_model": 64}, "axes"),
    ],
)
def test_every_kind_of_unfair_pair_is_found(edits, kind):
    varies = ("optimizer.schedule", "data") if kind != "axes" else ()
    found = kinds(study(arm=Arm(edits=edits), varies=varies))
    assert found == [kind]


@pytest.mark.parametrize(
    "config, argument, edits",
    [
        ("configs/routing_arm.py", "encoder_dense", {"data.task.rate": 0.3}),
        ("configs/tokens_arm.py", "full", {"model.head.pool": "first"}),
    ],
)
def test_other_targets_are_another_denominator(config, argument, edits):
    """Also where the study names the key: what counts in a loss is no axis."""
    base, arm = Arm(argument=argument), Arm(argument=argument, edits=edits)
    pair = study(base=base, arm=arm, config=config, varies=tuple(edits))
    assert kinds(pair) == ["denominator"]
    found = unfair(pair, {name: resolve(pair, ROOT, name) for name in pair.arms})
    with pytest.raises(RequestError, match=f"unfair: arm arm: denominator: config.{next(iter(edits))} is .*, not "):
        refuse(found, ())


def test_what_a_study_names_is_no_unfair_pair():
    assert kinds(study(arm=Arm(edits={"model.d_model": 64}), varies=("model",))) == []
    assert kinds(study()) == []


def test_unfair_pairs_are_refused_unless_allowed():
    arms = study(arm=Arm(edits={"eval.batches": 3}), varies=("eval.batches",))
    found = unfair(arms, {name: resolve(arms, ROOT, name) for name in arms.arms})
    with pytest.raises(RequestError, match=r"unfair: arm arm: evaluation: config.eval.batches is 3, not None; allow="):
        refuse(found, ())
    assert refuse(found, ("evaluation",)) == found


def a_run(path: Path, corpus="a", convention="b", **row) -> Path:
    path.mkdir()
    environment = {"corpus": {"hash": corpus}, "flops_convention": convention}
    (path / "config.json").write_text(json.dumps({"environment": environment}))
    row = {"step": 1, "split": "eval", "targets": 100, "padding_fraction": 0.0} | row
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return path


def test_what_no_run_recorded_is_not_known_to_be_equal(tmp_path):
    pair = [a_run(tmp_path / name, corpus=None, convention=None) for name in ("base", "arm")]
    assert [each.kind for each in unfair_runs(*pair, "arm")] == ["evaluation", "flops"]


@pytest.mark.parametrize(
    "differs, kind",
    [
        ({"targets": 99}, "denominator"),
        ({"padding_fraction": 0.1}, "denominator"),
        ({"corpus": "c"}, "evaluation"),
        ({"convention": "c"}, "flops"),
        ({"corpus": None}, "evaluation"),
        ({"convention": None}, "flops"),
        ({}, None),
    ],
)
def test_what_finished_runs_tell_is_compared(tmp_path, differs, kind):
    found = unfair_runs(a_run(tmp_path / "base"), a_run(tmp_path / "arm", **differs), "arm")
    assert [each.kind for each in found] == ([] if kind is None else [kind])
