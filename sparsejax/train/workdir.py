"""The folder of a run, held by one trainer at a time."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from sparsejax.base.errors import RequestError
from sparsejax.base.processes import barrier, is_first

LOCK = ".lock"  # locked by the operating system, which lets go when the process dies, however it dies
OWNER = ".lock.owner"  # who holds it, for the message; of no consequence when stale


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike) -> Iterator[Path]:
    """Makes the folder where there is none, holds it for the length of the `with` block and gives its absolute path.

    Raises `RequestError`, with nothing written, when it is no folder, cannot be written, or another process holds it.
    Of the processes of one job the first holds it, for all.
    """
    workdir = Path(path).absolute()
    if not is_first():
        barrier("the folder of the run is held")
        yield workdir
        return
    lock = filelock.FileLock(workdir / LOCK, blocking=False, thread_local=False)
    try:
        if workdir.exists() and not workdir.is_dir():
            raise RequestError(f"workdir {workdir} is not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
        lock.acquire()
    except filelock.Timeout:
        raise RequestError(f"another trainer holds workdir {workdir}{_owner(workdir)}") from None
    except OSError as error:
        raise RequestError(f"workdir {workdir} cannot be written: {error.strerror}") from None
    try:
        _claim(workdir)
        barrier("the folder of the run is held")
        yield workdir
    finally:
        lock.release()


def _claim(workdir: Path) -> None:
    try:
        (workdir / OWNER).write_text(f"{os.getpid()} {socket.gethostname()}")
    except OSError as error:
        raise RequestError(f"workdir {workdir} cannot be written: {error.strerror}") from None


def _owner(workdir: Path) -> str:
    """' (pid N)', with the host's name when it is another one; '' when the owner has not said."""
    with contextlib.suppress(OSError, ValueError):
        pid, host = (workdir / OWNER).read_text().split()
        return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
    return ""
