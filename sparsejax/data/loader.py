"""Batches by number: a reader of rows with random access, read ahead by grain.

Row i of step s is row s * batch_size + i of an endless sequence of epochs, whoever reads it. So a run resumes from the
step alone, on any number of hosts, each of which reads its own `row_indices` of every batch.
"""

from collections.abc import Sequence
from typing import Optional

import grain
import numpy as np

from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import Corpus
from sparsejax.data.packing import num_rows
from sparsejax.data.rows import Arrays, Rows

ENDLESS = 2**40  # steps; row numbers stay far below 2**63


class _Steps:
    """The batches of `source` with these numbers as grain reads them: of each, the part that this host holds."""

    def __init__(
        self,
        source: Rows,
        batch_size: int,
        row_indices: Optional[Sequence[int] | np.ndarray],
        numbers: Sequence[int],
    ):
        self.source, self.batch_size, self.numbers = source, batch_size, numbers
        self.indices = np.arange(batch_size) if row_indices is None else np.asarray(row_indices, np.int64)
        if self.indices.size and not (self.indices.min() >= 0 and self.indices.max() < batch_size):
            raise ValueError(f"row_indices must be in [0, {batch_size}): {self.indices}")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Arrays:
        batch = self.source.rows(self.numbers[index] * self.batch_size + self.indices)
        return {**batch, "rows": self.indices.astype(np.int32)}


def train_rows(corpus: Corpus, config: DataConfig, seed: int) -> Rows:
    """The rows of the training split, in the order that `seed` gives. Raises `ConfigError` when the task finds too
    little in the corpus."""
    return config.task.train(corpus, config.sequence_length, seed)


def batches(
    source: Rows,
    *,
    batch_size: int,
    start_step: int = 0,
    row_indices: Optional[Sequence[int] | np.ndarray] = None,
    prefetch: int = DataConfig.prefetch,
    workers: int = DataConfig.workers,
) -> grain.DatasetIterator[Arrays]:
    """The batches from `start_step` on, without end: dicts of `Batch`'s fields, [len(row_indices), T].

    `row_indices`: the rows of the batch that this host reads, in this order; by default all. Reading ahead starts at
    once. `close()` stops it; an iterator that is left open ends with the process.
    """
    return _read(_Steps(source, batch_size, row_indices, range(ENDLESS)), start_step, prefetch, workers)


def eval_batches(
    corpus: Corpus,
    config: DataConfig,
    batch_size: int,
    batches: Optional[int] = None,
    row_indices: Optional[Sequence[int] | np.ndarray] = None,
    parts: int = 1,
) -> grain.DatasetIterator[Arrays]:
    """The validation split in order, in windows that do not overlap: each target counts once.

    The last batch may have empty rows. Raises `ConfigError` when the split is empty.

    Args:
      batches: how many of them, spread evenly over the split, for its text changes along the way; None: all.
      row_indices: the rows that this host reads of what is read at a time; by default all.
      parts: what is read at a time is a batch divided by this.
    """
    total, size = num_eval_batches(corpus, config, batch_size), batch_size // parts
    chosen = range(total) if batches is None or batches >= total else [n * total // batches for n in range(batches)]
    count = num_eval_batches(corpus, config, size)
    numbers = [number for batch in chosen for number in range(batch * parts, (batch + 1) * parts) if number < count]
    source = config.task.evaluation(corpus, config.sequence_length)
    return _read(_Steps(source, size, row_indices, numbers), 0, config.prefetch, config.workers)


def num_eval_batches(corpus: Corpus, config: DataConfig, batch_size: int) -> int:
    """How many batches the validation split has. Raises `ConfigError` when it is empty."""
    steps = num_rows(len(config.task.evaluation(corpus, config.sequence_length)), batch_size)
    if steps == 0:
        if config.name == "text":
            message = f"{config.validation_fraction} of each file leaves nothing to evaluate on"
            raise ConfigError("data.validation_fraction", message)
        raise ConfigError("data.name", f"{config.name!r} has no validation text")
    return steps


def _read(steps: _Steps, start: int, prefetch: int, workers: int) -> grain.DatasetIterator[Arrays]:
    options = grain.ReadOptions(num_threads=workers if prefetch else 0, prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.source(steps).slice(slice(start, None)).to_iter_dataset(options)
    iterator = iter(dataset)
    iterator.start_prefetch()
    return iterator
