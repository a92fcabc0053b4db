"""Stopping a run politely: the first signal asks, the second interrupt insists."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from sparsejax.base.processes import num_processes, peek, set_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


LEAD = 3
"""By so many looks one process can be ahead of another: a look follows a step or a batch, which all compute together,
but for the first batch of an evaluation; and a step may still run while the host goes on."""


class StopOnSignal:
    """In its `with` block, the first SIGINT or SIGTERM sets `requested`; a SIGINT after it raises KeyboardInterrupt.

    Python delivers signals to the main thread; a block in another thread leaves the handlers alone. Of several
    processes any may get a signal: at their looks they agree on the one from which `requested` is set in all.
    """

    def __init__(self):
        self._received: signal.Signals | None = None  # the first signal
        self._agreed: str | None = None  # the name of the one that all processes heed
        self._looks = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal asked to stop."""
        return self.name is not None

    @property
    def name(self) -> str | None:
        """Of the signal that asked."""
        if num_processes() > 1:
            return self._agreed
        return None if self._received is None else self._received.name

    def look(self) -> bool:
        """Whether to stop here. All processes make this call, once after every step and before every batch of an
        evaluation."""
        if num_processes() > 1 and self._agreed is None:
            self._looks += 1
            if self._received is not None:
                set_once("stop", f"{self._received.name} {self._looks + LEAD}")
            name, _, look = (peek("stop") or "").partition(" ")
            if name and self._looks >= int(look):
                self._agreed = name
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
