"""Run folders as training leaves them, written without any training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.base.config import to_json
from sparsejax.train.config import ExperimentConfig

EXPERTS, K, ROWS, LENGTH = 8, 2, 2, 24
LAYERS = ("01_moe", "03_moe")
TEXT = "def f(x):\n    return x + 1  # a café, 2024".encode()


def write_run(path: Path, seed: int = 0, steps: Sequence[int] = (1, 5, 10, 15, 20), passages: bool = True) -> Path:
    """A run of two mixture-of-experts layers with rows, routing and, if wanted, passages."""
    rng = np.random.default_rng(seed)
    (path / "routing").mkdir(parents=True)
    environment = {"command": ["sparsejax", "train"], "platform": "cpu"}
    (path / "config.json").write_text(to_json(ExperimentConfig(), {"train.seed": "command line"}, environment))
    rows = []
    for step in steps:
        rows.append(train_row(step, loss=5.0 - 0.1 * step + 0.01 * seed))
        np.savez(path / "routing" / f"{step}.npz", **loads(rng.integers(50, 150, (len(LAYERS), EXPERTS))))
    for step in steps[2::2]:
        rows.append(rows[0] | {"step": step, "split": "eval", "cross_entropy": 4.0, "seconds": 1.5 * step})
        if passages:
            write_passages(path, step, rng)
    write_rows(path, rows)
    return path


def train_row(step: int, loss: float = 4.0, **more: Any) -> dict[str, Any]:
    """A row of `metrics.jsonl`. `a__b=c` is `a/b`."""
    moe = {"drop_fraction": 0.05, "unserved_fraction": 0.01, "slot_utilisation": 0.8, "load_max_over_mean": 1.4}
    moe |= {"balance_floor": 1.1, "router_entropy": 0.9, "dead_experts": 0.0, "balance_loss": 1.05, "router_z": 4.5}
    row = {"step": step, "split": "train", "loss": loss, "cross_entropy": loss, "grad_norm": 1.0, "learning_rate": 1e-3}
    row |= {"tokens": 256 * step, "flops": 1e6 * step, "seconds": 1.0 + step, "tokens_per_second": 1e4}
    row |= {f"moe/{key}": value for key, value in moe.items()}
    return row | {key.replace("__", "/"): value for key, value in more.items()}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def loads(assigned_LE: np.ndarray, drop: float = 0.1) -> dict[str, np.ndarray]:
    """The arrays of `routing/STEP.npz`."""
    found = {}
    for name, assigned_E in zip(LAYERS, np.asarray(assigned_LE)):
        dropped_E = (drop * assigned_E).astype(int)
        found |= {f"{name}/assigned": assigned_E, f"{name}/dropped": dropped_E, f"{name}/dropped_capacity": dropped_E}
        found |= {f"{name}/processed": assigned_E - dropped_E, f"{name}/tokens": np.asarray(assigned_E.sum() // K)}
    return found


def write_passages(path: Path, step: int, rng: np.random.Generator) -> None:
    """`passages/STEP.npz` of a model that has everything that can be recorded."""
    (path / "passages").mkdir(exist_ok=True)
    shape = (ROWS, LENGTH)
    segments = np.ones(shape, np.int32)
    segments[-1, -4:] = 0
    tokens = np.resize(np.frombuffer(TEXT, np.uint8), shape).astype(np.int32)
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "segments": segments}
    nats = rng.exponential(size=shape).astype(np.float32)
    nats[:, 0] = np.nan
    arrays |= {"nats": nats, "source": (np.arange(LENGTH) // 8 % 2 * np.ones(shape)).astype(np.int16)}
    arrays |= {"source_names": np.asarray(["json", "re<script>"])}
    for layer in LAYERS:
        experts = np.argsort(rng.random((*shape, EXPERTS)), -1)[..., :K].astype(np.int16)
        experts[segments == 0] = -1
        arrays |= {f"{layer}/experts": experts, f"{layer}/weights": rng.random((*shape, K)).astype(np.float32)}
        arrays[f"{layer}/processed"] = (rng.random((*shape, K)) > 0.1) & (experts >= 0)
    arrays["02_dense/kept"] = (rng.random(shape) > 0.5) & (segments > 0)
    arrays["00_dense/table/rows"] = rng.integers(0, 64, (*shape, 2)).astype(np.int32)
    arrays |= {"exit/layers": np.asarray([1, 3]), "exit/nats": rng.exponential(size=(*shape, 2)).astype(np.float32)}
    arrays |= {"exit/top": rng.random((*shape, 2)).astype(np.float32)}
    arrays["halting/steps"] = rng.integers(1, 5, shape)
    np.savez(path / "passages" / f"{step}.npz", **arrays)
