"""What decoding is given, and what it returns."""

from dataclasses import dataclass
from typing import Optional, Protocol

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.base.structs import struct
from sparsejax.model.stack import Caches


class Variables(Protocol):
    """What a model computes with: a `TrainState`, or the part of one that `restore_variables` reads."""

    @property
    def params(self) -> nnx.State: ...

    @property
    def model_state(self) -> nnx.State: ...


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampled token ids, int32 `[max_tokens]` for each prompt, and how long it took, without compilation."""

    tokens: list[np.ndarray]
    prefill_seconds: float  # reading the prompts
    decode_seconds: float  # everything after
    depths: Optional[np.ndarray] = None  # layers run for each token of each prompt, with early exits
    kept: Optional[np.ndarray] = (
        None  # rounds of self-speculation that gave a prompt 1, 2, … m + 1 tokens, `[rows, m+1]`
    )
    compiled_flops: Optional[float] = None  # XLA's own count of the decoding program, which has a loop's body once

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens of all prompts per second of decoding."""
        return sum(len(row) for row in self.tokens) / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What continuations lose as a decoder meets them, token by token, and how long it took, without compilation."""

    nll: list[np.ndarray]  # nats, float32 `[T]` for each continuation
    decode_seconds: float
    depths: Optional[list[np.ndarray]] = None  # layers run for each token, with early exits
    compiled_flops: Optional[float] = None  # as of a generation


@struct
class Decoded:
    """The caches are returned so that their memory is used again."""

    tokens: Int[Array, "B T"]
    caches: Caches
    depths: Optional[Int[Array, "B T"]] = None
    kept: Optional[Int[Array, "B m+1"]] = None
    nll: Optional[Float[Array, "B T"]] = None  # of tokens that were given
