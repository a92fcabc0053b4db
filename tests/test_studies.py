"""The studies in `experiments/`: their arms are what their pages say, and the pages are made from the figures."""

import json
from pathlib import Path

import pytest

from sparsejax.ablate.fairness import refuse, unfair
from sparsejax.ablate.figures import draw
from sparsejax.ablate.match import BY_LEDGER, matched
from sparsejax.ablate.page import write_page
from sparsejax.ablate.study import load_study
from sparsejax.base.config import to_json

ROOT = Path(__file__).parents[1]
STUDIES = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "from sparsejax.ablate import" in path.read_text()
)
DECLARED = {name: load_study(ROOT / "experiments" / f"{name}.py") for name in STUDIES}
COMMITTED = [name for name in STUDIES if (ROOT / "experiments" / f"{name}.json").is_file()]


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_equal_and_differ_in_what_the_study_names(name):
    declared = DECLARED[name]
    arms = matched(declared, ROOT, (), BY_LEDGER[declared.equal])
    refuse(unfair(declared, arms), declared.allow)
    measure = BY_LEDGER[declared.equal]

    def spent(name: str) -> float:
        begin = declared.arms[name].begin
        return measure(arms[name].config) + (0 if begin is None else measure(arms[begin].config))

    for name in (name for name, arm in declared.arms.items() if not arm.exploratory):
        assert spent(name) == pytest.approx(spent(declared.base), rel=0.01)


@pytest.mark.parametrize("name, scale", [(name, scale) for name, study in DECLARED.items() for scale in study.scales])
def test_arms_are_as_equal_at_another_scale(name, scale):
    declared = DECLARED[name]
    arms = matched(declared, ROOT, declared.edits_of(scale), BY_LEDGER[declared.equal])
    refuse(unfair(declared, arms), declared.allow)
    told = {to_json(arm.config, {}, {}) for arm in arms.values()}
    assert len(told) == len(arms), "two arms are the same there"


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
