"""A command in a process that ends with the study that began it: `python -m sparsejax.ablate.child VERB …`"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """The kernel asks this process to stop, as a scheduler would, when its parent is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # it went before
            sys.exit(1)


if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("sparsejax", run_name="__main__")
