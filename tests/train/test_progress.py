"""The display on a terminal and in a file."""

import io

import pytest

from sparsejax.train.progress import Display, remaining

TRAIN = {
    "step": 100,
    "split": "train",
    "loss": 2.34567,
    "accuracy": 0.5125,
    "bits_per_byte": 3.3841,
    "tokens_per_second": 8712.4,
    "step_seconds": 0.5,
    "moe/drop_fraction": 0.0312,
    "moe/load_max_over_mean": 1.534,
}
EVAL = {"step": 200, "split": "eval", "loss": float("nan")}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(stream):
    display = Display(stream)
    display.start(total=1000, first_step=90)
    display.update(TRAIN)
    display.note("saved [checkpoint] 100")
    display.update(EVAL)
    display.close()
    display.close()
    return stream.getvalue()


class TestDisplay:
    def test_lines_are_aligned_and_missing_figures_are_dashes(self):
        head, train, note, evaluation = show(io.StringIO()).splitlines()
        titles = ["step", "loss", "accuracy", "%", "bits/byte", "tokens/s", "drop", "%", "load", "max/mean", "ETA"]
        assert head.split() == titles
        assert train.split() == ["train", "100/1000", "2.3457", "51.25", "3.3841", "8,712", "3.12", "1.53", "0:07:30"]
        assert evaluation.split() == ["eval", "200/1000", "nan", "-", "-", "-", "-", "-", "-"]
        assert note == "saved [checkpoint] 100"
        assert len(head) == len(train) == len(evaluation)
        for title, value in [("step", "100/1000"), ("drop %", "3.12"), ("load max/mean", "1.53"), ("ETA", "0:07:30")]:
            assert head.index(title) + len(title) == train.index(value) + len(value), title

    def test_a_bar_on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm")
        text = show(Terminal())
        for words in [
            "100/1000",
            "━",
            "loss 2.3457",
            "drop % 3.12",
            "ETA 0:07:30",
            "saved [checkpoint] 100",
            "eval at step 200: loss nan",
        ]:
            assert words in text, words

    def test_lines_come_out_at_once(self):
        class Flushed(io.StringIO):
            flushes = 0

            def flush(self):
                self.flushes += 1

        stream = Flushed()
        show(stream)
        assert stream.flushes == 4


@pytest.mark.parametrize(
    "step, seconds, text",
    [(100, 0.5, "0:07:30"), (0, 36.6, "10:10:00"), (1000, 1.0, "0:00:00"), (1, None, "-"), (1, float("nan"), "-")],
)
def test_remaining(step, seconds, text):
    assert remaining({"step": step, "step_seconds": seconds}, 1000) == text
