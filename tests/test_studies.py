"""The studies in `experiments/`: their arms are what their pages say, and the pages are made from the figures."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("routers", "lookup", "altup", "tokens", "exits")


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


def test_arms_with_tables_have_the_flops_of_the_plain_model(study):
    lookup = study("lookup")
    flops = {arm: lookup.flops_per_token(lookup.STUDY.experiment(arm)) for arm in lookup.STUDY.arms}
    assert len(flops) == 10
    assert lookup.STUDY.experiment("dense").model.blocks["dense"].d_ff == 256
    for arm, each in flops.items():
        assert 0.99 * flops["dense"] <= each <= flops["dense"], arm


def test_the_committed_page_of_routers_is_that_of_its_figures(study):
    results = json.loads((ROOT / "experiments" / "routers.json").read_text())
    assert study("routers").page(results) == (ROOT / "experiments" / "routers.md").read_text()


def test_a_plain_model_of_equal_cost_lies_between_those_trained(study):
    altup = study("altup")
    run = lambda flops, loss: [{"flops": flops, altup.LOSS: loss}]  # noqa: E731
    results = {"dense_72": run(30.0, 2.0), "dense_64": run(10.0, 4.0), "altup_2": run(15.0, 1.0)}
    assert altup.of_plain(results, "flops", 15.0) == pytest.approx(3.5)
    assert math.isnan(altup.of_plain(results, "flops", 9.0))
    assert math.isnan(altup.of_plain(results, "flops", 31.0))


@pytest.mark.parametrize(
    "name, arms", [("lookup", ("dense", "lsh-add")), ("altup", ("dense_64", "dense_72", "altup_2"))]
)
def test_a_page_names_noise_and_keeps_what_was_written_below_it(study, name, arms, tmp_path):
    module = study(name)
    figures = {"seconds": 30.0, "step_ms": 5.0}
    results = {
        arm: [{module.LOSS: 2 + i + shift, "flops": 1e5 * (i + 1), **figures} for shift in (-0.1, 0.1)]
        for i, arm in enumerate(arms)
    }
    page = module.page(results)
    assert f"`{arms[0]}` | 2.000 ± 0.141" in page
    # The standard error of a difference is √2 · 0.1414 / √2, and twice that is noise.
    assert "less than 0.283 apart" in page
    module.STUDY.write(tmp_path, results, page)
    path = tmp_path / f"{name}.md"
    path.write_text(path.read_text() + "\n## Reading\n\nAs expected.\n")
    module.STUDY.write(tmp_path, results, page)
    assert path.read_text() == page + "\n## Reading\n\nAs expected.\n"


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


def test_drawings_are_made(study, tmp_path):
    pytest.importorskip("matplotlib")
    altup = study("altup")
    run = lambda cost: [{"flops": cost, "step_ms": cost, altup.LOSS: 2.0}]  # noqa: E731
    altup.draw({"dense_64": run(1.0), "dense_72": run(2.0), "altup_2": run(1.5)}, tmp_path / "altup.svg")
    study("lookup").draw_runs(tmp_path / "lookup.svg", {"dense": run(1.0)}, {altup.LOSS: "loss", "none": "none"})
    assert all("<svg" in (tmp_path / f"{name}.svg").read_text() for name in ("altup", "lookup"))
