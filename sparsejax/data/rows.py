"""Rows by number: the packed rows of a split, in the order of an epoch."""

import functools
from typing import Optional, Protocol

import numpy as np

from sparsejax.data.packing import Plan, num_rows, pack, sequential_plan, shuffled_plan
from sparsejax.data.store import TokenStore

Arrays = dict[str, np.ndarray]


class Rows(Protocol):
    """What batches are made of. Row `number` is a pure function of it, and of the seed that the rows were made with."""

    def __len__(self) -> int:
        """Rows per epoch."""
        ...

    def rows(self, numbers: np.ndarray) -> Arrays:
        """The rows with these numbers [n], stacked: arrays [n, T] with the names of `Batch`'s fields. Training goes on
        with the next epoch; in evaluation rows past the end are empty."""
        ...


class RowSource:
    """Rows of `store`, by number. With a seed, epoch after epoch, each in its own order; without, one pass in order."""

    def __init__(self, store: TokenStore, length: int, seed: Optional[int] = None):
        self.store, self.length, self.seed = store, length, seed
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)  # two: a batch may lie in two epochs

    def _make_plan(self, epoch: int) -> Plan:
        if self.seed is None:
            return sequential_plan(self.store.offsets, self.store.domains, self.length)
        return shuffled_plan(self.store.offsets, self.store.domains, self.length, self.seed, epoch)

    def __len__(self) -> int:
        return num_rows(len(self.store.tokens), self.length)

    def __getitem__(self, row: int) -> Arrays:
        """One row: arrays [T]. The epoch is `row // len(self)`."""
        return {name: array[0] for name, array in self.rows(np.array([row])).items()}

    def rows(self, numbers: np.ndarray) -> Arrays:
        if self.seed is None:
            return pack(self._plan(0), self.store.tokens, numbers)
        epochs, rows = np.divmod(numbers, len(self))
        present = np.unique(epochs)
        if len(present) == 1:
            return pack(self._plan(int(present[0])), self.store.tokens, rows)
        out: Arrays = {}
        for epoch in present:
            chosen = epochs == epoch
            for name, array in pack(self._plan(int(epoch)), self.store.tokens, rows[chosen]).items():
                out.setdefault(name, np.zeros((len(numbers), self.length), array.dtype))[chosen] = array
        return out
