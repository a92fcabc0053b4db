"""Axis 2, content: what a row of the table is, and the value that a token's K rows make together."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.registry import Registry
from sparsejax.memory.address import positive
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.mlp import ffn_width
from sparsejax.ops.ffn import ACTIVATIONS, Activation


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a row: so many numbers, normal with this standard deviation before the first step."""

    width: int
    stddev: float


@dataclass(frozen=True, kw_only=True)
class Content:
    """The base of the entries of `CONTENTS`."""

    kind: ClassVar[Literal["value", "expert", "gate"]] = "value"
    """What consumptions go by: a value is added, projected or gated, a gate multiplies a hidden layer."""
    reads_state: ClassVar[bool] = False
    """Whether a token's value depends on its state, and not on its rows alone."""

    def parts(self, backbone: Backbone, zero: bool) -> tuple[Part, ...]:
        """How a row begins. With `zero`, whatever is looked up adds nothing at first."""
        raise NotImplementedError

    def width(self, backbone: Backbone) -> int:
        """Numbers in a row."""
        return sum(part.width for part in self.parts(backbone, zero=True))

    def value_width(self, backbone: Backbone, lookups: int) -> int:
        """Numbers in the value of a token."""
        return backbone.d_model

    def products(self, backbone: Backbone) -> int:
        """Multiply-adds of one row's matrix products."""
        return 0

    def value(
        self, h_BTD: Float[Array, "B T D"], rows_BTKE: Float[Array, "B T K E"], weights_BTK: Float[Array, "B T K"]
    ) -> Float[Array, "B T V"]:
        """The value, in the dtype of `h_BTD`. Rows of zeros and weights of 0 add nothing to it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Vector(Content):
    """A vector of `size` numbers. The K vectors of a token are summed, or laid side by side."""

    size: Optional[int] = None  # None: d_model
    join: Literal["sum", "concat"] = "sum"

    def __post_init__(self):
        if self.size is not None:
            positive(self, "size")

    def parts(self, backbone: Backbone, zero: bool) -> tuple[Part, ...]:
        size = backbone.d_model if self.size is None else self.size
        return (Part(width=size, stddev=0.0 if zero else size**-0.5),)

    def value_width(self, backbone: Backbone, lookups: int) -> int:
        return self.width(backbone) * (lookups if self.join == "concat" else 1)

    def value(self, h_BTD, rows_BTKE, weights_BTK):
        if self.join == "sum":
            return _weighted_sum(weights_BTK, rows_BTKE, h_BTD)
        side_by_side = weights_BTK[..., None] * rows_BTKE
        return side_by_side.reshape(*h_BTD.shape[:2], -1).astype(h_BTD.dtype)


@dataclass(frozen=True, kw_only=True)
class PartialExpert(Content):
    """A feed-forward network of `rank` hidden units: σ(h A) B, A `[r, D]` and B `[r, D]` (arXiv:2302.00003). Rank 1
    is a neuron of PEER (arXiv:2407.04153), rank d_ff a whole expert."""

    rank: int = 8
    activation: Activation = "gelu"

    kind = "expert"
    reads_state = True

    def __post_init__(self):
        positive(self, "rank")

    def parts(self, backbone: Backbone, zero: bool) -> tuple[Part, ...]:
        size = self.rank * backbone.d_model
        out = 0.0 if zero else self.rank**-0.5
        return Part(width=size, stddev=backbone.d_model**-0.5), Part(width=size, stddev=out)

    def products(self, backbone: Backbone) -> int:
        return 2 * self.rank * backbone.d_model

    def value(self, h_BTD, rows_BTKE, weights_BTK):
        up, down = _halves(rows_BTKE, self.rank)
        hidden = ACTIVATIONS[self.activation](jnp.einsum("btd,btkrd->btkr", h_BTD, up.astype(h_BTD.dtype)))
        hidden = (weights_BTK[..., None] * hidden).astype(h_BTD.dtype)
        return jnp.einsum("btkr,btkrd->btd", hidden, down.astype(h_BTD.dtype))


@dataclass(frozen=True, kw_only=True)
class GateRow(Content):
    """A vector as wide as a feed-forward network's hidden layer, which it multiplies (STEM, arXiv:2601.10639)."""

    d_ff: Optional[int] = None  # None: 4 · d_model

    kind = "gate"

    def __post_init__(self):
        if self.d_ff is not None:
            positive(self, "d_ff")

    def parts(self, backbone: Backbone, zero: bool) -> tuple[Part, ...]:
        return (Part(width=ffn_width(backbone, self.d_ff), stddev=0.0 if zero else 1.0),)

    def value_width(self, backbone: Backbone, lookups: int) -> int:
        return self.width(backbone)

    def value(self, h_BTD, rows_BTKE, weights_BTK):
        return _weighted_sum(weights_BTK, rows_BTKE, h_BTD)


@dataclass(frozen=True, kw_only=True)
class KeyValues(Content):
    """`pairs` keys and values, over which the token attends: softmax(h Kᵀ) V, K and V `[m, D]` (large lookup layers,
    arXiv:2601.21461). A token with several rows attends to each for itself, or to the pairs of all of them together:
    with `token_id.counts` frequent ids then have more pairs than rare ones, as in that paper."""

    pairs: int = 4
    over: Literal["row", "token"] = "row"

    reads_state = True

    def __post_init__(self):
        positive(self, "pairs")

    def parts(self, backbone: Backbone, zero: bool) -> tuple[Part, ...]:
        size, stddev = self.pairs * backbone.d_model, backbone.d_model**-0.5
        return Part(width=size, stddev=stddev), Part(width=size, stddev=0.0 if zero else stddev)

    def products(self, backbone: Backbone) -> int:
        return 2 * self.pairs * backbone.d_model

    def value(self, h_BTD, rows_BTKE, weights_BTK):
        keys, values = _halves(rows_BTKE, self.pairs)
        logits = jnp.einsum("btd,btkmd->btkm", h_BTD, keys.astype(h_BTD.dtype), preferred_element_type=jnp.float32)
        if self.over == "row":
            attended = weights_BTK[..., None] * jax.nn.softmax(logits, axis=-1)
        else:  # a row's weight is that of its pairs; a token without rows has nothing to divide by
            weights = weights_BTK[..., None]
            logits = jnp.where(weights > 0, logits, -1e30)
            scores = weights * jnp.exp(logits - jax.lax.stop_gradient(logits.max((-2, -1), keepdims=True)))
            attended = scores / jnp.maximum(scores.sum((-2, -1), keepdims=True), 1e-30)
        return jnp.einsum("btkm,btkmd->btd", attended.astype(h_BTD.dtype), values.astype(h_BTD.dtype))


CONTENTS = Registry(
    "content",
    {"vector": Vector, "partial_expert": PartialExpert, "gate_row": GateRow, "key_values": KeyValues},
)


def _weighted_sum(
    weights_BTK: Float[Array, "B T K"], rows_BTKE: Float[Array, "B T K E"], like: Float[Array, "B T D"]
) -> Float[Array, "B T E"]:
    """In float32, returned in the dtype of `like`."""
    summed = jnp.einsum("btk,btke->bte", weights_BTK, rows_BTKE.astype(jnp.float32))
    return summed.astype(like.dtype)


def _halves(
    rows_BTKE: Float[Array, "B T K E"], count: int
) -> tuple[Float[Array, "B T K n D"], Float[Array, "B T K n D"]]:
    """A row's first and second half, each as `count` vectors."""
    both = rows_BTKE.reshape(*rows_BTKE.shape[:3], 2, count, -1)
    return both[..., 0, :, :], both[..., 1, :, :]
