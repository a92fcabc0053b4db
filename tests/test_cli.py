"""The command line: what each verb is handed, exit statuses, one-line errors, and that help imports nothing heavy.

The verbs and the experiment schema are replaced by small ones, so that only the command line is tested here.
"""

import io
import json
import logging
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparsejax import cli
from sparsejax.base import devices
from sparsejax.base.config import to_json
from sparsejax.base.errors import RunError

HEAVY = ("jax", "numpy", "flax", "optax", "orbax", "grain", "tensorflow", "ml_collections", "matplotlib")

CONFIG_FILE = """
from sparsejax.base.config import to_config_dict
from sparsejax.train.config import ExperimentConfig

def get_config(steps="1"):
    c = to_config_dict(ExperimentConfig())
    c.steps = int(steps)
    return c
"""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int = 1
    expert: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class Experiment:
    steps: int = 100
    mesh: Mesh = field(default_factory=Mesh)


class Run:
    """Calls the command line; `calls` are the arguments that verbs were given, `counts` the devices asked for."""

    def __init__(self, capsys):
        self.capsys, self.calls, self.counts = capsys, [], []
        self.out = self.err = ""
        self.modules = {
            "sparsejax.train.config": {"ExperimentConfig": Experiment},
            "sparsejax.train.loop": {"train": self.verb},
            "sparsejax.train.evaluate": {"evaluate_command": self.verb},
            "sparsejax.infer.command": {"generate_command": self.verb},
            "sparsejax.plan.command": {"plan_command": self.verb},
        }

    def verb(self, *args):
        self.calls.append(args)
        return 0

    def __call__(self, *argv):
        status = cli.main(argv)
        self.out, self.err = self.capsys.readouterr()
        return status


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command line in an empty folder, with stand-ins for the verbs."""
    run = Run(capsys)
    for name, content in run.modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    monkeypatch.setattr(devices, "prepare_devices", run.counts.append)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def saved_run(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    provenance = dict.fromkeys(("mesh.data", "mesh.expert", "mesh.tensor"), "default") | {"steps": "file"}
    (folder / "config.json").write_text(to_json(Experiment(steps=7), provenance, {}))
    return folder


def refused(run, *argv):
    """The single line on stderr of a request that is refused."""
    assert run(*argv) == 2
    assert run.out == ""
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert not run.calls
    return run.err


def test_train(run):
    Path("exp.py").write_text(CONFIG_FILE)
    assert run("train", "--config=exp.py:5", "--config.mesh.expert", "2", "--config.mesh.tensor=3") == 0
    loaded, workdir, allow, init_from, stopped = run.calls[0]
    assert (loaded.config, workdir, allow, init_from, stopped) == (
        Experiment(steps=5, mesh=Mesh(expert=2, tensor=3)),
        Path("runs/exp"),
        False,
        None,
        0,
    )
    assert (loaded.provenance["steps"], loaded.provenance["mesh.tensor"]) == ("file", "command line")
    assert run.counts == [6]
    assert run("train", "--config=exp.py", "--workdir=elsewhere", "--allow-config-change") == 0
    assert run.calls[1][1:] == (Path("elsewhere"), True, None, 0)
    assert run("train", "--config=exp.py", "--init-from=runs/dense") == 0
    assert run.calls[2][3] == Path("runs/dense")


def test_mesh_is_short_for_the_config(run):
    assert run("plan", "--mesh=2,4,1") == 0
    assert run.calls[0][0].config.mesh == Mesh(data=2, expert=4)
    assert run.counts == []  # a plan needs no devices
    Path("exp.py").write_text(CONFIG_FILE)
    assert run("train", "--config=exp.py", "--mesh=2,4,1") == 0
    assert run("train", "--config=exp.py", "--mesh=-1,2,1") == 0
    assert run.counts == [8, 2]
    assert run("plan", "--mesh=2,4,1", "--mesh=4,4,1") == 0
    assert run.calls[-1][0].config.mesh == Mesh()
    assert run.calls[-1][1].mesh == [(2, 4, 1), (4, 4, 1)]
    assert run("eval", "--parity", "--mesh=2,4,1", "--mesh=4,4,1") == 0
    assert run.counts == [8, 2, 16]


def test_the_config_of_a_run_is_used(run, saved_run):
    assert run("eval", f"--workdir={saved_run}", "--step=40") == 0
    loaded, workdir, args = run.calls[-1]
    assert (loaded.config.steps, workdir, args.step, args.parity) == (7, saved_run, 40, False)
    assert run("generate", f"--workdir={saved_run}", "--config.steps=9", "--prompt=a b", "--prompt", "c") == 0
    loaded, workdir, args = run.calls[-1]
    assert (loaded.config.steps, args.prompt, args.max_tokens, args.format) == (9, ["a b", "c"], 200, "text")
    assert (args.temperature, args.top_k, args.top_p, args.seed, args.step) == (1.0, None, None, 0, None)
    for verb in ("train", "plan"):
        assert run(verb, f"--workdir={saved_run}") == 0
        assert run.calls[-1][0].config.steps == 7
    assert run("train", f"--config={saved_run}/config.json", "--workdir=again") == 0
    assert run.calls[-1][0].config.steps == 7


def test_parity_needs_no_run_and_leaves_the_config_alone(run):
    assert run("eval", "--parity", "--mesh=2,4,1", "--mesh=1,1,2") == 0
    loaded, workdir, args = run.calls[0]
    assert (loaded.config.mesh, workdir, args.mesh) == (Mesh(), None, [(2, 4, 1), (1, 1, 2)])
    assert run.counts == [8]
    assert run("eval", "--parity", "--mesh=2,1,1") == 0
    assert run.calls[1][0].config.mesh == Mesh()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which verb? known: train, eval, generate, plan, launch, trace, ablate, report;"),
        (
            ["trian"],
            "known: train, eval, generate, plan, launch, trace, ablate, report. Did you mean 'train'?",
        ),
        (["--workdir=x", "train"], "unknown verb '--workdir=x'"),
        (["train", "--wokrdir=x"], "unknown flag '--wokrdir=x' for train"),
        (["train", "--wokrdir=x"], "Did you mean '--workdir'?"),
        (["train", "--allow"], "unknown flag '--allow'"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["plan", "--config.stepz=3"], "config.stepz: no such key. Did you mean 'config.steps'?"),
        (["plan", "--config.steps=many"], "config.steps: 'many' is not allowed; must be an int."),
        (["train", "--config.steps"], "--config.steps needs a value: --config.steps=VALUE"),
        (["train", "--config.steps", "--mesh=1,1,1"], "--config.steps needs a value"),
        (["train", "--config="], "--config=: must be FILE.py"),
        (["train", "--config=nope.py"], "--config=nope.py: no such file."),
        (["train", "--config=runs/a/config.json"], "needs --workdir=DIR"),
        (["train", "--mesh=2,4"], "argument --mesh: '2,4' is not D,E,T"),
        (["train", "--mesh=2,--4,1"], "argument --mesh: '2,--4,1' is not D,E,T"),
        (["train", "--mesh=2,²,1"], "argument --mesh: '2,²,1' is not D,E,T"),
        (
            ["train", "--config=nope.py", "--mesh=1,1,1", "--mesh=1,1,2"],
            "--mesh is given 2 times; train takes one mesh",
        ),
        (["train", "--workdir"], "argument --workdir: expected one argument"),
        (["train", "--init-from="], "argument --init-from: '' is not a folder"),
        (["train", "--stopped-status=1"], "argument --stopped-status: '1' is not 0 or 3 … 255"),
        (["train", "--stopped-status=2"], "1 is a failure, 2 a wrong request"),
        (["train", "--stopped-status=256"], "'256' is not 0 or 3 … 255"),
        (["train", "--workdir="], "argument --workdir: '' is not a folder"),
        (["plan", "--workdir", ""], "argument --workdir: '' is not a folder"),
        (["train"], "train needs --config=FILE.py (configs/quickstart.py is the default experiment)"),
        (["train", "--workdir=new"], "train needs --config=FILE.py (configs/quickstart.py is the default experiment)"),
        (["eval"], "eval needs --workdir=DIR"),
        (["generate", "--workdir=nowhere"], "--workdir=nowhere: not the folder of a run (it has no config.json)"),
        (["eval", "--workdir=nowhere"], "--workdir=nowhere: not the folder of a run"),
        (["eval", "--parity", "--workdir=nowhere"], "--workdir=nowhere: not the folder of a run"),
        (["plan", "--workdir=nowhere"], "--workdir=nowhere: not the folder of a run"),
        (["eval", "--parity", "--step=0"], "--step has no effect with --parity"),
        (
            ["generate", "--temperature=0", "--top-k=3"],
            "--top-k has no effect: temperature 0 takes the most likely token",
        ),
        (
            ["generate", "--temperature=0", "--top-p=0"],
            "--top-p has no effect: temperature 0 takes the most likely token",
        ),
        (["generate", "--max-tokens=0"], "argument --max-tokens: '0' is not an int of at least 1"),
        (["generate", "--top-p=1.5"], "argument --top-p: '1.5' is not a number from 0 to 1"),
        (["generate", "--temperature=hot"], "argument --temperature: 'hot' is not a number of at least 0"),
        (["generate", "--seed=-1"], "argument --seed: '-1' is not an int"),
        (["plan", "--format=tables"], "argument --format: invalid choice: 'tables'"),
    ],
)
def test_wrong_requests_are_one_line_and_status_2(run, argv, message, tmp_path):
    assert message in refused(run, *argv)
    assert list(tmp_path.iterdir()) == []


def test_failures_name_their_cause_before_the_trace(run, monkeypatch):
    Path("exp.py").write_text(CONFIG_FILE)

    def fails(error):
        def train(*_):
            raise error

        monkeypatch.setattr(sys.modules["sparsejax.train.loop"], "train", train)
        status = run("train", "--config=exp.py")
        return status, run.err.splitlines()

    status, lines = fails(RunError("loss is\n  not finite"))
    assert (status, lines[0], lines[1]) == (1, "failed: loss is not finite", "Traceback (most recent call last):")
    status, lines = fails(ValueError("bad"))
    assert (status, lines[0], lines[-1]) == (1, "failed: ValueError: bad", "ValueError: bad")
    assert fails(KeyboardInterrupt()) == (130, [])


def test_verbs_return_their_own_status(run, monkeypatch):
    monkeypatch.setattr(sys.modules["sparsejax.plan.command"], "plan_command", lambda *_: 1)
    assert run("plan") == 1


def test_warnings_are_plain_lines_on_stderr_once(run, monkeypatch):
    def plan(*_):
        logging.getLogger("sparsejax.base.writers").warning("removed %d rows", 3)
        logging.getLogger("sparsejax.base.writers").info("a detail")
        return 0

    others = io.StringIO()  # a library gave the root logger a handler of its own
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(others)])
    monkeypatch.setattr(sys.modules["sparsejax.plan.command"], "plan_command", plan)
    for _ in range(2):
        assert run("plan") == 0
        assert (run.out, run.err) == ("", "warning: removed 3 rows\n")
    assert others.getvalue() == ""
    plan()
    assert others.getvalue() == "removed 3 rows\n"  # outside commands logging is the caller's


def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["trian"], []])
def test_help_imports_nothing_heavy(argv):
    code = f"""
import json, sys
from sparsejax.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = python("-c", code)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_as_a_program():
    done = python("-m", "sparsejax", "--help")
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert f"  {verb} " in done.stdout
    done = python("-m", "sparsejax", "generate", "--help")
    assert done.returncode == 0
    assert "--config.KEY" in done.stdout
    assert "--top-p" in done.stdout
    done = python("-m", "sparsejax", "trian")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_devices_appear_before_the_backend_starts(tmp_path):
    code = """
import jax
from sparsejax.base.devices import prepare_devices
prepare_devices(6)
print(len(jax.devices()), jax.config.jax_compilation_cache_dir)
prepare_devices(8)
print(len(jax.devices()))
"""
    environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["6", str(tmp_path / "sparsejax" / "xla"), "6"]
