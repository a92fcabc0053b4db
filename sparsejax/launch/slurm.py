"""A batch job of SLURM: requeued when it is preempted or its time is up, started again when it fails.

SLURM sends SIGTERM to the processes when it wants the nodes back, and `--grace` seconds before the time limit. They
save and end with a status of their own (`--stopped-status`), by which the script tells a run that is to go on from one
that is finished: a job that ends before SLURM kills it is otherwise taken for completed, and never requeued."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from sparsejax.base.errors import RequestError
from sparsejax.launch.job import KILLED, STOPPED, WRONG, Rendered, Request, check_value, default_name, exports
from sparsejax.launch.xla_flags import environment

LINGER = 60  # seconds that the others have once one process has ended, to save or to say why they cannot go on

LOCAL = ("/tmp", "/var/tmp", "/dev/shm")

SCRIPT = """\
#!/usr/bin/env bash
{comment}
{directives}
set -u
{prepare}
# Status {stopped}: a signal stopped the run, which has saved and is to go on; {killed}: it had not begun.
# {wrong}: the request is wrong. A process that ends leaves the others time to save (--kill-on-bad-exit=0).
for attempt in $(seq 0 {restarts}); do
  [ "$attempt" -eq 0 ] || sleep 10
  {srun}
  status=$?
  case "$status" in
    0 | {wrong}) exit "$status" ;;
    {stopped} | {killed})
      scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM ends this script
      exit "$status"
      ;;
  esac
  echo "attempt $attempt: status $status" >&2
done
exit "$status"
"""


def render(request: Request, args: argparse.Namespace) -> Rendered:
    """The script for `sbatch`. One process for each GPU, as JAX expects it under SLURM."""
    gpus, per_node, devices = _layout(args)
    processes = args.nodes * per_node
    if args.nodes > 1 and _is_local(request.workdir, args.submit):
        raise RequestError(f"--workdir={request.workdir} is each node's own; {args.nodes} nodes need a shared folder")
    train = request.train(processes, devices, "gpu" if gpus else "cpu")
    train += [f"--stopped-status={STOPPED}"] + (["--distributed=slurm"] if processes > 1 else [])
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={LINGER}"]
    srun += [f"--cpus-per-task={args.cpus_per_process}"] if args.cpus_per_process else []
    on_cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    variables = (environment("gpu", several=processes > 1) if gpus else on_cpu) | dict(args.env)
    text = SCRIPT.format(
        comment=request.comment,
        directives="\n".join(f"#SBATCH {flag}" for flag in _directives(request, args, gpus, per_node)),
        prepare="\n".join([*exports(variables), *args.setup, ""]),
        stopped=STOPPED,
        killed=KILLED,
        wrong=WRONG,
        restarts=args.max_restarts,
        srun=shlex.join([*srun, args.python or sys.executable, *train]),
    )
    return Rendered(text=text, program=("sbatch",), from_stdin=True)


def _is_local(workdir: Path, submit: bool) -> bool:
    """Whether each node has this folder for itself. A relative one begins where sbatch is called: here, to submit."""
    known = submit or workdir.is_absolute()
    folders = (workdir, Path(os.path.realpath(workdir))) if known else ()
    return any(folder.is_relative_to(local) for folder in folders for local in LOCAL)


def _layout(args: argparse.Namespace) -> tuple[int, int, int]:
    """GPUs of a node, processes of a node, devices of a process."""
    if not args.gpus_per_node:
        return 0, args.processes_per_node or 1, args.devices_per_process or 1
    for flag in ("processes_per_node", "devices_per_process"):
        if getattr(args, flag) is not None:
            name = f"--{flag.replace('_', '-')}"
            raise RequestError(f"{name} has no effect with --gpus-per-node: each GPU has a process of its own")
    return args.gpus_per_node, args.gpus_per_node, 1


def _directives(request: Request, args: argparse.Namespace, gpus: int, per_node: int) -> list[str]:
    """What is asked of SLURM. A value is one word without quotes, which sbatch would read in its own way."""
    name = args.name or default_name(request.stem)
    check_value("--name", name, r"[\w.+-]+", "letters, digits and _ . + -")
    if args.partition is not None:
        check_value("--partition", args.partition, r"[\w.,+-]+", "letters, digits and _ . , + -")
    if args.time is not None:
        check_value(
            "--time", args.time, r"(\d+-)?\d+(:\d+){0,2}", "minutes, hours:minutes:seconds, days-hours and so on"
        )
    for flag in args.sbatch:
        form = "--FLAG or --FLAG=VALUE, without spaces and quotes"
        check_value("--sbatch", flag, r"--[a-z][a-z-]*(=[\w.,:/@%+*-]+)?", form, 200)
    flags = [f"--job-name={name}", f"--nodes={args.nodes}", f"--ntasks-per-node={per_node}"]
    flags += [f"--gpus-per-node={gpus}"] if gpus else []
    flags += [f"--cpus-per-task={args.cpus_per_process}"] if args.cpus_per_process else []
    flags += [f"--partition={args.partition}"] if args.partition else []
    flags += [f"--time={args.time}"] if args.time else []
    again = ["--requeue", "--open-mode=append", f"--signal=TERM@{args.grace}"]
    return [*flags, "--output=%x-%j.log", *again, *args.sbatch]
