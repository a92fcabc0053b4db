"""Runs that several tests look at, made once."""

import shutil

import pytest

from runs import arguments, here


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = here(*arguments("train", f"--workdir={workdir}"))
    assert done.status == 0, done.err
    return workdir, done.out


@pytest.fixture(scope="session")
def finished_run(_finished):
    """The folder of a run that came to its end. To be looked at, not changed."""
    return _finished[0]


@pytest.fixture(scope="session")
def finished_output(_finished):
    """What that run printed."""
    return _finished[1]


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """The same run in a folder that a test may do with as it likes."""
    return shutil.copytree(finished_run, tmp_path / "copy")
