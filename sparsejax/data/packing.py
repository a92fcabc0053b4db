"""From documents to rows. The rows of an epoch are a pure function of (seed, epoch), each row can be made on its own.

An epoch is a *stream*: the documents end to end, in an order drawn from (seed, epoch). The stream is closed to a ring
and cut, from a drawn *phase* on, into ceil(N / T) windows of T tokens; a second draw orders the windows. So every token
is in one row of the epoch, and, unless it begins a document, is a target once, which may be that of another row's end.
"""

import dataclasses
from typing import Optional

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """One epoch. Axes: D documents in stream order, N tokens, R rows."""

    starts: np.ndarray  # [D + 1] int64: where each document starts in the stream; N at the end
    shifts: np.ndarray  # [D] int64: a document's place in the corpus minus its place in the stream
    domains: np.ndarray  # [D] int32
    phase: int  # stream position of the first token of window 0
    windows: Optional[np.ndarray]  # [R] int64: row -> window; None: in order
    length: int  # T

    @property
    def num_rows(self) -> int:
        return num_rows(int(self.starts[-1]), self.length)


def num_rows(num_tokens: int, length: int) -> int:
    """Rows of `length` tokens in an epoch; the last window of the ring may be partly padding."""
    return -(-num_tokens // length)


def permutation(size: int, *key: int) -> np.ndarray:
    """[size] int64. The order of raw draws of Philox: unlike NumPy's shuffles, the same in every version of NumPy."""
    return np.argsort(draws(size, *key), kind="stable")


def draws(size: int, *key: int) -> np.ndarray:
    """[size] uint64, raw, from Philox seeded with `key`."""
    return np.random.Philox(np.random.SeedSequence([part % 2**64 for part in key])).random_raw(size)


def sequential_plan(offsets: np.ndarray, domains: np.ndarray, length: int) -> Plan:
    """The documents in order, cut from the start: how a split is evaluated."""
    return Plan(offsets, np.zeros(len(domains), np.int64), domains, phase=0, windows=None, length=length)


def shuffled_plan(offsets: np.ndarray, domains: np.ndarray, length: int, seed: int, epoch: int) -> Plan:
    """The training order of one epoch."""
    order = permutation(len(domains), seed, epoch, 0)
    starts = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
    num_tokens = int(starts[-1])
    return Plan(
        starts=starts,
        shifts=offsets[:-1][order] - starts[:-1],
        domains=domains[order],
        phase=int(draws(1, seed, epoch, 1)[0]) % min(length, num_tokens),
        windows=permutation(num_rows(num_tokens, length), seed, epoch, 2),
        length=length,
    )


def pack(plan: Plan, tokens: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [n] of the epoch as the arrays of a `Batch`, [n, T], without `rows`.

    Without an order of windows, a row past the last one is empty (segments 0). Where `loss_mask` is false the target is
    0: the next token is another document's, or there is none.
    """
    num_tokens, length = int(plan.starts[-1]), plan.length
    window = rows if plan.windows is None else plan.windows[rows]
    along = plan.phase + window[:, None] * length + np.arange(length + 1)  # [n, T + 1]: place on the ring, not wrapped
    lap, place = np.divmod(along, num_tokens)
    document = np.searchsorted(plan.starts, place, side="right") - 1
    piece = document + lap * len(plan.domains)  # the ring's seam ends a document even when there is only one
    token = tokens[place + plan.shifts[document]].astype(np.int32)

    exists = along[:, :-1] < plan.phase + num_tokens
    same = piece[:, 1:] == piece[:, :-1]
    loss_mask = exists & same
    begins = np.concatenate([np.ones_like(same[:, :1]), ~same[:, :-1]], axis=1)  # [n, T]: first of a piece
    column = np.arange(length, dtype=np.int32)
    return {
        "tokens": np.where(exists, token[:, :-1], 0),
        "targets": np.where(loss_mask, token[:, 1:], 0),
        "segments": np.where(exists, np.cumsum(begins, axis=1, dtype=np.int32), 0),
        "positions": np.where(exists, column - np.maximum.accumulate(np.where(begins, column, 0), axis=1), 0),
        "loss_mask": loss_mask,
        "domains": np.where(exists, plan.domains[document[:, :-1]], 0),
    }
