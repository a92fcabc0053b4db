"""The life of a job of several processes: how it begins, and how the end of one of them ends all, with the cause.

Nothing here decides what lives: `jax.distributed` starts the job, and its heartbeats tell who is gone. But its runtime
then aborts the survivors, each with a page of words; here they say in one line who is gone, or what another one failed
of, and leave with an exit status."""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Optional

import jax
from jax._src import distributed
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

from sparsejax.base.cluster import Place
from sparsejax.base.errors import outcome, tell
from sparsejax.base.processes import PREFIX, barrier, peek, process_id, set_once, store

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as gone."""
BEAT = 1.0
"""Seconds between two looks at the others."""
HEARD = 10
"""Seconds that a process which failed stays, for the others to hear of what."""
FAILED = "failed"
LOST = re.compile(r"gloo|nccl|unavailable|heartbeat|barrier failed|connection (closed|reset)", re.IGNORECASE)
"""In the message of an error that the end of another process may have caused."""


@contextlib.contextmanager
def job(place: Optional[Place], patience: int) -> Iterator[None]:
    """In its block this process is part of the job of `place`, whose processes have `patience` seconds to come; without
    a place it is alone.

    When one of them raises, all end with its exit status, and say of what; when one is gone, all others end with status
    1, at the latest `HEARTBEAT` seconds and a few later.
    """
    if place is None:
        yield
        return
    connected = threading.Event()
    _speak_when_aborted(place, patience, connected)
    _connect(place, patience)
    connected.set()
    watch = _Watch()
    watch.start()
    try:
        yield
        barrier("the end")
    except BaseException as error:
        _fail(error, watch)
    watch.over.set()
    jax.distributed.shutdown()


def _connect(place: Place, patience: int) -> None:
    # It takes SIGTERM for itself, and orbax counts steps with it that are not ours: `StopOnSignal` sees to signals.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX gives the service an hour to wait for processes. Before the clients give up, it can still say who is missing.
    service = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(service, cluster_register_timeout=patience)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            cluster_detection_method=place.method,
            initialization_timeout=patience + 5,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=60,
        )
    finally:
        _jax.get_distributed_runtime_service = service


class _Watch(threading.Thread):
    """Meets its like in the other processes, over and over. Where one does not come any more, the barrier fails."""

    def __init__(self):
        super().__init__(name="watch over the other processes", daemon=True)
        self.over = threading.Event()  # the job has come to its end
        self.failing = threading.Event()  # this process says itself of what it fails

    def run(self) -> None:
        while not self.over.wait(BEAT):
            try:
                store().wait_at_barrier(f"{PREFIX}watch", 1000 * 3600)
            except jax.errors.JaxRuntimeError as error:
                if not self.over.is_set():
                    _say(f"failed: {_who_is_gone(str(error))}")
                    _leave(1)
            if self.over.is_set():
                return
            told = None
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the next meeting tells who is gone
                told = peek(FAILED)
            if told is not None and not self.failing.is_set():
                status, line = json.loads(told)
                _say(line)
                _part(status)


def _who_is_gone(error: str) -> str:
    if gone := re.search(r"[Tt]ask (\d+) heartbeat timeout", error):
        return f"process {gone[1]} is gone (no heartbeat for {HEARTBEAT} s)"
    if "UNAVAILABLE" in error:
        return "process 0, the coordinator, is gone"
    return f"the processes lost each other: {error.splitlines()[0]}"


def _fail(error: BaseException, watch: _Watch) -> NoReturn:
    """Says of what this process fails, here and to the others, and ends it."""
    if _may_be_lost(error):
        time.sleep(2 * HEARTBEAT)  # the watch finds out who is gone, and ends this process
    watch.failing.set()
    status, line = outcome(error)
    kind, _, cause = line.partition(": ")
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        set_once(FAILED, json.dumps([status, f"{kind}: process {process_id()}: {cause}"]))
    tell(error)
    _part(status)


def _may_be_lost(error: BaseException) -> bool:
    """Whether the first cause may be that another process has ended."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and LOST.search(str(error)) is not None


def _part(status: int) -> NoReturn:
    """Ends this process, which has said why, once every other one has: the first takes the store with it."""
    _parting.append(status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store().wait_at_barrier(f"{PREFIX}heard", 1000 * HEARD)
    _leave(status)


_parting: list[int] = []  # the status that this process is about to end with


def _say(line: str) -> None:
    os.write(sys.stderr.fileno(), f"{line}\n".encode())  # whatever the main thread does to the stream


def _leave(status: int) -> NoReturn:
    """Ends this process at once, whatever its other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # C has no reference to what it calls


def _speak_when_aborted(place: Place, patience: int, connected: threading.Event) -> None:
    """Makes the runtime's abort end with a plain line, and with status 1.

    It leaves no time for a signal handler of Python's, which would run when the runtime returns.
    """

    def speak(number: int) -> None:
        if _parting:
            _leave(_parting[0])
        if not connected.is_set():
            late = f"not all {place.num_processes} processes came within {patience} s"
            _say(f"failed: {late}; above is who did not, here or where the coordinator is")
        elif not _reachable(distributed.global_state.coordinator_address):
            _say("failed: process 0, the coordinator, is gone")
        else:
            _say("failed: the runtime ended this process for the reason above")
        _leave(1)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _Handler), ctypes.c_void_p
    _handlers.append(_Handler(speak))
    libc.signal(signal.SIGABRT, _handlers[-1])


def _reachable(address: Optional[str]) -> bool:
    host, _, port = (address or "").rpartition(":")
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), timeout=2):
        return True
    return False
