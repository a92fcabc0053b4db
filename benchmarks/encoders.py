"""Trained encoders as benchmarks and studies evaluate and time them."""

from pathlib import Path

import jax
import numpy as np

from sparsejax.model.lm import layer_reports
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables
from sparsejax.train.step import make_eval_step


class Encoder:
    """The evaluation of a restored run, on batches that are on the device."""

    def __init__(self, config: ExperimentConfig, run: Path, mesh):
        self.config = config
        self.variables = restore_variables(config, run, mesh, None)[0]
        self.step = jax.jit(make_eval_step(config))

    def over(self, batches):
        """(share of targets that it gets right, reports by layer of every batch)."""
        told = [jax.device_get(self.step(self.variables, batch)) for batch in batches]
        right = sum(int(each.correct) for each in told) / sum(int(each.targets) for each in told)
        return right, [layer_reports(self.config.model, each.reports) for each in told]


def room(kept: list[list[float]], slack: float) -> tuple[float, ...]:
    """`slack` times the mean over batches, rounded up to 1/64 of the row, and never rising."""
    shares = np.minimum(np.ceil(64 * slack * np.mean(kept, axis=0)) / 64, 1.0)
    return tuple(np.minimum.accumulate(shares).tolist())


def shortened(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The first tokens of every row."""
    return {name: array[:, :length] if array.ndim == 2 else array for name, array in batch.items()}
