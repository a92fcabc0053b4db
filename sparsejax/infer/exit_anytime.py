"""Predictions that only ever get better, and sets of classes that only ever get smaller, from exit to exit."""

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsejax.infer.exit_table import log_softmax


def product_anytime(logits_NEC: Float[np.ndarray, "N E C"]) -> Float[np.ndarray, "N E C"]:
    """p_m(y) ∝ Π_{i ≤ m} relu(f_i(y))^{i / E}: a product of what all exits so far said, in which a class once excluded
    stays out (arXiv:2306.02652). The softmax of the exit's own logits where no class is left."""
    exits = logits_NEC.shape[1]
    weight = np.arange(1, exits + 1)[:, None] / exits
    with np.errstate(divide="ignore"):
        log_relu = np.log(np.maximum(np.asarray(logits_NEC, np.float64), 0))
    product = np.cumsum(weight * log_relu, axis=1)
    some = np.isfinite(product).any(-1, keepdims=True)
    return np.exp(np.where(some, log_softmax(np.where(some, product, 0)), log_softmax(logits_NEC)))


def conformal_thresholds(
    p_NEC: Float[np.ndarray, "N E C"], target_N: Int[np.ndarray, " N"], miss: float
) -> Float[np.ndarray, " E"]:
    """For each exit the probability that a class needs to be in the set (split conformal prediction with the score
    1 − p, arXiv:2107.07511): sets of new examples lack the target with probability `miss` at most, at any one exit. 0,
    so that all classes are in, where too few examples calibrate."""
    if not 0 < miss < 1:
        raise ValueError(f"a miss of {miss} is outside (0, 1)")
    of_target = np.sort(np.take_along_axis(p_NEC, target_N[:, None, None], axis=-1)[..., 0], axis=0)
    # The ⌈(n + 1)(1 − miss)⌉-th smallest of 1 − p is the ⌊(n + 1) miss⌋-th smallest p; the tolerance is for 0.1 · 10.
    place = int(np.floor((len(target_N) + 1) * miss + 1e-9))
    return of_target[place - 1] if place else np.zeros(p_NEC.shape[1])


def prediction_sets(
    p_NEC: Float[np.ndarray, "N E C"], thresholds_E: Float[np.ndarray, " E"]
) -> Bool[np.ndarray, "N E C"]:
    """The classes whose probability reaches the exit's threshold. These sets need not be nested."""
    return p_NEC >= thresholds_E[:, None]


def running_intersection(sets_NEC: Bool[np.ndarray, "N E C"]) -> Bool[np.ndarray, "N E C"]:
    """What every exit so far has in its set: nested, the target being lost where any exit lost it (the baseline of
    arXiv:2311.05931)."""
    return np.logical_and.accumulate(sets_NEC, axis=1)


def coverage(sets_NEC: Bool[np.ndarray, "N E C"], target_N: Int[np.ndarray, " N"]) -> Float[np.ndarray, " E"]:
    """The share of examples whose target is in the set, at every exit."""
    return np.take_along_axis(sets_NEC, target_N[:, None, None], axis=-1)[..., 0].mean(0)
