"""XLA flags that compile in half the time: for the tests, and for processes that are to compute the same bits."""

import os
import subprocess
import sys

import pytest
from jaxlib import xla_client

WANTED = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
READ_FLAGS = "from jaxlib import xla_client as xla; xla.CompileOptions().executable_build_options.debug_options"


def together(flags: str) -> dict[str, str]:
    """The variable of the environment, with what is in it already."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}


def known(flags: str) -> bool:
    """XLA ends the process at a flag that it does not know, and some version may drop one."""
    command = [sys.executable, "-c", READ_FLAGS]
    return subprocess.run(command, env=os.environ | together(flags), capture_output=True).returncode == 0


FLAGS = WANTED if known(WANTED) else ""


def use() -> None:
    """In this process, before it has a backend. Processes that it starts do not inherit them: users' have them not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", together(FLAGS)["XLA_FLAGS"])
        _ = xla_client.CompileOptions().executable_build_options.debug_options  # XLA reads them once
