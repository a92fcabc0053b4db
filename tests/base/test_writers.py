"""Files that survive crashes: whole rows, no duplicates, no hangs on a full disk."""

import json
import math
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import RunError
from sparsejax.base.writers import ArraysWriter, JsonlWriter, MetricsWriter, read_jsonl, write_atomically


def row(step, split="train", **more):
    return {"step": step, "split": split, "loss": 1.0 / step, **more}


def write(path, rows, resume_step=0):
    writer = JsonlWriter(path, resume_step)
    written = [writer.append(row) for row in rows]
    writer.close()
    return written


def steps(path):
    rows, broken = read_jsonl(path)
    assert broken == 0
    return [(row["split"], row["step"]) for row in rows]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


class TestJsonl:
    def test_rows_come_back(self, path):
        rows = [row(1, grad_norm=np.float32(0.5), tokens=jnp.int32(7)), row(1, "eval"), row(2, note=None)]
        assert write(path, rows) == [True] * 3
        assert read_jsonl(path) == ([row(1, grad_norm=0.5, tokens=7), row(1, "eval"), row(2, note=None)], 0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), jnp.float32("-inf")])
    def test_what_json_lacks_becomes_null(self, path, value):
        write(path, [row(1, x=value)])
        parsed = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert parsed["x"] is None

    def test_every_row_is_on_disk_at_once(self, path):
        writer = JsonlWriter(path)
        writer.append(row(1))
        assert steps(path) == [("train", 1)]
        writer.append(row(2))
        assert steps(path) == [("train", 1), ("train", 2)]
        writer.close()

    def test_a_write_done_in_parts_is_completed(self, path, monkeypatch):
        whole = os.write
        monkeypatch.setattr("os.write", lambda file, data: whole(file, data[:5]))
        write(path, [row(1), row(2)])
        assert steps(path) == [("train", 1), ("train", 2)]

    def test_a_resume_takes_back_later_rows(self, path, caplog):
        write(path, [row(step) for step in (10, 20, 30, 40)] + [row(20, "eval"), row(40, "eval")])
        assert write(path, [row(20, "eval"), row(30), row(40), row(40, "eval")], 20) == [False, True, True, True]
        assert steps(path) == [
            (s, n) for s, n in [("train", 10), ("train", 20), ("eval", 20), ("train", 30), ("train", 40)]
        ] + [("eval", 40)]
        assert "removed 3 rows after step 20" in caplog.text

    def test_a_run_that_begins_anew_keeps_the_rows_it_finds(self, path, caplog):
        for first in (10, 20, 30):
            write(path, [row(first), row(first + 1)])
        assert [steps(path.with_name(name)) for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")] == [
            [("train", first), ("train", first + 1)] for first in (10, 20, 30)
        ]
        assert "no checkpoint to go on from" in caplog.text and "metrics.2.jsonl" in caplog.text

    @pytest.mark.parametrize(
        "garbage",
        [
            b'{"step": 3, "split": "tr',
            b"\xff\xfe\x00garbage",
            b"[1, 2]",
            b'{"step": "3", "split": "train"}',
            b'{"split": "train"}',
            b'{"step": 3}',
            b'{"step": 2, "split": "train"}{"step": 3, "split": "train"}',
        ],
        ids=range(7),
    )
    @pytest.mark.parametrize("place", ["end", "middle"])
    def test_broken_lines_are_removed(self, path, garbage, place, caplog):
        write(path, [row(1), row(2)])
        first, second, _ = path.read_bytes().split(b"\n")
        lines = [first, second, garbage] if place == "end" else [first, garbage, second, b""]
        path.write_bytes(b"\n".join(lines))
        assert read_jsonl(path) == ([row(1), row(2)], 1)
        assert write(path, [row(3)], resume_step=2) == [True]
        assert steps(path) == [("train", 1), ("train", 2), ("train", 3)]
        assert "removed 1 broken lines" in caplog.text

    def test_a_last_line_without_its_end_is_completed(self, path):
        write(path, [row(1), row(2)])
        path.write_bytes(path.read_bytes()[:-1])
        write(path, [row(3)], resume_step=2)
        assert steps(path) == [("train", 1), ("train", 2), ("train", 3)]

    def test_duplicates_are_removed(self, path):
        write(path, [row(1), row(2)])
        path.write_bytes(path.read_bytes() * 2)
        JsonlWriter(path, resume_step=2).close()
        assert steps(path) == [("train", 1), ("train", 2)]

    def test_a_folder_in_its_place_is_named(self, path):
        path.mkdir()
        with pytest.raises(RunError, match=r"metrics\.jsonl could not be read: Is a directory"):
            JsonlWriter(path)

    def test_a_whole_file_is_left_alone(self, path, caplog):
        write(path, [row(1), row(2)])
        before = path.stat().st_ino
        write(path, [row(3)], resume_step=2)
        assert path.stat().st_ino == before and not caplog.records

    def test_a_crash_while_cleaning_keeps_the_old_file(self, path, monkeypatch):
        write(path, [row(1), row(2)])
        before = path.read_bytes()
        monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: No space left on device"):
            JsonlWriter(path, resume_step=1)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


class TestArrays:
    def test_arrays_come_back(self, tmp_path):
        ArraysWriter(tmp_path / "routing").write(
            20, {"layer_1/assigned": jnp.arange(3), "layer_1/dropped": np.zeros(3, int)}
        )
        with np.load(tmp_path / "routing" / "20.npz") as arrays:
            assert sorted(arrays) == ["layer_1/assigned", "layer_1/dropped"]
            np.testing.assert_array_equal(arrays["layer_1/assigned"], [0, 1, 2])

    def test_a_resume_takes_back_later_files_and_unfinished_ones(self, tmp_path):
        writer = ArraysWriter(tmp_path)
        for step in (9, 10, 20):
            writer.write(step, {"a": np.zeros(2)})
        (tmp_path / ".30.npz.tmp").write_bytes(b"half")
        (tmp_path / "mine.npz").write_bytes(b"the user's own")
        ArraysWriter(tmp_path, resume_step=10)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10.npz", "9.npz", "mine.npz"]

    def test_atomic(self, tmp_path, monkeypatch):
        write_atomically(tmp_path / "x", b"old")
        monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match="No space"):
            write_atomically(tmp_path / "x", b"new")
        assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


FULL_DISK = """
    import resource, sys
    from sparsejax.base.errors import RunError
    from sparsejax.base.writers import MetricsWriter
    writer = MetricsWriter(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for step in range(1, 200):
        row = {"step": step, "split": "train", "loss": 1.0}
        writer._events.write(row)
        try:
            writer._rows.append(row)
        except RunError as error:
            message = str(error)
    writer.close()
    print(message)
"""


class TestMetrics:
    def test_a_row_goes_everywhere(self, tmp_path, caplog):
        writer = MetricsWriter(tmp_path)
        bad = {"bad": math.nan, "worse": np.float32("inf")}
        writer.write(row(5, **{"moe/drop_fraction": 0.25}, **bad), {"routing": {"layer_0/assigned": np.arange(4)}})
        writer.close()
        assert steps(tmp_path / "metrics.jsonl") == [("train", 5)]
        assert (tmp_path / "routing" / "5.npz").exists()
        (events,) = (tmp_path / "tensorboard").iterdir()
        assert b"train/moe/drop_fraction" in events.read_bytes() and b"train/loss" in events.read_bytes()
        assert b"train/bad" not in events.read_bytes() and b"train/worse" not in events.read_bytes()
        assert not caplog.records  # tensorboardX would have a warning for each

    def test_what_is_written_twice_stays_as_it_was(self, tmp_path):
        for resume_step in (0, 5):
            writer = MetricsWriter(tmp_path, resume_step, tensorboard=False)
            writer.write(row(5), {"evaluations": {"nats": np.full(2, resume_step)}})
            writer.close()
        assert steps(tmp_path / "metrics.jsonl") == [("train", 5)]
        with np.load(tmp_path / "evaluations" / "5.npz") as arrays:
            assert arrays["nats"].tolist() == [0, 0]

    def test_a_crash_between_arrays_and_row_is_made_up_for(self, tmp_path):
        """The arrays come first: that of a step without its row is written again."""
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer._arrays["evaluations"].write(5, {"nats": np.zeros(2)})
        writer.close()
        writer = MetricsWriter(tmp_path, 5, tensorboard=False)
        writer.write(row(5), {"evaluations": {"nats": np.ones(2)}})
        writer.close()
        with np.load(tmp_path / "evaluations" / "5.npz") as arrays:
            assert arrays["nats"].tolist() == [1, 1]

    def test_a_resume_voids_the_later_events(self, tmp_path):
        from tensorboardX.proto.event_pb2 import Event

        for resume_step in (0, 5):
            writer = MetricsWriter(tmp_path, resume_step)
            writer.write(row(resume_step + 1))
            writer.close()
        newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        events, data = [], newest.read_bytes()
        while data:  # a record: length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        starts = [event.step for event in events if event.HasField("session_log")]
        assert starts == [6]

    def test_without_tensorboard(self, tmp_path):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer.write(row(1))
        writer.close()
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_a_full_disk_is_reported_and_hangs_nothing(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FULL_DISK), tmp_path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}/metrics.jsonl could not be written: File too large\n"
        rows, broken = read_jsonl(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and broken == 1
