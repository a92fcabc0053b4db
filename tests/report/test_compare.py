"""Where two runs part, and in what they differ."""

import shutil

import numpy as np
import pytest

from sparsejax.report.differences import command_section, config_differences, difference_section
from sparsejax.report.runs import open_runs
from sparsejax.report.section import Absent
from sparsejax.report.warnings import alert_section

import run_folders
from runs import here


@pytest.fixture
def pair(tmp_path):
    """A run and its copy."""
    path = run_folders.write_run(tmp_path / "a")
    return path, shutil.copytree(path, tmp_path / "b")


def compared(pair):
    result = here("report", "--compare", *pair)
    assert result.status == 0
    return dict(line.split(": ", 1) for line in result.out.splitlines()[1:])


def test_copies_are_the_same(pair):
    told = compared(pair)
    assert told["config"] == "the same"
    assert told["metrics"].startswith("the same in all 7 rows, to step 20")
    assert told["routing"].startswith("the same in all 5 steps") and told["passages"].startswith("the same in all")


def change(path, name, place, value):
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name][place] = value
    np.savez(path, **arrays)


def test_the_first_step_layer_and_token_are_named(pair):
    change(pair[1] / "routing" / "10.npz", "03_moe/assigned", 5, 999)
    change(pair[1] / "routing" / "15.npz", "01_moe/assigned", 0, 999)
    steps = sorted(int(path.stem) for path in (pair[1] / "passages").glob("*.npz"))
    change(pair[1] / "passages" / f"{steps[-1]}.npz", "01_moe/experts", (1, 3, 0), 7)
    change(pair[1] / "passages" / f"{steps[-1]}.npz", "03_moe/experts", (0, 9, 1), 6)
    told = compared(pair)
    assert (
        told["routing"].startswith("first part at step 10, layer 03_moe: assigned[5] ") and "| 999" in told["routing"]
    )
    assert told["passages"].startswith(f"first part at step {steps[-1]}, layer 03_moe, row 0, token 9 (id ")


def test_the_first_row_that_differs_is_named(pair):
    rows = open_runs([pair[1]])[0].rows
    rows[2] = rows[2] | {"loss": 1.25, "seconds": 99.0}
    run_folders.write_rows(pair[1], rows)
    told = compared(pair)
    assert told["metrics"].startswith(f"first part at step {rows[2]['step']} ({rows[2]['split']}): loss ")
    assert "| 1.25" in told["metrics"] and "seconds" not in told["metrics"]


@pytest.mark.parametrize("words", [["--compare", "a"], ["--compare", "a", "b", "--out=x.html"]])
def test_two_runs_are_compared_and_nothing_written(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--compare takes two runs and writes no page" in here("report", *words).error


def test_differences_have_their_provenance():
    one = {"config": {"a": {"b": 1, "c": 2}}, "provenance": {"a.b": "file"}}
    two = {"config": {"a": {"b": 3, "c": 2, "d": "x"}}, "provenance": {"a.b": "command line", "a.d": "default"}}
    found = config_differences([one, two])
    assert {key: [tuple(each) for each in values] for key, values in found.items()} == {
        "a.b": [("1", "file"), ("3", "command line")],
        "a.d": [("–", ""), ('"x"', "default")],
    }


def test_one_run_has_no_differences_and_its_command_is_told(tmp_path):
    runs = open_runs([run_folders.write_run(tmp_path / "a <b>")])
    assert isinstance(difference_section(runs), Absent)
    html = command_section(runs).html
    assert "python -m sparsejax train --config=" in html and "<b>" not in html


def test_alerts_of_a_run_are_on_the_page(tmp_path):
    path = run_folders.write_run(tmp_path / "a", steps=range(1, 30))
    assert "No alert" in alert_section(open_runs([path])).html
    for step in range(10, 30):  # everything to one expert
        np.savez(path / "routing" / f"{step}.npz", **run_folders.loads(np.eye(2, 8) * 800))
    html = alert_section(open_runs([path])).html
    assert 'class="alert"' in html and "Likely cause" in html and "To try" in html
    quiet = [run_folders.write_run(tmp_path / name) for name in "bc"]
    html = alert_section(open_runs([path, *quiet])).html
    assert "<h3>a</h3>" in html and "No alert in b, c." in html and "<h3>b</h3>" not in html
