"""The choice of CoLT5 (arXiv:2303.09752) and CoDA (arXiv:2304.04947): the k tokens of a row with the highest scores,
each with a weight that a relaxed top-k gives it. The relaxation is asked for 9/8 · k, so that those around the k-th
have weights, and gradients, too.

All tokens of a row compete, whatever their document: the choice looks ahead."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError, leaks
from sparsejax.base.reports import HeavyReport, count
from sparsejax.base.sharding import on_each_device
from sparsejax.base.structs import struct
from sparsejax.blocks.choosers import Lot, to_numbers
from sparsejax.blocks.context import Context
from sparsejax.blocks.tokens import ROWS
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.estimators import straight_through
from sparsejax.ops.selection import best_tokens, members
from sparsejax.ops.soft_top_k import soft_top_k

SPARE = 9 / 8
START, DECAY = 4.0, 0.7
"""The first ε of the relaxation, and the factor by which it falls."""


@dataclass(frozen=True, kw_only=True)
class SoftChoice:
    """What choices of k tokens with weights can be told."""

    by: Literal["learned", "random", "place"] = "learned"  # the others are controls: lots, and every so many-th token
    gate: Literal["weight", "straight_through"] = "weight"  # straight_through: 1, with the weight's gradient
    epsilon: float = 0.3  # of the relaxation: the smaller, the nearer are weights to 0 and 1
    iterations: int = 50  # of the relaxation: the more, the nearer do weights add up to 9/8 · k
    allow_leak: bool = False  # accept in a causal model that the choice is one among all tokens of a row

    def __post_init__(self):
        for name in ("epsilon", "iterations"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        last = self.start * DECAY ** (self.iterations - 1)
        if last > self.epsilon:
            message = f"{self.iterations} end at ε = {last:.3g}, above epsilon={self.epsilon}"
            least = math.ceil(math.log(self.epsilon / self.start) / math.log(DECAY)) + 1
            raise ConfigError("iterations", f"{message}; allowed: {least} or more")

    @property
    def start(self) -> float:
        return max(START, self.epsilon)

    def unused(self) -> dict[str, str]:
        reason = f"by={self.by} learns nothing"
        return {} if self.by == "learned" else dict.fromkeys(("gate", "epsilon", "iterations"), reason)

    def check_causal(self) -> None:
        if not self.allow_leak:
            raise leaks("allow_leak", "a token would be chosen before those after it")


def check_share(name: str, share: float) -> None:
    """Raises `ConfigError` unless it is a part of a row."""
    if not 0 < share <= 1:
        raise ConfigError(name, f"{share} is no part of a row; allowed: more than 0, to 1")


def slots(share: float, length: int) -> int:
    """k, of `length` tokens in a row."""
    return min(length, math.ceil(share * length))


@struct
class Chosen:
    """`residual` is |Σ weights − k| of the relaxation, before all but the best lose theirs."""

    slots: Int[Array, "B K"]  # the tokens in the order of the row, T where there are fewer
    chosen: Bool[Array, "B T"]
    weight: Float[Array, "B T"]  # float32, 0 where not chosen
    residual: Float[Array, " B"]


class SoftChooser(nnx.Module):
    """Chooses a share of each row's tokens. `number` tells the choices of one layer apart."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, share: float, settings: SoftChoice, number: int = 0):
        self.weight = to_numbers(key, backbone.d_model, 1) if settings.by == "learned" else None
        self.share, self.settings, self.number = share, settings, number

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Chosen:
        settings, length = self.settings, x_BTD.shape[1]
        k = slots(self.share, length)

        def local(scores_BT: Array, valid_BT: Array) -> tuple[Array, Array, Array, Array]:
            token_BK = best_tokens(jax.lax.stop_gradient(scores_BT), valid_BT, k)
            chosen_BT = members(token_BK, length)
            weight_BT, residual_B = jnp.ones_like(scores_BT), 0 * scores_BT[:, 0]
            if settings.by == "learned":
                how = {"epsilon": settings.epsilon, "start": settings.start, "decay": DECAY}
                soft = soft_top_k(scores_BT, SPARE * k, valid_BT, **how, iterations=settings.iterations)
                straight = settings.gate == "straight_through"
                weight_BT = straight_through(weight_BT, soft.weights) if straight else soft.weights
                residual_B = soft.residual
            return token_BK, chosen_BT, jnp.where(chosen_BT, weight_BT, 0), residual_B

        given = self._scores(x_BTD, context), context.batch.segments > 0
        token_BK, chosen_BT, weight_BT, residual_B = on_each_device(local, (ROWS, ROWS), (ROWS,) * 4)(*given)
        return Chosen(slots=token_BK, chosen=chosen_BT, weight=weight_BT, residual=residual_B)

    def _scores(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T"]:
        if self.weight is not None:
            return self.weight(x_BTD.astype(jnp.float32))[..., 0]
        if self.settings.by == "place":
            stride = max(round(1 / self.share), 1)
            return -(context.batch.positions % stride).astype(jnp.float32)
        layer = jnp.asarray(context.layer, jnp.uint32) * 8 + self.number
        key: Optional[PRNGKeyArray] = None if context.key is None else jax.random.fold_in(context.key, self.number)
        return Lot(self.share).scores(x_BTD, dataclasses.replace(context, layer=layer, key=key))


def heavy_report(choices: Sequence[Chosen], valid_BT: Bool[Array, "B T"]) -> HeavyReport:
    """Of one layer's choices."""
    each = lambda of: jnp.stack([of(choice) for choice in choices])  # noqa: E731
    return HeavyReport(
        tokens=count(valid_BT),
        rows=count(valid_BT.any(axis=1)),
        chosen=each(lambda choice: count(choice.chosen)),
        slots=jnp.asarray([choice.slots.size for choice in choices], jnp.int32),
        weight_sum=each(lambda choice: choice.weight.sum()),
        residual_sum=each(lambda choice: choice.residual.sum()),
    )
