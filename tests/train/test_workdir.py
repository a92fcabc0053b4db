"""One trainer per folder, refusals that write nothing, and polite stopping."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsejax.base.errors import RequestError
from sparsejax.train.signals import StopOnSignal
from sparsejax.train.workdir import open_workdir

HOLD = """
import sys, time
from sparsejax.train.workdir import open_workdir
with open_workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path/run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


class TestWorkdir:
    def test_is_made_and_can_be_opened_again(self, tmp_path):
        for _ in range(2):
            with open_workdir(tmp_path / "a" / "b") as workdir:
                assert workdir == tmp_path / "a" / "b" and workdir.is_dir()

    def test_the_second_trainer_is_refused_and_writes_nothing(self, tmp_path, holder):
        before = contents(tmp_path)
        with pytest.raises(RequestError, match=rf"another trainer holds workdir .*run \(pid {holder.pid}\)"):
            with open_workdir(tmp_path / "run"):
                pass
        assert contents(tmp_path) == before

    def test_a_second_opening_in_one_process_is_refused_too(self, tmp_path):
        with open_workdir(tmp_path):
            with pytest.raises(RequestError, match=rf"pid {os.getpid()}"):
                with open_workdir(tmp_path):
                    pass

    def test_a_killed_trainer_holds_nothing(self, tmp_path, holder):
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with open_workdir(tmp_path / "run"):
            pass

    def test_a_failed_run_holds_nothing(self, tmp_path):
        with pytest.raises(OSError, match="of the run itself") as caught:
            with open_workdir(tmp_path):
                raise OSError("of the run itself")
        with open_workdir(tmp_path):  # although the trace still refers to what the run had opened
            assert caught.value

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "run").write_text("precious")
        with pytest.raises(RequestError, match="run is not a folder"):
            with open_workdir(tmp_path / "run"):
                pass
        assert (tmp_path / "run").read_text() == "precious"

    def test_a_path_below_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RequestError, match="cannot be written: Not a directory"):
            with open_workdir(tmp_path / "file" / "run"):
                pass

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a read-only file system even for root")
    def test_a_place_that_cannot_be_written_is_refused(self):
        with pytest.raises(RequestError, match="workdir /proc/run cannot be written"):
            with open_workdir("/proc/run"):
                pass

    def test_a_read_only_folder_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(RequestError, match="cannot be written: it is read-only"):
            with open_workdir(tmp_path):
                pass
        assert list(tmp_path.iterdir()) == []


class TestStopOnSignal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_asks(self, number):
        before = signal.getsignal(number)
        with StopOnSignal() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested and stop.name == number.name
        assert signal.getsignal(number) is before

    def test_the_second_interrupt_insists(self):
        patient, before = False, signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            with StopOnSignal():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
                patient = True
                signal.raise_signal(signal.SIGINT)
        assert patient
        assert signal.getsignal(signal.SIGINT) is before

    def test_in_another_thread_it_leaves_the_handlers_alone(self):
        before, seen = signal.getsignal(signal.SIGINT), []

        def run():
            with StopOnSignal() as stop:
                seen.append((signal.getsignal(signal.SIGINT), stop.requested))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == [(before, False)]
