"""How many runs a machine takes at once."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

BYTES_PER_PARAMETER = 16
"""Of a run on the processor: parameters, gradients and two moments in float32."""
BYTES_PER_RUN = 2 * 2**30
"""Of a run beside them: the program, the compiler, activations."""
GROUPS = (
    ("0::", Path("/sys/fs/cgroup"), "memory.max"),
    (":memory:", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)
"""Control groups of Linux, version 2 and 1: a mark in /proc/self/cgroup, where they are mounted, a limit's file."""


def slots(parameters: int) -> int:
    """Runs at once, of models of so many parameters: one where there are accelerators, as each takes all of them; else
    by cores and memory."""
    if any(glob.glob(each) for each in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")):
        return 1
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min([here, *limits(Path("/proc/self/cgroup"), GROUPS)])
    return max(1, min(len(os.sched_getaffinity(0)), memory // (BYTES_PER_PARAMETER * parameters + BYTES_PER_RUN)))


def limits(own: Path, groups: tuple[tuple[str, Path, str], ...]) -> Iterator[int]:
    """Bytes that the control group of this process, and each above it, may use. `own`: a file such as
    /proc/self/cgroup; `groups`: as `GROUPS`."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for mark, root, name in groups:
        for line in lines:
            _, found, path = line.partition(mark)
            place = root / path.lstrip("/")
            for folder in (place, *place.parents) if found else ():
                text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
                if folder.is_relative_to(root) and text != "max":
                    yield int(text)
