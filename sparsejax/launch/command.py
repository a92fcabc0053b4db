"""The `launch` command."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RequestError, RunError
from sparsejax.launch import jobset, local, slurm, tpu_vm
from sparsejax.launch.job import Rendered, Request
from sparsejax.train.config import ExperimentConfig

WAITING = ("local", "tpu-vm")
"""Targets whose job, submitted, ends when the training does; the others hand it over."""
RENDER = {"local": local.render, "slurm": slurm.render, "jobset": jobset.render, "tpu-vm": tpu_vm.render}


def launch_command(
    loaded: Loaded[ExperimentConfig],
    file: str,
    workdir: Path,
    overrides: Sequence[tuple[str, str]],
    args: argparse.Namespace,
) -> int:
    """Prints the job, or runs it with `--submit`. A wrong request is refused before anything is printed."""
    request = Request(
        config=loaded.config,
        file=file,
        workdir=workdir,
        overrides=overrides,
        init_from=args.init_from,
        allow_config_change=args.allow_config_change,
        start_timeout=args.start_timeout,
        words=args.words,
    )
    rendered = RENDER[args.target](request, args)
    if args.submit:
        return submit(rendered)
    print(rendered.text, end="")
    return 0


def submit(rendered: Rendered) -> int:
    """Hands the job to its program; a script takes the place of this process, signals and exit status included.

    Raises:
      RequestError: the program is not on this machine.
      RunError: it does not take the job.
    """
    program = rendered.program[0]
    if shutil.which(program) is None:
        raise RequestError(f"--submit needs {program}, which is not on this machine; without it, the job is printed")
    sys.stdout.flush()
    if not rendered.from_stdin:
        os.execvp(program, [*rendered.program, rendered.text])
    done = subprocess.run(rendered.program, input=rendered.text, text=True, check=False)
    if done.returncode:
        raise RunError(f"{program} does not take the job (status {done.returncode})")
    return 0
