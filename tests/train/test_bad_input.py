"""Requests that are wrong: one line that names what, status 2, and nothing written."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runs import CONFIG, arguments, here, process

MOE = "config.model.blocks.moe"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Corpora are cached inside the test's own folder."""
    monkeypatch.setenv("SPARSEJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def refused(workdir, *flags, **overrides):
    """The line with which `train` refuses; sees to it that there is no folder."""
    error = here(*arguments("train", f"--workdir={workdir}", *flags, **overrides)).error
    assert not workdir.exists()
    return error


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # misspelt, of the wrong type, unknown
        ({"model__d_modle": 3}, ["config.model.d_modle: no such key", "Did you mean 'config.model.d_model'?"]),
        ({"train__steps": "many"}, ["config.train.steps: 'many' is not allowed; must be an int"]),
        ({"train__steps": 1.5}, ["config.train.steps: '1.5' is not allowed; must be an int"]),
        ({"train__tensorboard": 3}, ["config.train.tensorboard: '3' is not allowed; must be true or false"]),
        ({"model__dtype": "float16"}, ["config.model.dtype: 'float16' is not allowed", "bfloat16"]),
        ({"optimizer": "adamv"}, ["config.optimizer", "'adamv'", "adamw, adafactor", "Did you mean 'adamw'?"]),
        ({"optimizer__schedule": "cosin"}, ["config.optimizer.schedule", "'cosin'", "Did you mean 'cosine'?"]),
        ({"model__pattern": "(dense, mow)"}, ["config.model.pattern: no block 'mow'", "Did you mean 'moe'?"]),
        # numbers that make no sense
        ({"train__steps": 0}, ["config.train.steps: 0 is less than 1"]),
        ({"optimizer__learning_rate": -1}, ["config.optimizer.learning_rate: -1.0; allowed: more than 0"]),
        ({"model__blocks__moe__capacity_factor": 0}, [f"{MOE}.capacity_factor: 0.0 is not positive"]),
        ({"model__head_dim": 0}, ["config.model.head_dim: 0 is less than 2"]),
        ({"model__blocks__moe__router__weight__scale": 0}, [f"{MOE}.router.weight.scale: 0.0 is not positive"]),
        ({"model__blocks__moe__router__selection": "expert_choice"}, [f"{MOE}.router.selection", "allow_leak=true"]),
        ({"model__blocks__moe__router__weight": "constant"}, [f"{MOE}.router.weight", "hash, by_domain"]),
        (
            {"model__blocks__moe__router__limit": "groups", "model__blocks__moe__router__limit.groups": 3},
            [f"{MOE}.router.limit.groups", "3 groups do not divide num_experts=8"],
        ),
        ({"model__num_heads": 3}, ["config.model.num_heads: 3 does not divide d_model=16", "1, 2, 4, 8, 16"]),
        ({"mesh__expert": 0}, ["config.mesh.expert: 0 is not a number of devices"]),
        (
            {"model__blocks__moe__dispatch": "grouped", "model__blocks__moe__grouped_matmul": "megablox"},
            [f"{MOE}.grouped_matmul: 'megablox' is a kernel for TPU and this is a cpu", "auto, slots, ragged_dot"],
        ),
        (
            {"model__blocks__moe__dispatch": "grouped", "model__blocks__moe__exchange": "ragged_all_to_all"},
            [f"{MOE}.exchange: XLA has no 'ragged_all_to_all' for cpu", "auto, all_to_all, all_gather"],
        ),
        ({"train__profile": "(5, 3)"}, ["config.train.profile: (5, 3)", "train.steps=12"]),
        # settings that contradict each other
        (
            {"model__blocks__moe__router__selection__k": 9},
            [f"{MOE}.router.selection.k: 9 experts per token", "num_experts=8"],
        ),
        (
            {"model__blocks__moe__router__selection__k": 1},
            [f"{MOE}.router.weight", "weight is always the same here", "weight=raw"],
        ),
        (
            {"model__blocks__moe__group_size": 48},
            [f"{MOE}.group_size: 48 does not divide the 128 tokens", "sizes that fit: ", "32, 64"],
        ),
        (
            {"optimizer__schedule__warmup_steps": 20},
            ["config.optimizer.schedule.warmup_steps: 20 warm-up steps in a run of 12 steps; allowed: 0 to 11"],
        ),
        (
            {"train__accumulation": 3},
            ["config.data.batch_size: 8 rows do not split evenly", "train.accumulation=3", ": 6, 9"],
        ),
        ({"model__vocab_size": 100}, ["config.model.vocab_size: 100 is less than the tokenizer's 256 tokens"]),
        ({"model__attention": "splash"}, ["config.model.attention: 'splash' is a kernel for TPU", "auto, xla"]),
        # settings without effect
        ({"data__path": "x.txt"}, ["config.data.path: 'x.txt' has no effect: only name = 'text' reads it"]),
        ({"model__remat_names": "(attention,)"}, ["config.model.remat_names: ", "has no effect", "remat=none"]),
        (
            {"model__pattern": "(moe,)", "model__blocks__dense__d_ff": 8},
            ["config.model.blocks.dense.d_ff: 8 has no effect: no layer"],
        ),
        # corpora
        ({"data__name": "no_such_corpus"}, ["config.data.name", "'no_such_corpus'"]),
        ({"data__name": "text"}, ["config.data.path: name = 'text' reads local files"]),
        ({"data__name": "text", "data__path": "/no/such.txt"}, ["config.data.path: '/no/such.txt' is no file"]),
        ({"data__tokenizer": "/no/tokenizer.json"}, ["config.data.tokenizer", "/no/tokenizer.json"]),
    ],
    ids=lambda value: ",".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_values(workdir, overrides, parts):
    error = refused(workdir, **overrides)
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("mesh", "overrides", "parts"),
    [
        (
            "1,4,1",
            {"model__blocks__moe__num_experts": 6},
            [f"{MOE}.num_experts: 6 is not divisible by mesh.expert=4", "sizes of mesh.expert that fit: 1, 2, 3, 6"],
        ),
        ("1,1,4", {}, ["config.model.num_heads: 2 is not divisible by mesh.tensor=4", "that fit: 1, 2"]),
        ("3,1,1", {}, ["config.data.batch_size: 8 rows", "mesh.data=3", ": 6, 9"]),
        ("8,2,1", {"data__batch_size": 16}, ["config.mesh: 8×2×1 needs 16 devices, there are 8"]),
        ("-1,3,1", {}, ["config.data.batch_size: 8 rows", "mesh.data=2", "mesh.expert=3"]),
        ("2,2", {}, ["argument --mesh: '2,2' is not D,E,T"]),
    ],
)
def test_meshes_that_do_not_fit(workdir, mesh, overrides, parts):
    error = refused(workdir, f"--mesh={mesh}", **overrides)
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("content", "overrides", "parts"),
    [
        (b"", {}, ["config.data.path", "has 0 training tokens", "a row takes 17"]),
        (b"too short", {}, ["config.data.path", "training tokens", "a row takes 17"]),
        (b"\xff\xfe" * 100, {}, ["config.data.path", "is not UTF-8"]),
        (
            b"a good text " * 100,
            {"data__validation_fraction": 0},
            ["config.data.validation_fraction", "to evaluate on"],
        ),
    ],
    ids=["empty", "short", "not UTF-8", "no validation"],
)
def test_texts_that_cannot_be_trained_on(workdir, tmp_path, content, overrides, parts):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    error = refused(workdir, data__name="text", data__path=path, **overrides)
    for part in parts:
        assert part in error


def test_a_file_that_holds_no_documents(workdir, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"body": "text"}) + "\n")
    error = refused(workdir, data__name="text", data__path=path)
    assert f"'{path}' line 1 has no key 'text' (data.text_feature); it has: body" in error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config=configs/tinny.py"], ["--config=configs/tinny.py: no such file", "Did you mean 'configs/tiny.py'?"]),
        (["--config=configs"], ["--config=configs: must be FILE.py, FILE.py:arg or a run's config.json"]),
        ([CONFIG, "--wokrdir=x"], ["unknown flag '--wokrdir=x' for train", "Did you mean '--workdir'?"]),
        ([CONFIG, "--config.train.steps"], ["--config.train.steps needs a value"]),
    ],
)
def test_wrong_words(workdir, words, parts, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    error = here("train", *words, f"--workdir={workdir}").error
    for part in parts:
        assert part in error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("c.train.stepz = 3", ["exp.py:4: ", "config.train.stepz", "Did you mean 'config.train.steps'?"]),
        ("c.train.steps = '3'", ["exp.py:4: ", "config.train.steps", "must be an int"]),
        ("c.data.path = 'x.txt'", ["config.data.path", "has no effect"]),
        ("1 / 0", ["exp.py:4: ", "ZeroDivisionError"]),
        ("return 3", ["exp.py: ", "returned 3"]),
    ],
)
def test_wrong_config_files(workdir, tmp_path, monkeypatch, code, parts):
    monkeypatch.chdir(tmp_path)
    Path("exp.py").write_text(
        f"from sparsejax import default_config\ndef get_config():\n    c = default_config()\n    {code}\n    return c\n"
    )
    error = here("train", "--config=exp.py", f"--workdir={workdir}").error
    for part in parts:
        assert part in error
    assert {path.name for path in tmp_path.iterdir()} == {"exp.py"}


def test_folders_that_cannot_be_written(tmp_path):
    """Also as root, whom no permission stops: below a file, and where the kernel makes the folders."""
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    for place, reason in ((blocker, "is not a folder"), (blocker / "run", "cannot be written: Not a directory")):
        assert f"workdir {place} {reason}" in here(*arguments("train", f"--workdir={place}")).error
    assert blocker.read_text() == "kept"
    assert "workdir /proc/run cannot be written: " in here(*arguments("train", "--workdir=/proc/run")).error


AS_NOBODY = """
import os, sys
from sparsejax.base.errors import RequestError
from sparsejax.train.workdir import open_workdir
if os.geteuid() == 0:  # whom no permission stops
    os.seteuid(65534)
try:
    with open_workdir(sys.argv[1]):
        pass
except RequestError as error:
    print(error)
"""


def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        command = [sys.executable, "-c", AS_NOBODY, f"{name}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"workdir {name}/run cannot be written: Permission denied\n"
        assert os.listdir(name) == []


LOCKED = """
import os, sys
from sparsejax.cli import _verb_parser, main
_verb_parser(sys.argv[1])  # what it imports may lie where nobody can read
if os.geteuid() == 0:
    os.seteuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_a_folder_that_may_not_be_entered(verb):
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "secret" / "run").mkdir(parents=True)
        os.chmod(name, 0o755)
        os.chmod(f"{name}/secret", 0o000)
        words = [verb, CONFIG, f"--workdir={name}/secret/run"]
        done = subprocess.run([sys.executable, "-c", LOCKED, *words], capture_output=True, text=True, check=False)
        os.chmod(f"{name}/secret", 0o755)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "secret/run" in done.stderr and "Permission denied" in done.stderr
        assert not list((Path(name) / "secret" / "run").iterdir())


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_name_that_is_too_long(verb):
    assert "File name too long" in here(verb, CONFIG, f"--workdir={300 * 'x'}").error


@pytest.mark.parametrize(
    "overrides", [{"train__stepz": 3}, {"data__name": "no_such_corpus"}, {"model__vocab_size": 100}], ids=str
)
def test_for_real(workdir, overrides):
    """The same as a process: nothing but the line reaches the terminal, whatever libraries have to say."""
    done = process(*arguments("train", f"--workdir={workdir}", **overrides))
    assert next(iter(overrides)).replace("__", ".") in done.error
    assert not workdir.exists()
