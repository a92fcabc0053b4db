"""The README says what is so: its commands run, its tables are those of the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsejax.base.config import load
from sparsejax.base.shapes import LEGEND
from sparsejax.blocks import RESIDUALS
from sparsejax.blocks.moe import MoESpec
from sparsejax.infer.exit_rules import RULES
from sparsejax.memory import presets as lookup_presets
from sparsejax.memory.addresses import ADDRESSES
from sparsejax.memory.consumes import CONSUMES
from sparsejax.memory.contents import CONTENTS
from sparsejax.model.config import ModelConfig
from sparsejax.routers.balance import NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.train.config import ExperimentConfig

from runs import environment, here
from support import ONE_DEVICE, host_batch, moe_layer_params, moe_layer_runner

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
VERBS = {shlex.split(line)[3]: line for line in reversed(COMMANDS) if line.startswith("python -m sparsejax ")}
"""Verb → the first command with it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run the README's commands in, one after the other, as a reader would."""
    folder = tmp_path_factory.mktemp("readme")
    for part in ("configs", "experiments"):
        (folder / part).symlink_to(ROOT / part)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_command_runs(command, folder, monkeypatch):
    """The first of each verb in a process of its own, as a reader's; the others in this one, which has all imports."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "sparsejax"] and command not in VERBS.values():
        monkeypatch.chdir(folder)
        status, out, err = here(*words[3:])
    else:
        words[0] = sys.executable
        done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
        status, out, err = done.returncode, done.stdout, done.stderr
    assert status == 0, err
    assert out.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("python ")])
def test_make_target_exists(command):
    words = shlex.split(command)
    assert words[0] == "make"
    assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0


def make(*words: str) -> str:
    """What a target prints, run on this interpreter's packages instead of a new environment's."""
    venv = Path(sys.prefix)
    variables = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    options = [f"VENV={venv}", "-o", f"{venv}/.installed", "-o", f"{venv}/.installed-dev"]
    done = subprocess.run(
        ["make", *words, *options], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_quickstart_in_short(tmp_path):
    printed = make("quickstart", f"WORKDIR={tmp_path}", "FLAGS=--config.train.steps=31 --config.eval.batches=1")
    assert "expert load on the validation split" in printed and "def __init__(self, " in printed


@pytest.mark.slow
def test_make_quickstart(tmp_path):
    """It stays under the bar on the whole validation split, and a second time says that it is done."""
    make("quickstart", f"WORKDIR={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "train"][-3:]  # a tenth of the steps
    assert all(row["moe/drop_fraction"] < 0.05 and row["moe/capacity_factor"] <= 1.25 for row in last)
    assert "finished: this run has done its 300 steps" in make("quickstart", f"WORKDIR={tmp_path}")
    words = [sys.executable, "-m", "sparsejax", "eval", f"--workdir={tmp_path}", "--config.eval.batches=none"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    whole = json.loads(done.stdout.splitlines()[-1])
    assert whole["bits_per_byte"] <= 2.3 and whole["moe/dead_experts"] == 0
    assert whole["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags",
    [
        ("moe_layer", ["--rounds=1"]),
        ("dispatch", ["--rounds=1"]),
        ("decision", ["--rounds=1"]),
        ("altup", ["--rounds=1"]),
        ("light_heavy", ["--rounds=1", "--rows=1", "--length=64", "--layers=1", "--width=32"]),
        ("memory", ["--rounds=1", "--rows=1", "--length=64", "--small"]),
        ("train_step", ["--blocks=3"]),
        ("decode", ["--rounds=1", "--tokens=4"]),
    ],
)
def test_benchmark_runs(name, flags):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d+ \[\d+\.\d+, \d+\.\d+\]", done.stdout)


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_lint(words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["nanogpt_dense", "nanogpt_switch"])
def test_the_nanogpt_experiments_start(name, tmp_path):
    (tmp_path / "input.txt").write_text("to be or not to be, that is the question. " * 500)
    flags = {"data.path": tmp_path / "input.txt", "train.steps": 2, "optimizer.schedule.warmup_steps": 0}
    words = [f"--config.{key}={value}" for key, value in flags.items()]
    config = ROOT / "configs" / f"{name}.py"
    assert here("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *words).status == 0


def test_axis_letters_are_the_legend():
    table = dict(re.findall(r"^\| ([A-Z]) \| (.*) \|$", README, re.MULTILINE))
    assert table == LEGEND


def test_tree_names_every_package():
    packages = {path.name for path in (ROOT / "sparsejax").iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE))


def test_config_keys_of_the_table_exist():
    from sparsejax.base.config import leaves

    known = [path.replace("blocks.dense.", "blocks.NAME.") for path in leaves(ExperimentConfig())]
    known += leaves(ExperimentConfig())
    cells = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    for text in re.findall(r"`([^`]+)`", " ".join(cells)):
        stem, _, group = text.partition("{")
        names = [stem + name.strip() for name in group.rstrip("}").split(",")] if group else [text]
        for name in (n.removesuffix(".*").replace("config.…", "model") for n in names):
            a_block = "NAME" in name and name.count(".") == 2
            assert a_block or any(f"{path}.".startswith(f"{name}.") for path in known), name


@pytest.mark.parametrize("entries", (ADDRESSES, CONTENTS, CONSUMES, RESIDUALS, lookup_presets.PRESETS), ids=len)
def test_what_can_be_chosen_for_lookups_and_streams_is_named(entries):
    assert not [name for name in entries if f"`{name}`" not in README]


def test_early_exits_offline_run_and_save(capsys):
    (code,) = [block for block in PYTHON if "exit_table(" in block]
    exec(code, {})
    assert 0.1 < float(capsys.readouterr().out) < 0.9
    section = README.partition("## Early exits, offline")[2].partition("\n## ")[0]
    assert set(RULES) <= set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize("edit", [block for block in PYTHON if "config." in block])
def test_edits_of_a_config_are_accepted(edit, tmp_path):
    lines = ["from sparsejax import default_config", "def get_config():", " config = default_config()"]
    path = tmp_path / "edited.py"
    path.write_text("\n".join(lines + [f" {line}" for line in edit.splitlines()] + [" return config"]))
    load(ExperimentConfig, str(path))


def test_the_selection_of_the_readme_works():
    """Its code is run as it stands, in a layer; it is as short as it is said to be."""
    (code,) = [block for block in PYTHON if "class Neighbours" in block]
    assert len(code.splitlines()) <= 40
    found: dict = {}
    exec(code, found)
    router = RouterConfig(selection=found["Neighbours"](), balance=NoBalance())
    spec = MoESpec(num_experts=4, d_ff=4, capacity_factor=1.0, router=router)
    backbone = ModelConfig(d_model=8, num_heads=2)
    plain = moe_layer_params(MoESpec(num_experts=4, d_ff=4), backbone)
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    y, report = moe_layer_runner(spec, backbone, ONE_DEVICE)(plain, x, host_batch(2, 8, padded=0))
    load = np.bincount((x @ plain["router"]["weight"][...]).argmax(-1).ravel(), minlength=4)
    assert np.array_equal(report.assigned, load + np.roll(load, 1)) and np.abs(y).max() > 0
