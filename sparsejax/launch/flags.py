"""The flags of `launch`, target by target, and those of `train` that it passes on. Imports nothing heavy: `--help`
answers at once."""

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsejax.base.errors import RequestError, did_you_mean
from sparsejax.base.flags import Parser, folder, whole

TARGETS = {
    "local": "processes of this machine's CPU",
    "slurm": "a job of a SLURM cluster, on GPUs or CPUs",
    "jobset": "a JobSet of a Kubernetes cluster, on slices of TPUs or hosts of GPUs",
    "tpu-vm": "a queued resource of Cloud TPU",
}

START_TIMEOUT = 300
"""Seconds that several processes wait for each other, unless `--start-timeout` says otherwise."""

Add = Callable[..., Any]


def top_parser() -> argparse.ArgumentParser:
    """The parser behind `launch --help`."""
    targets = "\n".join(f"  {target:<10} {does}" for target, does in TARGETS.items())
    return Parser(
        prog="sparsejax launch",
        usage="sparsejax launch TARGET --config=FILE.py[:arg] [--config.KEY=VALUE ...] [--workdir=DIR] [...]",
        description=f"Print the job that trains a config, or run it with --submit.\n\ntargets:\n{targets}",
        epilog="`sparsejax launch TARGET --help` lists a target's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def read_target(words: list[str]) -> tuple[str, list[str]]:
    """The first word after `launch`, and the flags: those of `--site` before the others, which count when both say the
    same.

    Raises:
      RequestError: there is no such target, or no such file.
    """
    if not words or words[0].startswith("-"):
        raise RequestError(f"launch what? known: {', '.join(TARGETS)}; launch TARGET --help lists the flags of one")
    target = words[0]
    if target not in TARGETS:
        raise RequestError(f"unknown target {target!r}; known: {', '.join(TARGETS)}.{did_you_mean(target, TARGETS)}")
    site = Parser(add_help=False, allow_abbrev=False)
    _site(site.add_argument)
    chosen, rest = site.parse_known_args(words[1:])
    return target, (_site_flags(chosen.site) if chosen.site else []) + rest


def _site_flags(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--site={path}: could not be read: {error}") from None
    flags = [line for line in lines if line and not line.startswith("#")]
    check_printable(flags)
    return flags


def check_printable(words: Iterable[str]) -> None:
    """Raises `RequestError` for a word with a control character, such as a line break, which would end the comment or
    the directive that the word is written into."""
    for word in words:
        if not word.isprintable():
            raise RequestError(f"{word!r}: only printable characters, on one line, can be launched")


def launch_flags(target: str, add: Add) -> None:
    """Adds those of `target` to a parser, beside those that say what is trained and where."""
    _site(add)
    add("--submit", action="store_true", help="run it, instead of printing it")
    add("--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="set for training; repeatable")
    _FLAGS[target](add)
    begin_flags(add)
    start_timeout(add)


def begin_flags(add: Add) -> None:
    """How training begins, or goes on."""
    add("--allow-config-change", action="store_true", help="resume although the config differs from the checkpoint's")
    begin = "begin with the parameters of another run's newest checkpoint"
    add("--init-from", type=folder, metavar="RUN", help=begin)


def start_timeout(add: Add) -> None:
    seconds = f"how long several processes wait for each other at the start (default: {START_TIMEOUT})"
    add("--start-timeout", type=whole(1), metavar="SECONDS", help=seconds)


def _local(add: Add) -> None:
    add("--processes", type=whole(1), default=1, metavar="N", help="(default: 1)")
    add("--devices", type=whole(1), default=1, metavar="M", help="virtual devices of each process (default: 1)")
    _python(add, "this one")


def _slurm(add: Add) -> None:
    _name(add)
    add("--nodes", type=whole(1), default=1, metavar="N", help="(default: 1)")
    add("--gpus-per-node", type=whole(1), metavar="N", help="each has a process of its own (default: train on CPU)")
    add("--processes-per-node", type=whole(1), metavar="N", help="of a job on CPU (default: 1)")
    add("--devices-per-process", type=whole(1), metavar="M", help="of a job on CPU: virtual devices (default: 1)")
    add("--cpus-per-process", type=whole(1), metavar="N", help="cores (default: what the cluster gives)")
    add("--partition", metavar="NAME", help="(default: the cluster's)")
    add("--time", metavar="LIMIT", help="as sbatch takes it: 90, 4:00:00, 2-00 (default: the partition's)")
    add("--sbatch", action="append", default=[], metavar="FLAG", help="another one, as --sbatch=--qos=high; repeatable")
    _grace(add)
    _restarts(add)
    _setup(add)
    _python(add, "this one")


def _jobset(add: Add) -> None:
    _name(add)
    _topology(add, "v5e:4x4, v5p:8x8x8, or h100:2x8 for two hosts of eight GPUs")
    add("--image", required=True, help="a container image with sparsejax, and kubernetes where there are GPUs")
    add("--volume", type=_volume, metavar="CLAIM:/PATH", help="a PersistentVolumeClaim that all hosts can write to")
    add("--namespace", default="default", help="(default: default)")
    add("--service-account", metavar="NAME", help="may read pods and jobs (default on GPUs: one that is made for it)")
    _directory(add, "the image's")
    _grace(add)
    _slices(add)
    _restarts(add)
    _python(add, "python3", "python3")


def _tpu_vm(add: Add) -> None:
    _name(add)
    _topology(add, "v5e:4x4, v5p:8x8x8, …")
    add("--project", required=True, help="of Google Cloud")
    add("--zone", required=True, help="for example us-east5-a")
    add("--volume", type=_volume, metavar="HOST:/EXPORT:/PATH", help="a share (NFS) that all hosts mount")
    add("--runtime-version", metavar="NAME", help="of the hosts (default: that of the generation)")
    _directory(add, "the home folder")
    _slices(add)
    _restarts(add)
    _setup(add)
    _python(add, "python3", "python3")


_FLAGS = {"local": _local, "slurm": _slurm, "jobset": _jobset, "tpu-vm": _tpu_vm}


def _site(add: Add) -> None:
    add("--site", type=Path, metavar="FILE", help="a file of flags, one a line, which are the same for all jobs here")


def _name(add: Add) -> None:
    add("--name", help="of the job (default: after the config's file)")


def _topology(add: Add, examples: str) -> None:
    add("--topology", required=True, metavar="CHIPS", help=f"of one slice: {examples}")


def _slices(add: Add) -> None:
    add("--slices", type=whole(1), default=1, metavar="N", help="that train together (default: 1)")
    add("--spot", action="store_true", help="hosts that may be taken away at any time, at a lower price")


def _restarts(add: Add) -> None:
    add(
        "--max-restarts",
        type=whole(0),
        default=3,
        metavar="N",
        help="after failures; preemptions are free (default: 3)",
    )


def _grace(add: Add) -> None:
    add("--grace", type=whole(1), default=120, metavar="SECONDS", help="to save before it is killed (default: 120)")


def _setup(add: Add) -> None:
    add("--setup", action="append", default=[], metavar="COMMAND", help="a line of shell that comes first; repeatable")


def _directory(add: Add, default: str) -> None:
    add("--directory", type=Path, metavar="DIR", help=f"where --config is looked for (default: {default})")


def _python(add: Add, described: str, default: str | None = None) -> None:
    add("--python", default=default, metavar="PROGRAM", help=f"the interpreter (default: {described})")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _volume(text: str) -> tuple[str, Path]:
    source, _, path = text.rpartition(":")
    if not source or not folder(path).is_absolute():
        raise argparse.ArgumentTypeError(f"{text!r} does not end in :/PATH, the folder that it becomes")
    return source, Path(path)
