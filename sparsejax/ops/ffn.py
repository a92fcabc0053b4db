"""The feed-forward network of experts as functions of arrays, in two halves: up to the hidden layer, and down from it.

The halves are apart because a dropless layer keeps what is between them from its forward to its backward pass. A
combine weight is applied to the output, and the backward pass has no need of that output: a weight's gradient is taken
where the hidden layer is."""

import functools
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sparsejax.base.sharding import mesh_platform, vary_like, whole
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


def statistical_top_k(z: Float[Array, "*N F"], share: float) -> Float[Array, "*N F"]:
    """relu(z − (mean + deviation · Φ⁻¹(1 − share))) over the width, in float32: what exceeds a threshold that this
    share of normally distributed values does, without a sort (Gemma 3n). No share leaves z as it is."""
    wide = z.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    # Where all values are the same, the root's gradient would be infinite.
    deviation = jnp.sqrt(jnp.maximum(jnp.square(wide - mean).mean(-1, keepdims=True), 1e-30))
    return jax.nn.relu(wide - (mean + deviation * NormalDist().inv_cdf(1 - share))).astype(z.dtype)


def only_active(up: tuple[Float[Array, "*N F"], ...], share: float) -> tuple[Float[Array, "*N F"], ...]:
    """The products with w_in and, when gated, w_gate; of what the activation is applied to only `statistical_top_k` is
    left."""
    return (*up[:-1], statistical_top_k(up[-1], share))


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
    """The output, times `scale_EN` row by row. Its backward pass holds one array as large as the hidden layer beside
    `up` and the gradient of the hidden layer, and computes the activation twice rather than keep a second."""
    w_out = vary_like(weights[1], up[0])
    return _down(activation, up, w_out, None if scale_EN is None else vary_like(scale_EN, up[0]), dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _down(activation: Activation, up, w_out, scale_EN, dropout):
    out_END = jnp.einsum("...nf,...fd->...nd", _kept(up, activation, dropout), w_out)
    return out_END if scale_EN is None else scaled(out_END, scale_EN)


def _down_fwd(activation: Activation, *operands):
    return _down(activation, *operands), operands


def _down_bwd(activation: Activation, operands, dout_END):
    up, w_out, scale_EN, dropout = operands
    hidden_ENF = _kept(up, activation, dropout)
    dout_END = after(hidden_ENF, dout_END)
    dhidden_ENF = jnp.einsum("...nd,...fd->...nf", dout_END, w_out)
    dscale_EN = None
    if scale_EN is not None:
        dscale_EN = jnp.sum(hidden_ENF.astype(jnp.float32) * dhidden_ENF.astype(jnp.float32), axis=-1)
        hidden_ENF = scaled(hidden_ENF, after(dscale_EN, scale_EN))  # after, so that it takes the other one's place
        dhidden_ENF = scaled(dhidden_ENF, scale_EN)
    dw_out = jnp.einsum("...nf,...nd->...fd", hidden_ENF, dout_END)
    _, pull = jax.vjp(lambda up: _kept(up, activation, dropout), tuple(after(dw_out, part) for part in up))
    return *pull(dhidden_ENF), dw_out, dscale_EN, None


_down.defvjp(_down_fwd, _down_bwd)


def _kept(up, activation: Activation, dropout: Optional[Dropout]) -> Float[Array, "*E N F"]:
    """The hidden layer without the units that are dropped."""
    hidden_ENF = hidden(up, activation)
    return hidden_ENF if dropout is None else drop_units(hidden_ENF, dropout)


def after(done: Float[Array, "..."], value: Array) -> Array:
    """`value`, which whoever reads it gets only once `done` is computed, so that fewer arrays are alive at a time.

    XLA for CPU starts whatever it can as early as it can, and drops optimization barriers before it decides on that:
    only a dependency holds it back, here a selection that is fused into what computes or reads `value`. Compilers for
    other platforms look after memory themselves and are left alone."""
    if mesh_platform() != "cpu":
        return value
    never = done[(0,) * done.ndim] > jnp.inf
    return jnp.where(never, 0, value)


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
