"""What a finished run says on the terminal: a picture of the expert loads, the files, and what to do next."""

import contextlib
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparsejax.train.metrics import Arrays, Row

BARS = " ▁▂▃▄▅▆▇█"
FILES = {
    "config.json": "every setting and where it came from",
    "metrics.jsonl": "losses, speed, routing",
    "tensorboard": "the same as curves",
    "routing": "counts per layer and expert, STEP.npz",
    "evaluations": "loss and targets of every batch of an evaluation, STEP.npz",
    "passages": "decisions token by token on some rows of validation text, STEP.npz",
    "checkpoints": "to resume, evaluate or generate from",
    "traces": "decisions of the steps that were asked for, for the command trace",
    "profile": "trace of the steps that were asked for",
}


def load_picture(arrays: Mapping[str, np.ndarray], width: int = 64) -> list[str]:
    """One line per MoE layer: a bar per expert, full height being twice the mean load.

    Of more than `width` experts, the most loaded.
    """
    lines = []
    for name in (key.removesuffix("/assigned") for key in arrays if key.endswith("/assigned")):
        load = np.asarray(arrays[f"{name}/assigned"], float)
        relative = load / max(load.mean(), 1e-9)
        shown = relative if len(load) <= width else np.sort(relative)[::-1][:width]
        bars = "".join(BARS[int(np.clip(round(value / 2 * (len(BARS) - 1)), 0, len(BARS) - 1))] for value in shown)
        dropped = float(np.sum(arrays[f"{name}/dropped"])) / max(load.sum(), 1.0)
        lines.append(f"  {name:<14} │{bars}│ max/mean {relative.max():.2f}, dropped {100 * dropped:.2f} %")
    return lines


def closing_lines(workdir: Path, row: Row, arrays: Arrays, generates: bool) -> list[str]:
    """The last lines of `train`, from the final evaluation."""
    quality = f"cross-entropy {row['cross_entropy']:.4f} nats/token, {100 * row['accuracy']:.2f} % right"
    if "bits_per_byte" in row:
        quality += f", {row['bits_per_byte']:.4f} bits per byte"
    picture = load_picture(arrays)
    command, quoted = f"{_interpreter()} -m sparsejax", shlex.quote(str(workdir))
    written = {name: what for name, what in FILES.items() if (workdir / name).exists()}
    width = max(len(f"{workdir}/{name}") for name in FILES)
    loads = ["expert load on the validation split (▄ is an even share):", *picture] if picture else []
    return [
        f"validation: {quality}",
        *loads,
        "written:",
        *(f"  {f'{workdir}/{name}':<{width}}  {what}" for name, what in written.items()),
        "next:",
        *([f"  {command} generate --workdir={quoted}"] if generates else []),
        f"  {command} eval --workdir={quoted}",
        f"  {command} plan --workdir={quoted}",
        f"  {command} report {quoted}",
    ]


def _interpreter() -> str:
    """This Python, relative to the current folder where it lies below it."""
    path = Path(sys.executable)
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))
