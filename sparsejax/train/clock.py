"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator

from sparsejax.train.metrics import Row


class Clock:
    """Seconds of a run, and of the window since the last row: of its steps, without evaluation, saving, compiling."""

    def __init__(self):
        self.before = 0.0  # seconds of the run before this process took it up
        self._begun = time.perf_counter()
        self.start()

    def start(self) -> None:
        """Begins a window."""
        self._window, self._out, self._wait, self._steps, self._tokens = time.perf_counter(), 0.0, 0.0, 0, 0

    @property
    def seconds(self) -> float:
        """Of the whole run, everything included."""
        return self.before + time.perf_counter() - self._begun

    def step(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._out += time.perf_counter() - begun

    compiling = paused

    def take(self) -> Row:
        """The timing of the window, and begins a new one."""
        spent = max(time.perf_counter() - self._window - self._out, 1e-9)
        timing = {
            "seconds": self.seconds,
            "step_seconds": spent / self._steps,
            "tokens_per_second": self._tokens / spent,
            "data_wait_fraction": self._wait / spent,
        }
        self.start()
        return timing
