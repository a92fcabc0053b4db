"""Interleaved timings: competitors take turns in one process, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np


def interleaved(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, np.ndarray]:
    """Seconds `[rounds]` of each competitor, called in turn; every call is waited for. One uncounted round comes
    first. `warm`: what to call, uncounted, before each of a competitor's turns."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, call in competitors.items():
            if warm is not None:
                jax.block_until_ready(warm[name]())
            begun = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values: Sequence[float] | np.ndarray) -> str:
    """'median [first quartile, third quartile]'."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"
