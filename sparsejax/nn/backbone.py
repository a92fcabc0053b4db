"""The dimensions and choices that every block of one model shares."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Optional

from sparsejax.base.errors import ConfigError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What attention and feed-forward networks need to know of the model. Parameters are always float32."""

    d_model: int = 128
    num_heads: int = 4
    num_kv_heads: Optional[int] = None  # grouped-query attention; None: as many as query heads
    head_dim: Optional[int] = None  # None: d_model / num_heads
    qk_norm: bool = False  # RMSNorm on queries and keys, per head
    causal: bool = True  # a token attends to none after it; false: to all of its document (an encoder)
    rope_theta: float = 10_000.0
    attention_soft_cap: Optional[float] = None  # c · tanh(logits / c)
    attention: Literal["auto", "xla", "splash"] = "auto"  # auto: splash on TPU, xla elsewhere
    dtype: DType = "float32"  # of activations and matrix products; router, softmax, norms and loss stay float32
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for name in ("d_model", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                "num_heads",
                f"{self.num_heads} does not divide d_model={self.d_model}; "
                f"set head_dim, or use {_divisors(self.d_model)}",
            )
        if self.width_of_head < 2:
            raise ConfigError("head_dim", f"{self.width_of_head} is less than 2")
        if self.width_of_head % 2:
            raise ConfigError("head_dim", f"{self.width_of_head} is odd; rotary positions turn pairs of features")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ConfigError(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide num_heads={self.num_heads}; allowed: {_divisors(self.num_heads)}",
            )
        for name in ("attention_soft_cap", "rope_theta", "norm_epsilon"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(name, f"{value} is not positive")

    @property
    def width_of_head(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_layers(self) -> int:
        """Blocks in the whole model; scales the initialisation of what is added to the residual stream."""
        raise TypeError("a bare Backbone has no layers; use a model config")


@dataclass(frozen=True, kw_only=True)
class Branch(Backbone):
    """A model's dimensions with fewer heads, for a part of a layer."""

    layers: int  # of the whole model

    @property
    def num_layers(self) -> int:
        return self.layers


def branch(backbone: Backbone, heads: int, kv_heads: int) -> Branch:
    """The same with so many heads, as wide as they are."""
    same: dict[str, Any] = {field.name: getattr(backbone, field.name) for field in dataclasses.fields(Backbone)}
    own: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": backbone.width_of_head}
    return Branch(**(same | own), layers=backbone.num_layers)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
