"""How many slots an expert has for a group of tokens: the formulas of the literature and of its code bases.

All of them are exact: the capacity factor is the decimal number that was written, and counts are whole numbers. No
expert gets more slots than there are tokens, nor none when there is a token, whatever a formula says. That aside,
slots never shrink as tokens are added."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Optional

import numpy as np

CapacityConvention = Literal[
    "per_choice",
    "per_token",
    "mesh_tf",
    "flaxformer",
    "axlearn",
    "praxis",
    "vmoe",
    "megablocks",
    "olmo_core",
    "tutel",
    "maxtext",
    "deepspeed",
    "torchscale",
]

Count = Any  # whole numbers of any size: an array of Python ints
Formula = Callable[[Count, int, int, Fraction], Count]
"""(tokens S, experts E, experts per token k, capacity factor CF) → slots."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """`counts_k`: whether CF is meant per choice, so that CF = 1 is room for all k pairs of every token."""

    slots: Formula
    counts_k: bool = True
    evaluation: Optional[Formula] = None  # where evaluation has a formula of its own, which reads no factor
    reads_factor: Callable[[int], bool] = lambda k: True  # in training, by k


def _floor(tokens: Count, rate: Fraction) -> Count:
    return tokens * rate.numerator // rate.denominator


def _ceil(tokens: Count, rate: Fraction) -> Count:
    return -(-tokens * rate.numerator // rate.denominator)


def _round(tokens: Count, rate: Fraction) -> Count:
    """Halves to the even neighbour, as Python's `round` has it."""
    doubled, unit = 2 * tokens * rate.numerator + rate.denominator, 2 * rate.denominator
    return doubled // unit - ((doubled % unit == 0) & (doubled // unit % 2 == 1))


def _up(slots: Count, multiple: int) -> Count:
    return -(-slots // multiple) * multiple


def _each(experts: int) -> Fraction:
    return Fraction(1, experts)


def _torchscale(s: Count, e: int, k: int, cf: Fraction) -> Count:
    return _floor(_ceil(s, _each(e)), cf) if k == 1 else 2 * _ceil(s, _each(e))


CONVENTIONS: Mapping[CapacityConvention, Convention] = {
    # ⌈CF · k · S / E⌉; also Megatron-LM's, whose tokens are those of a device.
    "per_choice": Convention(slots=lambda s, e, k, cf: _ceil(s, cf * k / e)),
    # ⌈CF · S / E⌉ (Switch Transformers): top-2 at CF 1.25 has 0.625 slots a choice, here and wherever k is not counted.
    "per_token": Convention(slots=lambda s, e, k, cf: _ceil(s, cf / e), counts_k=False),
    # Mesh-TensorFlow: ⌊S · CF / E⌋, at least 4.
    "mesh_tf": Convention(slots=lambda s, e, k, cf: np.maximum(_floor(s, cf / e), 4), counts_k=False),
    # Flaxformer: rounded, at least 4.
    "flaxformer": Convention(slots=lambda s, e, k, cf: np.maximum(_round(s, cf / e), 4), counts_k=False),
    # axlearn: ⌊S · CF / E⌋; it sets CF to 2 for top-2.
    "axlearn": Convention(slots=lambda s, e, k, cf: _floor(s, cf / e), counts_k=False),
    # Praxis: the same, up to a multiple of 4.
    "praxis": Convention(slots=lambda s, e, k, cf: _up(_floor(s, cf / e), 4), counts_k=False),
    # V-MoE: `per_choice`, up to a multiple of 4.
    "vmoe": Convention(slots=lambda s, e, k, cf: _up(_ceil(s, cf * k / e), 4)),
    # MegaBlocks: ⌊CF · k · S / E⌋.
    "megablocks": Convention(slots=lambda s, e, k, cf: _floor(s, cf * k / e)),
    # OLMo-core: the same, up to a multiple of 8.
    "olmo_core": Convention(slots=lambda s, e, k, cf: _up(_floor(s, cf * k / e), 8)),
    # Tutel: k · ⌊CF · ⌈S / E⌉⌋.
    "tutel": Convention(slots=lambda s, e, k, cf: k * _floor(_ceil(s, _each(e)), cf)),
    # MaxText: ⌊CF · max(⌈k · S / E⌉, 1)⌋, rounded up before CF.
    "maxtext": Convention(slots=lambda s, e, k, cf: _floor(np.maximum(_ceil(s, k * _each(e)), 1), cf)),
    # DeepSpeed: `per_choice`, at least 4.
    "deepspeed": Convention(slots=lambda s, e, k, cf: np.maximum(_ceil(s, cf * k / e), 4)),
    # fairseq and torchscale: Tutel's for top-1, 2 · ⌈S / E⌉ whatever CF is for top-2, and a quarter of the tokens in
    # evaluation.
    "torchscale": Convention(
        slots=_torchscale, evaluation=lambda s, e, k, cf: _ceil(s, Fraction(1, 4)), reads_factor=lambda k: k == 1
    ),
}


def capacity(
    tokens: int,
    num_experts: int,
    experts_per_token: int,
    factor: float,
    convention: CapacityConvention,
    training: bool = True,
) -> int:
    """Slots of one expert for a group of `tokens` tokens."""
    counts = np.array([tokens], dtype=object)
    return int(_slots(counts, num_experts, experts_per_token, factor, convention, training)[0])


def capacity_table(
    group_size: int,
    num_experts: int,
    experts_per_token: int,
    factor: float,
    convention: CapacityConvention,
    training: bool = True,
) -> np.ndarray:
    """`capacity` for 0 … `group_size` unmasked tokens, int32: padding in a group must not buy slots for the others."""
    counts = np.arange(group_size + 1).astype(object)
    return _slots(counts, num_experts, experts_per_token, factor, convention, training).astype(np.int32)


def _slots(tokens: Count, num_experts: int, k: int, factor: float, convention: CapacityConvention, training: bool):
    entry = CONVENTIONS[convention]
    formula = entry.slots if training or entry.evaluation is None else entry.evaluation
    return np.minimum(tokens, np.maximum(formula(tokens, num_experts, k, Fraction(str(factor))), 1))
