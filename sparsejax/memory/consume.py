"""What consumptions have in common: what they see beside the value, and what they return."""

from dataclasses import dataclass
from typing import ClassVar, Optional, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.structs import struct
from sparsejax.nn.backbone import Backbone


@struct
class Surroundings:
    """Of the tokens whose values are consumed."""

    x: Float[Array, "B T D"]  # the residual stream
    h: Float[Array, "B T D"]  # the same, normalised
    segments: Int[Array, "B T"]  # 0: padding
    embedded: Optional[Float[Array, "B T D"]] = None  # the output of the model's embedding
    window: Optional[Float[Array, "B N *x"]] = None  # what was remembered of the tokens before the row


@struct
class Consumed:
    """What becomes of the values. In padding it means nothing."""

    delta: Float[Array, "B T D"]  # to be added to the residual stream
    gate: Optional[Float[Array, "B T"]] = None  # how far a gate was open, in [0, 1]
    recent: Optional[Float[Array, "B T *x"]] = None  # of each token, what those after it will want to know


class Consumer(Protocol):
    """The module of a consumption."""

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed: ...


@dataclass(frozen=True, kw_only=True)
class Consume:
    """The base of the entries of `consumes.CONSUMES`."""

    accepts: ClassVar[tuple[str, ...]] = ("value",)
    """Kinds of content (`Content.kind`)."""
    starts_at_zero: ClassVar[bool] = False
    """Whether it adds nothing at first, whatever the rows are; if not, rows must start so that their value is 0."""
    full_width: ClassVar[bool] = False
    """Whether the value has to be as wide as the model."""
    splits_value: ClassVar[bool] = False
    """Whether the mesh axis `tensor` splits the value as it does a hidden layer."""
    reads_state: ClassVar[bool] = False
    """Whether it reads the normalised state."""
    reads_embedding: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    """Whether it reports a gate."""

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        """A `Consumer`."""
        raise NotImplementedError

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        """(parameters, multiply-adds of one token's matrix products)."""
        return 0, 0

    def window(self, backbone: Backbone) -> Optional[tuple[int, ...]]:
        """[N, …]: the shape, for each row, of what it remembers of past tokens in generation."""
        return None
