"""Pages of studies from planted results."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from sparsejax.ablate.command import told as told_lines
from sparsejax.ablate.figures import draw
from sparsejax.ablate.page import OUTDATED, READING, _verdicts_explained, by_metric, pareto, write_page
from sparsejax.ablate.results import _speed_up
from sparsejax.ablate.sections import study_sections
from sparsejax.ablate.statistics import Verdict, detectable, verdicts
from sparsejax.ablate.study import Arm, Study

VERDICT = dict(difference=-0.5, low=-0.7, high=-0.3, adjusted_p=0.01, effect_size=-4.0, seeds_needed=2, speed_up="1.5")
VERDICT |= dict(with_more_text=2, p=0.01, of_text=0.0, exploratory=False)


def arm(values, flops, exploratory=False, **more):
    runs = {
        str(seed): {"status": "done", "figures": {"bits_per_byte": value, "seconds": 60.0, **more}}
        for seed, value in enumerate(values)
    }
    sizes = {"flops_per_token": 1e6, "training_flops": flops, "parameters": 10, "active_parameters": 5, "steps": 7}
    return {**sizes, "sized": {"d_ff": 3}, "step_time": None, "exploratory": exploratory, "runs": runs}


def results(**more):
    arms = {
        "base <b>": arm([2.0, 2.2], 100.0),
        "good": arm([1.5, 1.7], 100.0, drop=0.25),
        "costly": arm([1.8, 1.8], 200.0, exploratory=True),
        "cheap": arm([2.5], 50.0),
    }
    arms["cheap"]["runs"]["1"] = {"status": "failed", "cause": "status 1: it <fell>"}
    found = dict(
        study="Which?", command="python -m sparsejax ablate x.py", config="c.py", metric="bits_per_byte",
        higher_is_better=False, equal="active_flops", base="base <b>", seeds=[0, 1], notes=["A note."], arms=arms,
        budgets={}, variants={}, scatter=None, flags=["good: axes: k"],
        verdicts={"good": VERDICT | {"verdict": "better"}},
        power={"deviation": 0.1, "arms": 2, "seeds": 2, "detectable": 0.4, "effect": 0.05, "seeds_needed": 90},
        seconds=600.0,
    )  # fmt: skip
    return found | more


@pytest.fixture
def page(tmp_path):
    def written(found):
        write_page(tmp_path / "x.md", found)
        return (tmp_path / "x.md").read_text()

    return written


def test_arms_come_best_first_with_their_verdicts(page):
    text = page(results())
    rows = [line for line in text.splitlines() if line.startswith("| `")][:4]
    assert [row.split("`")[1] for row in rows] == ["good", "costly", "base <b>", "cheap"]
    assert "| 1.600 ± 0.141 | -0.500 [-0.700, -0.300] | better (p = 0.01) | -4.0 | 2 | 1.5 | 0.25 |" in rows[0]
    assert "exploratory" in rows[1] and "| base |" in rows[2] and "no verdict" in rows[3]
    assert "runs of 10 minutes together" in text and "A note." in text
    assert "- `cheap` seed 1: failed: status 1: it <fell>" in text and "- good: axes: k" in text


def test_power_is_told_before_the_runs_and_as_they_came(page):
    found = results()
    found["arms"]["good"] = arm([1.5, 1.8], 100.0)  # 0.5 and 0.4 below the base
    found["verdicts"]["good"]["of_text"] = 0.01
    text = page(found).replace("\n", " ")
    assert "2 seeds show a difference of 0.400 four times in five" in text
    assert "Less than 0.05 would not matter; to show that much takes 90 seeds" in text
    could = detectable(0.1**2 / 2, 2, 1, text=0.01)
    assert f"deviate by 0.071 between seeds, which with that text shows one of {could:.3f} four times in five" in text
    html = study_sections(found)[0].html
    assert "Differences from <code>base &lt;b&gt;</code> deviate" in html and "effective speed-up" in html
    found["verdicts"]["good"]["speed_up"] = None
    assert not any("speed-up" in each for each in (page(found), study_sections(found)[0].html))


def test_an_open_arm_says_whether_anything_is_known(page):
    open_arm = VERDICT | {"verdict": "no difference shown", "exploratory": True}
    found = results(verdicts={"good": open_arm})
    assert "| no difference shown: exploratory (p = 0.01) |" in page(found)
    assert "they show no difference, nor that it is less than 0.05" in page(found)
    assert "· no difference shown: exploratory" in study_sections(found)[0].html
    found["verdicts"]["good"] = open_arm | {"exploratory": False}
    text = page(found)
    assert "| no difference shown, less than 0.05 (p = 0.01) |" in text and "*exploratory*" not in text


def test_a_reading_of_other_figures_says_so_until_that_is_taken_away(page, tmp_path):
    path = tmp_path / "x.md"
    path.write_text(f"{page(results())}\n{READING}\n\nMine.\n")
    assert OUTDATED not in page(results(seconds=1200.0))
    other = results()
    other["arms"]["good"] = arm([1.4, 1.7], 100.0)
    for _ in range(2):
        assert page(other).endswith(f"\n{READING}\n\n{OUTDATED}\n\nMine.\n")
    path.write_text(page(other).replace(f"{OUTDATED}\n\n", ""))
    assert page(other).endswith(f"\n{READING}\n\nMine.\n") and OUTDATED not in page(other)


def test_a_verdict_that_its_interval_does_not_show_is_explained(page):
    assert "reaches zero" not in page(results())
    assert "reaches zero" in page(results(verdicts={"good": VERDICT | {"verdict": "better", "high": 0.1}}))


def test_one_seed_gives_a_difference_and_nothing_else(page):
    one = {name: arm([value], 100.0) for name, value in {"base <b>": 2.0, "good": 1.5}.items()}
    losses = {name: np.array([[value, value]]) for name, value in {"base <b>": 2.0, "good": 1.5}.items()}
    verdict = dataclasses.asdict(verdicts(losses, np.ones(2), "base <b>")["good"]) | {"speed_up": None}
    found = results(arms=one, verdicts={"good": verdict}, seeds=[0])
    told = [page(found), study_sections(found)[0].html, *told_lines(found)]
    assert (
        "| `good` | 1.500 | -0.500 | no difference shown: exploratory |  |  |" in told[0]
        and "good: 1.5000: no difference" in told[-1]
    )
    assert not any(word in text for text in told for word in ("inf", "nan", "None", "1000"))


def test_where_higher_is_better_the_order_turns():
    assert by_metric(results(higher_is_better=True)) == ["cheap", "base <b>", "costly", "good"]


def test_what_a_person_wrote_stays(page, tmp_path):
    first = page(results())
    (tmp_path / "x.md").write_text(f"{first}\n{READING}\n\nMine.\n")
    text = page(results(seconds=1200.0))
    assert "of 20 minutes" in text and text.endswith(f"\n{READING}\n\nMine.\n")


def test_the_front_is_of_arms_that_nothing_beats_in_both():
    _, spent = study_sections(results())
    data = spent.data["front_flops"]
    assert dict(zip(data["arm"], data["front"])) == {"base <b>": False, "good": True, "costly": False, "cheap": True}


def test_what_costs_are_equal_within_does_not_rank(page):
    found = results()
    found["arms"]["good"]["training_flops"] = 100.9
    assert pareto(found, "flops")["base <b>"][2] is False
    found["arms"]["good"]["training_flops"] = 101.1
    assert pareto(found, "flops")["base <b>"][2] is True


def test_the_speed_up_tells_the_base_s_losses_and_their_noise():
    """Twice the budget is 0.4 better, in the mean; the arm, at the base's FLOPs, 0.2."""
    study = Study(question="?", config="c", arms={"base": Arm(), "good": Arm()}, base="base", budgets=(2.0,))
    arms = {"base": arm([2.0, 2.0, 2.0], 100.0), "good": arm([1.8, 1.8, 1.8], 100.0)}
    verdict = Verdict(**dict.fromkeys(Verdict.__dataclass_fields__) | dict(difference=-0.2, low=-0.3, high=-0.1))
    told = {}
    for name, losses in {"exact": [1.6, 1.6, 1.6], "noisy": [1.58, 1.6, 1.62]}.items():
        text = _speed_up(study, arms, {"base@2": arm(losses, 200.0)}, "good", verdict)
        told[name] = [float(each) for each in re.findall(r"\d\.\d+", text)]
    at = lambda loss, end=1.6: 2 ** (np.log(2 / loss) / np.log(2 / end))  # noqa: E731
    assert told["exact"] == pytest.approx([at(1.8), at(1.9), at(1.7)], abs=0.006)
    reach = stats.t.isf(0.025, 2) * 0.02 / np.sqrt(3)
    assert told["noisy"] == pytest.approx([at(1.8), at(1.9, 1.6 - reach), at(1.7, 1.6 + reach)], abs=0.006)
    more = dict(budgets={"base@2": arm([1.55], 200.0)}, verdicts={"good": VERDICT | {"verdict": "better"}})
    text = " ".join(_verdicts_explained(results(arms=arms, base="base", **more)))
    assert "`base` 2.000 ± 0.000, `base@2` 1.550" in text


def test_verdicts_on_the_page_are_told_by_words_and_marks_and_escaped():
    verdicts, _ = study_sections(results())
    assert "▲ better" in verdicts.html and "base &lt;b&gt;" in verdicts.html and "it &lt;fell&gt;" in verdicts.html
    assert "<b>" not in verdicts.html
    told = study_sections(results(notes=["In `a_<b>`, and `c`."]))[0].html
    assert "In <code>a_&lt;b&gt;</code>, and <code>c</code>." in told


def test_variants_have_a_table_and_stand_in_the_scatter(page, tmp_path):
    figures = {"speed": 2.0, "bits": 1.0}
    variants = {"rule 0.5": {"runs": {"0": {"status": "done", "figures": figures}}}}
    found = results(variants=variants, scatter=("speed", "bits"))
    found["arms"]["good"]["runs"]["0"]["figures"] |= {"speed": 1.0, "bits": 0.5}
    assert "| variant | speed | bits |" in page(found) and "| `rule 0.5` | 2.000 | 1.000 |" in page(found)
    draw(tmp_path / "x.svg", found)
    drawn = (tmp_path / "x.svg").read_text()
    assert "<!-- rule 0.5 -->" in drawn and "<!-- good -->" in drawn
