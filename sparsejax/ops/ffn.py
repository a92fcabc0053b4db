"""The feed-forward network of experts as functions of arrays, in two halves: up to the hidden layer, and down from it.

The halves are apart because a dropless layer keeps the hidden layer between its forward and backward pass, and because
a combine weight is cheapest applied to the hidden layer."""

import functools
from collections.abc import Sequence
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sparsejax.base.sharding import whole
from sparsejax.ops.dropout import Dropout, drop_units

Activation = Literal["gelu", "silu", "relu"]
ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}

Weights = tuple[Float[Array, "*E _ _"], ...]
"""(w_in, w_out), or (w_in, w_out, w_gate) when gated (Shazeer, arXiv:2002.05202). Of one expert, of E, or of any part
of either width."""


Specs = tuple[P, ...]
"""How each of them is split for storage, inside `on_each_device`."""


def whole_weights(weights: Weights, specs: Optional[Specs], like: Array, over: Sequence[str] = ("data",)) -> Weights:
    """Stored weights as they are used beside the rows `like`: in their dtype, gathered over the mesh axes `over`. None:
    they are not split at all."""
    narrow = tuple(weight.astype(like.dtype) for weight in weights)
    return narrow if specs is None else tuple(whole(w, spec, like, over) for w, spec in zip(narrow, specs, strict=True))


def expert_up(z_END: Float[Array, "*E N D"], weights: Weights) -> tuple[Float[Array, "*E N F"], ...]:
    """The products with w_in and, when gated, w_gate, before any activation."""
    w_in, _, *gate = weights
    return tuple(jnp.einsum("...nd,...df->...nf", z_END, weight) for weight in (w_in, *gate))


def hidden(up: tuple[Float[Array, "..."], ...], activation: Activation) -> Float[Array, "..."]:
    """act(x W_in), or act(x W_gate) ⊙ x W_in."""
    act, (inner, *gate) = ACTIVATIONS[activation], up
    return act(gate[0]) * inner if gate else act(inner)


def scaled(rows_NF: Float[Array, "*N F"], scale_N: Float[Array, "*N"]) -> Float[Array, "*N F"]:
    """In float32, so that the gradient of a scale, a sum over the width, is."""
    return (rows_NF.astype(jnp.float32) * scale_N[..., None]).astype(rows_NF.dtype)


def expert_down(
    up: tuple[Float[Array, "*E N F"], ...],
    weights: Weights,
    activation: Activation,
    scale_EN: Optional[Float[Array, "*E N"]] = None,
    dropout: Optional[Dropout] = None,
) -> Float[Array, "*E N D"]:
    """The output, times `scale_EN` row by row."""
    hidden_ENF = hidden(up, activation)
    if dropout is not None:
        hidden_ENF = drop_units(hidden_ENF, dropout)
    if scale_EN is not None:
        hidden_ENF = scaled(hidden_ENF, scale_EN)
    return jnp.einsum("...nf,...fd->...nd", hidden_ENF, weights[1])


def expert_ffn(
    z_END: Float[Array, "*E N D"],
    weights: Weights,
    activation: Activation,
    scale_EN: Optional[Float[Array, "*E N"]] = None,
    dropout: Optional[Dropout] = None,
    specs: Optional[Specs] = None,
) -> Float[Array, "*E N D"]:
    """Every expert on its own N rows: two (three, when gated) matrix products. Works on any part of E or F.

    Between forward and backward pass only the input and its products are kept: the backward pass applies the
    activation again, which is cheaper than its intermediate values are large, and gathers weights again."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def up(z_END, weights):
        return expert_up(z_END, whole_weights(weights, specs, z_END))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def down(up, weights, scale_EN):
        return expert_down(up, whole_weights(weights, specs, up[0]), activation, scale_EN, dropout)

    return down(up(z_END, weights), weights, scale_EN)
