"""The studies in `experiments/`: their arms are what their pages say, and the pages are made from the figures."""

import json
from pathlib import Path

import pytest

from sparsejax.ablate.arms import resolve
from sparsejax.ablate.fairness import refuse, unfair
from sparsejax.ablate.figures import draw
from sparsejax.ablate.match import BY_LEDGER, matched
from sparsejax.ablate.page import write_page
from sparsejax.ablate.study import load_study

ROOT = Path(__file__).parents[1]
STUDIES = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "from sparsejax.ablate import" in path.read_text()
)
COMMITTED = [name for name in STUDIES if (ROOT / "experiments" / f"{name}.json").is_file()]


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_equal_and_differ_in_what_the_study_names(name):
    declared = load_study(ROOT / "experiments" / f"{name}.py")
    arms = matched(declared, ROOT, (), BY_LEDGER[declared.equal])
    refuse(unfair(declared, arms), declared.allow)
    measure = BY_LEDGER[declared.equal]

    def spent(name: str) -> float:
        begin = declared.arms[name].begin
        return measure(arms[name].config) + (0 if begin is None else measure(arms[begin].config))

    for name in (name for name, arm in declared.arms.items() if not arm.exploratory):
        assert spent(name) == pytest.approx(spent(declared.base), rel=0.01)
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
