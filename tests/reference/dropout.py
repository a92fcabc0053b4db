"""Dropout of an expert's hidden layer, unit by unit, in Python integers."""

import numpy as np


def finaliser(value: int) -> int:
    """That of MurmurHash3, 32 bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ value >> shift) * factor % 2**32
    return value ^ value >> 16


def mix(left: int, right: int, seed: int) -> int:
    return finaliser((finaliser(left ^ seed) * 0x9E3779B1 + right) % 2**32)


def stays(seed_of_token: int, expert: int, width: int, rate: float) -> np.ndarray:
    """[F]: 0 for a unit whose hash, of 24 bits, is below `rate`, else 1 / (1 − rate)."""
    slot = mix(seed_of_token, expert, 1)
    kept = [(mix(slot, unit, 0) >> 8) / 2**24 >= np.float32(rate) for unit in range(width)]
    return np.array(kept) / (1 - rate)
