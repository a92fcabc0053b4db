"""Effective speed-up: the compute that the base would need for an arm's loss, over the arm's compute."""

from collections.abc import Sequence

import numpy as np


def speed_up(flops: Sequence[float], losses: Sequence[float], arm_flops: float, arm_loss: float) -> tuple[float, str]:
    """(the ratio, what stands before it: '' or '>' or '<').

    Args:
      flops, losses: of whole trainings of the base at several budgets, mean over seeds. Loss is lower with more.
      arm_flops, arm_loss: of the arm's training.

    Between budgets log loss is linear in log FLOPs. Outside of them nothing is guessed: the ratio is that of the
    nearest budget, and the sign says on which side of it the truth lies. Raises `ValueError` if the losses do not fall.
    """
    order = np.argsort(flops)
    budgets, found = np.log(np.asarray(flops, float)[order]), np.log(np.asarray(losses, float)[order])
    if np.any(np.diff(found) >= 0):
        raise ValueError("the base's loss does not fall with its budget")
    loss = np.log(arm_loss)
    at = float(np.exp(np.interp(-loss, -found, budgets)))
    return at / arm_flops, ">" if loss < found[-1] else "<" if loss > found[0] else ""
