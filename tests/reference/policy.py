"""REINFORCE with a baseline (Williams 1992), one token at a time, with the gradients written out by hand."""

import math

import numpy as np


def reinforce(
    logits: np.ndarray, actions: np.ndarray, rewards: np.ndarray, baselines: np.ndarray, mask: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(Σ −(r − b) log π(a), Σ (r − b)², gradient of the first in the logits, of the second in the baselines) of tokens
    with `[S, E]` logits, π being their softmax."""
    policy, error = 0.0, 0.0
    of_logits, of_baselines = np.zeros_like(logits), np.zeros_like(baselines)
    for s, row in enumerate(logits):
        if not mask[s]:
            continue
        exponentials = [math.exp(v - max(row)) for v in row]
        pi = [v / sum(exponentials) for v in exponentials]
        advantage = rewards[s] - baselines[s]
        policy -= advantage * math.log(pi[actions[s]])
        error += advantage**2
        for e in range(len(row)):
            of_logits[s, e] = -advantage * ((e == actions[s]) - pi[e])
        of_baselines[s] = -2 * advantage
    return policy, error, of_logits, of_baselines
