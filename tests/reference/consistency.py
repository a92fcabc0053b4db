"""The consistency of two predictions (THOR, arXiv:2110.04260), from the definition of KL divergence."""

import math

import numpy as np


def symmetric_kl(left: np.ndarray, right: np.ndarray) -> float:
    """½ (KL(p‖q) + KL(q‖p)) of the softmax of two vectors of logits."""
    p, q = (np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum() for logits in (left, right))
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    return 0.5 * (kl(p, q) + kl(q, p))
