"""What studies measure on finished runs and on steps: leaks, times."""

import json

import pytest

from sparsejax.ablate import timed
from sparsejax.ablate.leak import leak
from sparsejax.ablate.timed import StepTimes, measured
from sparsejax.base.config import load, to_json
from sparsejax.base.errors import RunError
from sparsejax.train.config import ExperimentConfig

from runs import arguments, here

ROUTER = "model__blocks__moe__router__"


def config(*overrides):
    return load(ExperimentConfig, "configs/tiny.py", overrides).config


def test_only_a_router_that_sees_the_future_leaks(tmp_path):
    """Slots are enough for every token, so that nothing else can."""
    short = {"train__steps": 2, "checkpoint__every": 2, "optimizer__schedule__warmup_steps": 1}
    room = {"model__blocks__moe__eval_capacity_factor": 4.0}
    choice = {f"{ROUTER}selection": "expert_choice", f"{ROUTER}allow_leak": True, f"{ROUTER}balance": "none"}
    found = {}
    for name, more in {"token": room, "expert": choice}.items():
        done = here(*arguments("train", f"--workdir={tmp_path / name}", **short, **more))
        assert done.status == 0, done.err
        found[name] = leak(tmp_path / name)
    assert found["token"] == 0 and found["expert"] > 1e-5


def test_a_ratio_of_times_is_measured_once(tmp_path, monkeypatch):
    calls = []

    def taken(files):
        calls.append([json.loads(file.read_text())["config"]["model"]["d_model"] for file in files])
        return [2.0, 3.0]

    monkeypatch.setattr(timed, "measured", taken)
    base, wide = config(), config(("model.d_model", "64"))
    assert StepTimes(tmp_path, base).ratio(wide) == 1.5 and calls == [[32, 64]]
    # Another length of training or seed does not change a step; a resumed study measures nothing.
    longer = config(("model.d_model", "64"), ("train.steps", "40"), ("train.seed", "7"))
    assert StepTimes(tmp_path, base).ratio(longer) == 1.5 and len(calls) == 1
    assert StepTimes(tmp_path, base).ratio(config(("train.seed", "3"))) == 1.0 and len(calls) == 1


def test_steps_are_timed_in_a_process_of_their_own(tmp_path):
    files = []
    for name, width in (("narrow", "32"), ("wide", "256")):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(to_json(config(("model.d_model", width)), {}, {}))
    narrow, wide = measured(files)
    assert 0 < 2 * narrow < wide
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RunError, match=r"a step could not be timed: .*broken\.json"):
        measured([tmp_path / "broken.json"])
