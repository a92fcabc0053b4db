"""Stopping a run politely: the first signal asks, the second interrupt insists."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """In its `with` block, the first SIGINT or SIGTERM sets `requested`; a SIGINT after it raises KeyboardInterrupt.

    Python delivers signals to the main thread; a block in another thread leaves the handlers alone.
    """

    def __init__(self):
        self.received: signal.Signals | None = None  # the first signal
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal asked to stop."""
        return self.received is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
