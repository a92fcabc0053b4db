"""Weights of the losses of exits, from the papers, by plain loops."""

import numpy as np


def weights(rule, depths, num_layers, scale=1.0):
    """Of exits after so many layers and of the last, divided by their sum."""
    found = []
    for number, depth in enumerate([*depths, num_layers]):
        last = depth == num_layers
        if rule == "uniform":
            found.append(1.0 if last else scale)
        elif rule == "linear":
            found.append(float(depth) if last else scale * depth)
        elif rule == "geometric":
            found.append(2.0**number if last else scale * 2.0**number)
        elif not last:  # LayerSkip: e(ℓ) = scale Σ_{i=0}^{ℓ} i for layers counted from 0, and the last apart
            found.append(scale * sum(range(depth)))
        else:
            found.append(num_layers - 1 + scale * sum(range(num_layers - 1)))
    return np.array(found) / sum(found)


def layer_dropout(most, num_layers):
    """LayerSkip: p(ℓ) = p_max (exp(ℓ ln 2 / (L − 1)) − 1)."""
    return [most * (np.exp(layer * np.log(2) / (num_layers - 1)) - 1) for layer in range(num_layers)]
