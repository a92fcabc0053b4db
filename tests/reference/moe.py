"""A mixture-of-experts layer, token by token, from the equations; NumPy float64 and no JAX."""

import math
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from reference.routing import Routing, capacity, route


@dataclass(kw_only=True)
class Layer:
    """The settings of a layer. Weights: router [D, E], w_in [E, D, F], w_out [E, F, D], w_gate like w_in."""

    router: np.ndarray
    w_in: np.ndarray
    w_out: np.ndarray
    w_gate: Optional[np.ndarray] = None
    shared: tuple[np.ndarray, ...] = ()  # w_in, w_out and perhaps w_gate, without E
    k: int
    score: str = "softmax"
    weight: str = "before"
    factor: tuple[int, int] = (1, 1)  # capacity factor as a fraction
    per_choice: bool = True
    group_size: int


@dataclass
class Output:
    y: np.ndarray  # [B, T, D]
    groups: list[Routing] = field(default_factory=list)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation (arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(x: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, w_gate: Optional[np.ndarray] = None) -> np.ndarray:
    hidden = gelu(x @ w_in) if w_gate is None else gelu(x @ w_gate) * (x @ w_in)
    return hidden @ w_out


def forward(layer: Layer, x_BTD: np.ndarray, mask_BT: np.ndarray) -> Output:
    """The layer's output and the routing of every group, the groups being consecutive runs of `group_size` tokens."""
    x, mask = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(np.float64), mask_BT.reshape(-1)
    y, output = np.zeros_like(x), Output(np.zeros(0))
    num_experts, size = layer.router.shape[1], layer.group_size
    slots = lambda tokens: capacity(tokens, num_experts, layer.k, *layer.factor, layer.per_choice)  # noqa: E731
    for first in range(0, len(x), size):
        group = slice(first, first + size)
        routing = route(
            x[group] @ layer.router.astype(np.float64),
            mask[group],
            k=layer.k,
            kind=layer.score,
            weight=layer.weight,
            limit=slots(int(mask[group].sum())),
            num_slots=slots(size),
        )
        output.groups.append(routing)
        for s in range(size):
            for c in range(layer.k):
                if routing.kept[s, c]:
                    y[first + s] += routing.weights[s, c] * expert(layer, x[first + s], routing.experts[s, c])
    for t in range(len(x)):
        if layer.shared:
            y[t] += feed_forward(x[t], *(w.astype(np.float64) for w in layer.shared))
    output.y = y.reshape(x_BTD.shape)
    return output


def expert(layer: Layer, x: np.ndarray, e: int) -> np.ndarray:
    gate = None if layer.w_gate is None else layer.w_gate[e].astype(np.float64)
    return feed_forward(x, layer.w_in[e].astype(np.float64), layer.w_out[e].astype(np.float64), gate)
