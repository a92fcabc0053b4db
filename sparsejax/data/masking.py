"""Masked language modelling: some tokens of every row are hidden, and are what is to be predicted."""

from typing import Optional

import numpy as np

from sparsejax.data.packing import draws
from sparsejax.data.rows import Arrays, Rows

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens chosen, the shares that become the mask and another token; the rest stay (BERT, arXiv:1810.04805)."""


class MaskedRows:
    """`source` with a share `rate` of its tokens chosen, independently of each other. The target of a chosen token is
    the token; the others have none. What is chosen is a pure function of (seed, row number), without a seed of the row
    number."""

    def __init__(self, source: Rows, rate: float, vocab_size: int, seed: Optional[int] = None):
        self.source, self.rate, self.vocab_size = source, rate, vocab_size
        self.key = (0, 0) if seed is None else (1, seed)

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, numbers: np.ndarray) -> Arrays:
        arrays = self.source.rows(numbers)
        tokens_NT = arrays["tokens"]
        raw = np.stack([draws(3 * tokens_NT.shape[1], *self.key, int(number)) for number in numbers])
        chance_NT, fate_NT, other_NT = np.split(raw, 3, axis=1)
        chosen_NT = (_uniform(chance_NT) < self.rate) & (arrays["segments"] > 0)
        other_NT = (other_NT % self.vocab_size).astype(np.int32)
        fate_NT = _uniform(fate_NT)
        kept_NT = np.where(fate_NT < MASKED + RANDOM, other_NT, tokens_NT)
        hidden_NT = np.where(fate_NT < MASKED, self.vocab_size, kept_NT)
        return arrays | {
            "tokens": np.where(chosen_NT, hidden_NT, tokens_NT).astype(np.int32),
            "targets": np.where(chosen_NT, tokens_NT, 0),
            "loss_mask": chosen_NT,
        }


def _uniform(raw: np.ndarray) -> np.ndarray:
    """Raw 64-bit draws as float64 in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53
