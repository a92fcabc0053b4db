"""What chooses the tokens that a layer computes on: a learned router with a causal form of its choice, or a lot."""

import abc
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.blocks.context import Context
from sparsejax.nn.linear import Linear
from sparsejax.ops.estimators import straight_through
from sparsejax.ops.hashing import uniform

Gate = Literal["none", "raw", "sigmoid", "softmax", "straight_through"]


class Chooser(nnx.Module, abc.ABC):
    """Chooses the tokens of one layer."""

    @abc.abstractmethod
    def scores(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T"]:
        """By which the best tokens of a row are chosen, float32."""

    @abc.abstractmethod
    def causal(
        self, x_BTD: Float[Array, "B T D"], scores_BT: Float[Array, "B T"], context: Context
    ) -> Float[Array, "B T"]:
        """Logit that a token is chosen, from that token and those before it alone."""

    def gate(self, scores_BT: Float[Array, "B T"], valid_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        """What the block's contribution is multiplied with."""
        return jnp.ones_like(scores_BT)


def hidden_width(d_model: int) -> int:
    """Of the predictor."""
    return max(d_model // 4, 1)


class Router(Chooser):
    """r = wᵀ x, in float32, with what predicts from a token alone whether it is among the best of its row."""

    def __init__(self, key: PRNGKeyArray, width: int, gate: Gate, predicts: bool, numbers: int = 1):
        keys = jax.random.split(key, 3)
        score = lambda key, width: to_numbers(key, width, numbers)  # noqa: E731
        self.weight = score(keys[0], width)
        self.hidden = to_numbers(keys[1], width, hidden_width(width)) if predicts else None
        self.prediction = score(keys[2], hidden_width(width)) if predicts else None
        self.kind: Gate = gate

    def scores(self, x_BTD, context):
        return self._own(self.weight(x_BTD.astype(jnp.float32)), context)

    def causal(self, x_BTD, scores_BT, context):
        if self.hidden is None or self.prediction is None:
            return scores_BT
        seen_BTD = jax.lax.stop_gradient(x_BTD).astype(jnp.float32)  # the model does not learn to be predictable
        return self._own(self.prediction(jax.nn.gelu(self.hidden(seen_BTD))), context)

    def _own(self, numbers_BTN: Float[Array, "B T N"], context: Context) -> Float[Array, "B T"]:
        """That of this layer."""
        return numbers_BTN[..., 0]

    def gate(self, scores_BT, valid_BT):
        if self.kind == "raw":
            return scores_BT
        if self.kind == "softmax":
            return jax.nn.softmax(scores_BT, axis=1, where=valid_BT)
        if self.kind == "none":
            return jnp.ones_like(scores_BT)
        soft_BT = jax.nn.sigmoid(scores_BT)
        return soft_BT if self.kind == "sigmoid" else straight_through(jnp.ones_like(soft_BT), soft_BT)


class Lot(Chooser):
    """Chooses by lot."""

    def __init__(self, capacity: float):
        self.capacity = capacity

    def _drawn_for(self, context: Context) -> tuple[Any, Optional[PRNGKeyArray]]:
        """(what the lots of evaluation depend on beside the position, the key of those of training)."""
        return context.layer, context.key

    def scores(self, x_BTD, context):
        batch, (which, key) = context.batch, self._drawn_for(context)
        seed_BT = jnp.broadcast_to(batch.positions, batch.tokens.shape).astype(jnp.uint32)
        number = jnp.asarray(which, jnp.uint32)
        if context.mode == "train" and key is not None:
            order_T = jnp.arange(batch.tokens.shape[1], dtype=jnp.uint32)
            number = jax.random.bits(key, (), jnp.uint32)
            seed_BT = batch.rows.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1) + order_T
        return uniform(seed_BT, number, 0x5E1EC7)

    def causal(self, x_BTD, scores_BT, context):
        return self.capacity - scores_BT


def to_numbers(key: PRNGKeyArray, width: int, numbers: int) -> Linear:
    """A token's vector to a few numbers, float32."""
    layout = {"stddev": width**-0.5, "out_spec": P(BATCH_AXES, None, None), "dtype": "float32", "group": "router"}
    return Linear(key, "btd,dn->btn", (width, numbers), (None, None), **layout)
