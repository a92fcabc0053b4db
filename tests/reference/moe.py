"""A mixture-of-experts layer, token by token, from the equations; NumPy float64 and no JAX."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from reference.routing import Routing, capacity, route


@dataclass(kw_only=True)
class Layer:
    """The settings of a layer. Weights: router [D, E + free], w_in [E, D, F], w_out [E, F, D], w_gate like w_in.

    Experts without a network come after the others: `zero`, `copy`, then constant ones with mix [D, 2 N] and value
    [N, D]."""

    router: np.ndarray
    w_in: np.ndarray
    w_out: np.ndarray
    w_gate: Optional[np.ndarray] = None
    shared: tuple[np.ndarray, ...] = ()  # w_in, w_out and perhaps w_gate, without E
    zero: int = 0
    copy: int = 0
    mix: Optional[np.ndarray] = None
    value: Optional[np.ndarray] = None
    shared_mixing: Optional[np.ndarray] = None  # [D, 2], for the routed and the shared (PR-MoE, arXiv:2201.05596)
    below: Optional[tuple[np.ndarray, np.ndarray]] = None  # [B, T, E] logits and [E, E] (MoE++, arXiv:2410.07348)
    shared_gate: Optional[np.ndarray] = None  # [D, 1], of the routed (NLLB, arXiv:2207.04672); the shared have 1 − gate
    k: int
    score: str = "softmax"
    weight: str = "before"
    factor: tuple[int, int] = (1, 1)  # capacity factor as a fraction
    per_choice: bool = True
    group_size: int
    stays: Optional[Callable[[int, int], np.ndarray]] = None  # [F], factors of an expert's hidden units for a token


@dataclass
class Output:
    y: np.ndarray  # [B, T, D]
    groups: list[Routing] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [B, T, E]


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation (arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(
    x: np.ndarray,
    w_in: np.ndarray,
    w_out: np.ndarray,
    w_gate: Optional[np.ndarray] = None,
    stays: np.ndarray | float = 1,
) -> np.ndarray:
    hidden = gelu(x @ w_in) if w_gate is None else gelu(x @ w_gate) * (x @ w_in)
    return (stays * hidden) @ w_out


def forward(layer: Layer, x_BTD: np.ndarray, mask_BT: np.ndarray) -> Output:
    """The layer's output and the routing of every group, the groups being consecutive runs of `group_size` tokens."""
    x, mask = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(np.float64), mask_BT.reshape(-1)
    y, output = np.zeros_like(x), Output(np.zeros(0))
    num_experts, size = layer.router.shape[1], layer.group_size
    logits = x @ layer.router.astype(np.float64)
    if layer.below is not None:
        logits = logits + layer.below[0].reshape(logits.shape) @ layer.below[1].astype(np.float64)
    output.logits = logits.reshape(*mask_BT.shape, -1)
    slots = lambda tokens: capacity(tokens, num_experts, layer.k, *layer.factor, layer.per_choice)  # noqa: E731
    for first in range(0, len(x), size):
        group = slice(first, first + size)
        routing = route(
            logits[group],
            mask[group],
            k=layer.k,
            kind=layer.score,
            weight=layer.weight,
            limit=slots(int(mask[group].sum())),
            num_slots=slots(size),
            free=num_experts - len(layer.w_in),
        )
        output.groups.append(routing)
        for s in range(size):
            for c in range(layer.k):
                if routing.kept[s, c]:
                    y[first + s] += routing.weights[s, c] * expert(
                        layer, x[first + s], routing.experts[s, c], first + s
                    )
    for t in range(len(x)):
        if layer.shared:
            shared = feed_forward(x[t], *(w.astype(np.float64) for w in layer.shared))
            c = np.ones(2)
            if layer.shared_mixing is not None:
                c = np.exp(x[t] @ layer.shared_mixing.astype(np.float64))
                c /= c.sum()
            if layer.shared_gate is not None:
                gate = 1 / (1 + np.exp(-(x[t] @ layer.shared_gate.astype(np.float64))[0]))
                c = np.array([gate, 1 - gate])
            y[t] = c[0] * y[t] + c[1] * shared
    output.y = y.reshape(x_BTD.shape)
    return output


def expert(layer: Layer, x: np.ndarray, e: int, token: int) -> np.ndarray:
    if e >= len(layer.w_in):
        return free_expert(layer, x, e - len(layer.w_in))
    gate = None if layer.w_gate is None else layer.w_gate[e].astype(np.float64)
    stays = 1.0 if layer.stays is None else layer.stays(token, e)
    return feed_forward(x, layer.w_in[e].astype(np.float64), layer.w_out[e].astype(np.float64), gate, stays)


def free_expert(layer: Layer, x: np.ndarray, n: int) -> np.ndarray:
    """Zero, copy or constant (MoE++, arXiv:2410.07348)."""
    if n < layer.zero:
        return np.zeros_like(x)
    if n < layer.zero + layer.copy:
        return x
    c = n - layer.zero - layer.copy
    logits = x @ layer.mix[:, 2 * c : 2 * c + 2].astype(np.float64)
    a = np.exp(logits) / np.exp(logits).sum()
    return a[0] * x + a[1] * layer.value[c]
