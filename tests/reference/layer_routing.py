"""D-LLM's layers: each runs on the tokens that do not skip it, as if there were no others. NumPy float64, no JAX."""

from collections.abc import Callable, Sequence

import numpy as np


def log_odds(x: np.ndarray, hidden: np.ndarray, scale: np.ndarray, odds: np.ndarray, bias: float, epsilon: float):
    """Of running the layer: linear, RMS norm, SiLU, linear."""
    h = x @ hidden
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + epsilon) * scale
    return (h / (1 + np.exp(-h))) @ odds[:, 0] + bias


def layers(
    x: np.ndarray,
    blocks: Sequence[Callable[[np.ndarray, int, np.ndarray], np.ndarray]],
    routers: Sequence[Callable[[np.ndarray], np.ndarray]],
    segments: np.ndarray,
    positions: np.ndarray,
    always: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(states [B, T, D], which layers each token ran [L, B, T]). `blocks`: (states of some tokens of a row [K, D], the
    row, their places [K]) → their states after the block."""
    x, ran = x.copy(), np.zeros((len(blocks), *segments.shape), bool)
    for layer, (block, router) in enumerate(zip(blocks, routers, strict=True)):
        for b in range(len(segments)):
            runs = (segments[b] > 0) & ((router(x[b]) > 0) | (positions[b] < always))
            ran[layer, b] = runs
            (places,) = np.nonzero(runs)
            if len(places):
                x[b, places] = block(x[b, places], b, places)
    return x, ran
