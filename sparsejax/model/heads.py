"""What a model gives scores to: every token of the vocabulary at every position, or classes of whole rows."""

import abc
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.nn.embed import ClassHead, Head
from sparsejax.nn.linear import normal, param


class HeadSpec(abc.ABC):
    """A config's description of an output head: the base of the frozen dataclasses in `HEADS`."""

    of_tokens = True
    """Whether it scores the vocabulary, as generation needs."""

    @abc.abstractmethod
    def build(
        self, key: PRNGKeyArray, vocab_size: int, width: int, dtype: str, tied: bool
    ) -> Optional[Head | ClassHead]:
        """None: the embedding is the head."""

    @abc.abstractmethod
    def exit_weight(self, key: PRNGKeyArray, vocab_size: int, width: int, tied: bool) -> nnx.Param:
        """That of an exit's own head, which lies as the model's does."""

    @abc.abstractmethod
    def cost(self, vocab_size: int, width: int, tied: bool) -> Cost: ...

    def pooled(self, x_BTD: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]) -> Float[Array, "B S D"]:
        """What it reads, of what a layer gives; padding and tokens that are gone have weight 0."""
        return x_BTD

    def logits(self, tokens: int, row_length: int, vocab_size: int, parts: int) -> tuple[int, int]:
        """(positions, scores at each) of a device's tokens in rows of this length, the vocabulary being in parts."""
        return tokens, vocab_size // parts


@dataclass(frozen=True, kw_only=True)
class Tokens(HeadSpec):
    """Scores of every token of the vocabulary at every position."""

    def build(self, key: PRNGKeyArray, vocab_size: int, width: int, dtype: str, tied: bool) -> Optional[Head]:
        return None if tied else Head(key, vocab_size, width, dtype)

    def exit_weight(self, key: PRNGKeyArray, vocab_size: int, width: int, tied: bool) -> nnx.Param:
        shape, axes = ((vocab_size, width), ("vocab", "embed")) if tied else ((width, vocab_size), ("embed", "vocab"))
        return param(normal(key, shape, 0.02 if tied else width**-0.5), axes, "embedding")

    def cost(self, vocab_size: int, width: int, tied: bool) -> Cost:
        size = vocab_size * width
        return Cost(per_token=2 * size) if tied else Cost.of_matrices(size)


@dataclass(frozen=True, kw_only=True)
class Classes(HeadSpec):
    """Scores of classes, once for a row, which is one document."""

    classes: int = 12
    pool: Literal["mean", "first"] = "mean"  # of its tokens, or the first of them alone, which is the class token

    of_tokens = False

    def __post_init__(self):
        if self.classes < 2:
            raise ConfigError("classes", f"{self.classes} is less than 2")

    def build(self, key: PRNGKeyArray, vocab_size: int, width: int, dtype: str, tied: bool) -> ClassHead:
        return ClassHead(key, self.classes, width, dtype)

    def exit_weight(self, key: PRNGKeyArray, vocab_size: int, width: int, tied: bool) -> nnx.Param:
        return param(normal(key, (width, self.classes), width**-0.5), ("embed", None), "embedding")

    def cost(self, vocab_size: int, width: int, tied: bool) -> Cost:
        size = self.classes * width
        return Cost(parameters=size, active=size, per_row=2 * size)

    def logits(self, tokens: int, row_length: int, vocab_size: int, parts: int) -> tuple[int, int]:
        return tokens // row_length, self.classes

    def pooled(self, x_BTD: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]) -> Float[Array, "B 1 D"]:
        if self.pool == "first":
            return x_BTD[:, :1]
        with jax.named_scope("pool"):
            total_B1D = jnp.sum(weight_BT[..., None] * x_BTD.astype(jnp.float32), axis=1, keepdims=True)
            weight_B11 = weight_BT.sum(axis=1)[:, None, None]
            return (total_B1D / jnp.where(weight_B11 > 0, weight_B11, 1)).astype(x_BTD.dtype)


HEADS = Registry("head", {"tokens": Tokens, "classes": Classes})
