"""The studies in `experiments/`: their arms are what their pages say, and the pages are made from the figures."""

import json
import sys
from pathlib import Path

import pytest

from sparsejax.ablate.arms import resolve
from sparsejax.ablate.fairness import refuse, unfair
from sparsejax.ablate.figures import draw
from sparsejax.ablate.match import BY_LEDGER, matched
from sparsejax.ablate.page import write_page
from sparsejax.ablate.study import load_study

ROOT = Path(__file__).parents[1]
NAMES = ("tokens", "exits")
STUDIES = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "from sparsejax.ablate import" in path.read_text()
)
COMMITTED = [name for name in STUDIES if (ROOT / "experiments" / f"{name}.json").is_file()]


@pytest.fixture
def study(monkeypatch):
    """A study's module by name."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))

    def module(name):
        for each in ("arms", "encoders", *NAMES):
            monkeypatch.delitem(sys.modules, each, raising=False)
        return __import__(name)

    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_a_config(study, name):
    arms = study(name).STUDY
    for arm in arms.arms:
        arms.experiment(arm)


def test_arms_begin_with_arms_that_are_trained_before_them(study):
    tokens = study("tokens").STUDY
    assert tokens.begin["ltp"] == "begun"
    for arm, begin in tokens.begin.items():
        assert tokens.arms.index(begin) < tokens.arms.index(arm)
        assert tokens.experiment(begin).train.steps + tokens.experiment(arm).train.steps == 200


def test_the_page_of_tokens_has_the_best_first_and_not_what_arms_begin_with(study, tmp_path):
    tokens = study("tokens")
    run = lambda right, gain: [{"right": right, "gain": gain, "ms": 10 / gain, "seconds": 60.0}] * 2  # noqa: E731
    results = {"begun": run(0.1, 1.0), "full": run(0.3, 1.0), "ltp": run(0.25, 2.0), "cut_64": run(0.28, 3.0)}
    results["ltp"] = [found | {"left": 0.5, "lost": 0.01} for found in results["ltp"]]
    lines = tokens.page(results).splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == ["full", "cut_64", "ltp"]
    assert "| `ltp` | 0.250 ± 0.000 | 2.00 | 5.0 | 50.0% | 1.00% |" in lines
    pytest.importorskip("matplotlib")
    tokens.draw(results, tmp_path / "tokens.svg")
    assert "cut_64" in (tmp_path / "tokens.svg").read_text()


def test_the_page_of_exits_has_the_best_first(study, tmp_path):
    exits = study("exits")
    run = lambda bits, gain: [{exits.LOSS: bits, "gain": gain, "ms": 1 / gain, "seconds": 30.0}] * 2  # noqa: E731
    results = {"full": run(2.0, 1.0), "depth_2": run(2.5, 3.0), "exits": run(2.1, 1.0), "entropy 0.5": run(2.2, 1.7)}
    results["entropy 0.5"] = [found | {"layer": 3.25} for found in results["entropy 0.5"]]
    lines = exits.page(results).splitlines()
    shown = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert shown == ["full", "exits", "entropy 0.5", "depth_2"]
    assert "| `entropy 0.5` | 2.200 ± 0.000 | 1.70 | 0.588 | 3.25 |" in lines
    pytest.importorskip("matplotlib")
    exits.draw(results, tmp_path / "exits.svg")
    assert "entropy" in (tmp_path / "exits.svg").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_equal_and_differ_in_what_the_study_names(name):
    declared = load_study(ROOT / "experiments" / f"{name}.py")
    arms = matched(declared, ROOT, (), BY_LEDGER[declared.equal])
    refuse(unfair(declared, arms), declared.allow)
    measure = BY_LEDGER[declared.equal]
    for arm in arms.values():
        assert measure(arm.config) == pytest.approx(measure(arms[declared.base].config), rel=0.01)
    for scale in declared.scales:
        resolve(declared, ROOT, declared.base, declared.edits_of(scale))


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_page_is_that_of_its_figures(name, tmp_path):
    results = json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    committed = (ROOT / "experiments" / f"{name}.md").read_text()
    write_page(tmp_path / f"{name}.md", results)
    assert committed.partition("\n## Reading")[0] == (tmp_path / f"{name}.md").read_text()
    assert "\n## Reading" in committed
    draw(tmp_path / f"{name}.svg", results)
    drawn = (tmp_path / f"{name}.svg").read_text()
    assert all(f"<!-- {arm} -->" in drawn for arm in results["arms"])
