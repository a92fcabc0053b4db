"""How timings are told."""

from collections.abc import Sequence

import numpy as np


def quartiles(values: Sequence[float] | np.ndarray) -> str:
    """'median [first quartile, third quartile]'."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"
