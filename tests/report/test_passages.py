"""What pages say of passages: planted decisions are found again."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from sparsejax.base.config import to_json
from sparsejax.report.explorer import explorer_section
from sparsejax.report.page import write_page
from sparsejax.report.passages import (
    churn_section,
    depth_section,
    position_section,
    specialisation_section,
    table_section,
)
from sparsejax.report.runs import open_runs
from sparsejax.report.section import Absent, Section
from sparsejax.report.streams import stream_section
from sparsejax.report.words import token_class
from sparsejax.train.config import ExperimentConfig

import run_folders

TEXT = b"ab1 "


def a_run(tmp_path, by_step, name="run", rows=()):
    """With these arrays, beside tokens, by step."""
    path = tmp_path / name
    (path / "passages").mkdir(parents=True)
    (path / "config.json").write_text(to_json(ExperimentConfig(), {}, {}))
    run_folders.write_rows(path, [{"step": 1, "split": "train", "cross_entropy": 1.0}, *rows])
    for step, arrays in by_step.items():
        tokens = np.resize(np.frombuffer(TEXT, np.uint8), (2, 8)).astype(np.int32)
        base = {"tokens": tokens, "segments": np.ones_like(tokens), "nats": np.ones(tokens.shape, np.float32)}
        np.savez(path / "passages" / f"{step}.npz", **(base | arrays))
    return open_runs([path])


def experts(first, second=None):
    """Of one layer: every row goes to these experts, in turn."""
    chosen = np.resize(np.asarray(first, np.int16), (2, 8))[..., None]
    if second is not None:
        chosen = np.concatenate([chosen, np.resize(np.asarray(second, np.int16), (2, 8))[..., None]], -1)
    return {
        "01_moe/experts": chosen,
        "01_moe/weights": np.full(chosen.shape, 0.5, np.float32),
        "01_moe/processed": np.ones(chosen.shape, bool),
    }


def test_churn_is_the_share_of_first_choices_that_changed(tmp_path):
    section = churn_section(a_run(tmp_path, {5: experts([0, 1]), 10: experts([0, 1, 0, 2]), 15: experts([0, 1, 0, 2])}))
    assert isinstance(section, Section)
    assert section.data["churn"]["step"] == [10, 15] and section.data["churn"]["churn"] == [0.25, 0]
    assert isinstance(churn_section(a_run(tmp_path, {5: experts([0])}, "one")), Absent)


def test_drops_are_shown_by_position(tmp_path):
    arrays = experts([0, 1], [2, 3])
    arrays["01_moe/processed"][:, 4:] = False
    arrays["01_moe/processed"][0, 0, 0] = False
    data = position_section(a_run(tmp_path, {5: arrays})).data["positions"]
    assert data["position"] == list(range(8)) and data["dropped"] == [0.25, 0, 0, 0, 1, 1, 1, 1]


def test_an_expert_that_serves_one_class_has_all_its_lift_there(tmp_path):
    section = specialisation_section(a_run(tmp_path, {5: experts([0, 0, 1, 2])}))  # letters, letters, digit, space
    data = section.data["classes0_0"]
    lifts = dict(zip(data["axes"]["class"], np.reshape(data["values"], (3, 3)).tolist()))
    assert data["axes"]["expert"] == [0, 1, 2]
    assert lifts == {"letter": [2, 0, 0], "digit": [0, 4, 0], "space": [0, 0, 4]}


def test_experts_that_always_serve_together_are_seen(tmp_path):
    section = specialisation_section(a_run(tmp_path, {5: experts([0, 2], [1, 3])}))
    data = section.data["pairs0_0"]
    ratios = np.array([np.nan if v is None else v for v in data["values"]], float).reshape(4, 4)
    assert ratios[0, 1] == ratios[2, 3] == 2 and ratios[0, 2] == ratios[1, 3] == 0 and np.isnan(np.diag(ratios)).all()


def test_packages_are_shown_where_there_are_several(tmp_path):
    source = {"source": np.resize([0, 1], (2, 8)).astype(np.int16), "source_names": np.array(["json", "re"])}
    section = specialisation_section(a_run(tmp_path, {5: experts([3, 4]) | source}))
    data = section.data["sources0_0"]
    assert data["axes"]["class"] == ["json", "re"] and data["values"] == [2, 0, 0, 2]


def test_rows_of_tables_are_counted(tmp_path):
    rows = np.resize([0, 1, 2, 3], (2, 8, 1)).astype(np.int32)
    section = table_section(a_run(tmp_path, {5: {"00_dense/table/rows": rows}}))
    assert section.data["tables"]["rows"] == [4] and section.data["tables"]["table"] == ["00_dense/table"]
    assert section.data["tables"]["entropy"] == [pytest.approx(np.log(4) / np.log(16), abs=1e-4)]


def test_depths_are_those_of_halting_exits_and_skipping(tmp_path):
    top = np.zeros((2, 8, 3), np.float32)
    top[0, :, 0], top[1, :, 1] = 0.9, 0.7
    arrays = {
        "halting/steps": np.resize([1, 2], (2, 8)),
        "exit/layers": np.array([2, 4, 6]),
        "exit/top": top,
        "exit/nats": np.ones((2, 8, 3), np.float32) * [3, 2, 1],
        "02_deep/kept": np.resize([True, False, False, False], (2, 8)),
    }
    data = depth_section(a_run(tmp_path, {5: arrays})).data
    assert data["kept"]["kept"] == [0.25] and data["exits"]["loss"] == [3, 2, 1]
    rows = list(zip(data["depths"]["run"], data["depths"]["depth"], data["depths"]["share"]))
    skipped = "run · layers that may be skipped, computed"
    assert rows == [
        ("run · halting", 1, 0.5),
        ("run · halting", 2, 0.5),
        ("run · exit at 0.7", 2, 0.5),
        ("run · exit at 0.7", 4, 0.5),
        (skipped, 0, 0.75),
        (skipped, 1, 0.25),
    ]


def test_churn_is_between_consecutive_evaluations_however_many(tmp_path):
    turns = {step: experts([step % 2]) for step in range(1, 61)}
    assert set(churn_section(a_run(tmp_path, turns)).data["churn"]["churn"]) == {1}


def test_the_tokens_an_expert_serves_most_are_named(tmp_path):
    html = specialisation_section(a_run(tmp_path, {5: experts([0, 0, 1, 2])})).html
    assert "<td>0</td>" in html and "<code>a</code> 50% <code>b</code> 50%" in html and "<code>1</code> 100%" in html


def test_a_token_without_a_target_leaves_nowhere_and_what_is_absent_is_told(tmp_path):
    top = np.full((2, 8, 2), 0.9, np.float32)
    top[0, 0] = np.nan
    arrays = {"exit/layers": np.array([2, 4]), "exit/top": top, "exit/nats": np.ones_like(top)}
    section = explorer_section(a_run(tmp_path, {5: arrays | {"absent": np.array(["01_soft: no <choice>"])}}))
    view = section.data["explorer"][0]["views"][-1]
    assert view["values"][:2] == [None, 2] and view["told"][0] == "no target"
    assert "run: 01_soft: no &lt;choice&gt;" in section.html


def test_figures_of_layers_are_drawn_by_their_group(tmp_path):
    rows = [{"step": 2, "split": "train", "altup/gain": 1.5, "memory/table/rows_touched": 3.0, "loss": 2.0}]
    section = stream_section(a_run(tmp_path, {}, rows=rows))
    assert set(section.data["streams"]) == {"run", "step", "altup_gain"} and len(section.charts) == 1
    assert isinstance(stream_section(a_run(tmp_path, {}, "none")), Absent)


def test_the_explorer_has_every_token_with_its_numbers(tmp_path):
    arrays = experts([0, 1], [2, 3])
    arrays["01_moe/processed"][0, 0] = False
    arrays["01_moe/processed"][0, 1, 1] = False
    section = explorer_section(a_run(tmp_path, {5: arrays}))
    (pane,) = section.data["explorer"]
    assert "".join(pane["texts"]) == "ab1 " * 4 and pane["rows"] == [8, 8]
    view = {view["name"]: view for view in pane["views"]}["01_moe: expert"]
    assert view["values"][:2] == [0, 1] and view["marked"] == [0, 1]
    assert view["told"][:3] == [
        "0 (0.50, dropped), 2 (0.50, dropped)",
        "1 (0.50), 3 (0.50, dropped)",
        "0 (0.50), 2 (0.50)",
    ]


@pytest.mark.parametrize(
    "text, kind",
    [("if", "keyword"), ("x", "letter"), ("X", "capital"), ("7", "digit"), ("(", "bracket"), ("\n", "line end"),
     (" ", "space"), ("=", "operator"), ("'", "quote"), ("_", "underscore"), (".", "separator"), ("⟨300⟩", "other")],
)  # fmt: skip
def test_classes_of_tokens(text, kind):
    assert token_class(text) == kind


@pytest.mark.slow
def test_a_browser_draws_everything_and_asks_no_server(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    runs = [run_folders.write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    write_page(tmp_path / "report.html", runs, "two runs")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/report.html"]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "WARN Dropping" not in line]
    assert not console
    assert 'data-drawn="all"' in done.stdout
    drawn = len(re.findall(r"<figure><div data-spec[^>]*>\s*<svg", done.stdout)) or done.stdout.count("vega-embed")
    specs = json.loads(re.search(r'id="specs">(.*?)</script>', (tmp_path / "report.html").read_text()).group(1))
    assert drawn >= len(specs)
    assert done.stdout.count("data-token=") == 2 * (2 * run_folders.LENGTH - 4)
