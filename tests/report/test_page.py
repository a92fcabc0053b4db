import json
import re

import numpy as np
import pytest

from sparsejax.base.errors import RequestError
from sparsejax.report.page import Section, write_page
from sparsejax.report.runs import open_runs, thinned

import run_folders
from runs import here

pytest.importorskip("altair")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [run_folders.write_run(folder / name, seed) for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    own = Section("Verdict <1>", "<p>better</p>", [{"mark": "bar", "data": {"values": [{"x": 1}]}, "encoding": {}}])
    write_page(out, runs, "a & b", [own])
    return out.read_text()


def stored(text, name):
    return json.loads(re.search(f'id="{name}">(.*?)</script>', text).group(1))


def test_sections_come_in_order_and_titles_are_escaped(text):
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:3] == ["Verdict &lt;1&gt;", "Alerts", "Differences"]
    assert "<title>a &amp; b</title>" in text


def test_every_chart_has_a_place_and_its_data(text):
    specs, data = stored(text, "specs"), stored(text, "data")
    assert re.findall(r'data-spec="(\d+)"', text) == [str(n) for n in range(len(specs))]
    assert {spec["data"]["name"] for spec in specs[1:]} == set(data) - {"explorer"}


def test_the_page_is_whole_by_itself(text):
    assert len(text) < 5_000_000
    assert not re.search(r'(?:src|href)="(?!#|data:)', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert "default-src 'none'" in text


def test_loads_are_those_of_the_arrays(text, runs):
    found = stored(text, "data")["loads0"]
    assert found["axes"]["layer"] == list(run_folders.LAYERS) and found["join"]["frame"]["step"] == [1, 5, 10, 15, 20]
    values = np.reshape(found["values"], (5, 2, 8))
    assigned = np.load(runs[0] / "routing" / "15.npz")["03_moe/assigned"]
    assert np.allclose(values[3, 1], assigned / assigned.mean(), atol=0.006)


def test_floor_of_the_balance_is_shown_as_maxvio(text):
    found = stored(text, "data")["balance"]
    shown = {kind: value for kind, value in zip(found["of"], found["maxvio"]) if kind}
    assert shown == {"measured": pytest.approx(0.4), "of random routing": pytest.approx(0.1)}


def test_what_runs_lack_is_said(tmp_path):
    path = tmp_path / "dense"
    path.mkdir()
    run_folders.write_rows(path, [{"step": 1, "split": "train", "cross_entropy": 2.0}])
    write_page(tmp_path / "report.html", [path], "dense")
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Expert load</h2>" not in text and "<strong>Expert load</strong>: no run has routing" in text


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "report needs the folder of a run"),
        (["nowhere"], "nowhere: not a folder"),
        (["empty"], "it has no metrics.jsonl"),
        (["begun"], "the run has no metrics yet"),
        (["a", "a"], "is given twice"),
        (["a", "--out=no/where.html"], "there is no folder no"),
        (["a", "--out=empty"], "is a folder"),
        (["a", "--config.train.steps=3"], "--config.train.steps has no effect on report"),
        (["a", "--workdir=b"], "unknown flag '--workdir=b' for report"),
        (["broken"], "broken/routing/5.npz: not a file of arrays"),
    ],
)
def test_bad_requests_are_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folders.write_run(tmp_path / "a")
    run_folders.write_run(tmp_path / "broken")
    (tmp_path / "broken/routing/5.npz").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text("")
    assert line in here("report", *words).error
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    "file, text, line",
    [
        ("config.json", '{"environment": null}', "config.json: not what a run writes: environment is None"),
        ("config.json", '{"provenance": 3}', "config.json: not what a run writes: provenance is 3"),
        ("config.json", "[]", "config.json: not what a run writes: no JSON object"),
        (
            "metrics.jsonl",
            '{"step": 2, "split": "train", "cross_entropy": "low"}',
            "cross_entropy of step 2 (train) is 'low'; allowed: a number or null",
        ),
        ("metrics.jsonl", '{"cross_entropy": 2.0}', "none of its 1 lines is a row of metrics"),
    ],
)
def test_what_no_run_wrote_is_refused(file, text, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run_folders.write_run(tmp_path / name)
    (tmp_path / "a" / file).write_text(text)
    assert line in here("report", "a").error and line in here("report", "--compare", "a", "b").error
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_writes_into_the_first_run(tmp_path):
    path = run_folders.write_run(tmp_path / "a")
    result = here("report", path)
    assert result.status == 0 and result.out.strip() == str(path / "report.html")
    assert (path / "report.html").stat().st_size > 1000


def test_names_tell_runs_apart(tmp_path):
    paths = [run_folders.write_run(tmp_path / name / "run", passages=False) for name in "ab"]
    assert [run.name for run in open_runs(paths)] == ["a/run", "b/run"]
    with pytest.raises(RequestError, match="given twice"):
        open_runs([paths[0], tmp_path / "a" / "." / "run"])


def test_thinning_keeps_the_ends():
    assert thinned(range(100), 5) == [0, 25, 50, 74, 99]
    assert thinned([1, 2], 5) == [1, 2]
