"""What addresses have in common: what they are given, what they return, and the state that some keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MemoryReport
from sparsejax.base.structs import struct
from sparsejax.nn.backbone import Backbone

KnownAt = Literal["input", "layer"]

Variables = Mapping[str, Array]
"""The values of what `Address.init` made, by name, and the running sums as `running`; whole, on every device."""


class Fixed(nnx.Variable):
    """Random numbers drawn once, kept in checkpoints and never changed, such as the hyperplanes of a hash."""


class Running(nnx.Variable):
    """Float32 sums that decay, `[…, n + 1]`: n sums and, last, the count that they are divided by. Read in the forward
    pass and moved once per optimizer step (`next_running`), not in evaluation."""


@struct
class Inputs:
    """What an address goes by: rows of one device."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0: padding
    h: Optional[Float[Array, "B T D"]] = None  # normalised; not needed where the address is known at the input
    window: Optional[Int[Array, "B N *x"]] = None  # what was remembered of the tokens before the row

    @property
    def real(self) -> Bool[Array, "B T"]:
        return self.segments > 0


@struct
class Addresses:
    """Rows of a table to be fetched for each token."""

    ids: Int[Array, "B T K"]  # int32, −1 for none: padding, or an n-gram that would reach into another document
    weights: Optional[Float[Array, "B T K"]] = None  # float32; None: 1
    measured: Optional[Float[Array, "*S"]] = None  # what this device adds to the running sums, of their shape
    recent: Optional[Int[Array, "B T *x"]] = None  # of each token, what those after it will want to know
    probability_sum: Optional[Float[Array, " N"]] = None  # of each row, over this device's tokens, if a loss reads it


@dataclass(frozen=True, kw_only=True)
class Address:
    """The base of the entries of `addresses.ADDRESSES`, a config's description and its code in one."""

    known_at: ClassVar[KnownAt] = "layer"

    def tables(self, vocab_size: int) -> tuple[int, ...]:
        """Rows of each of the tables that lie one after the other in one. Here there is one for each lookup."""
        return (self.rows_each(vocab_size),) * self.lookups

    def rows_each(self, vocab_size: int) -> int:
        """Rows of a table, where all tables have as many."""
        raise NotImplementedError

    def rows(self, vocab_size: int) -> int:
        return sum(self.tables(vocab_size))

    @property
    def lookups(self) -> int:
        """K: rows that a token fetches."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Variable]:
        """What it learns and what is drawn once, by name."""
        return {}

    def first_running(self, key: PRNGKeyArray, backbone: Backbone) -> Optional[Float[Array, "*S"]]:
        """The running sums before the first step, if it keeps any."""
        return None

    def next_running(self, running: Float[Array, "*S"], measured: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Those after a step that measured this. Leading axes of stacked layers may stand before."""
        raise NotImplementedError

    def size(self, backbone: Backbone) -> tuple[int, int]:
        """(learned parameters, multiply-adds of one token's matrix products)."""
        return 0, 0

    @property
    def window(self) -> Optional[tuple[int, ...]]:
        """[N, …]: the shape, for each row, of what it remembers of past tokens in generation."""
        return None

    @property
    def collapse(self) -> Optional[float]:
        """The bucket entropy, of what is possible, below which its tokens have too few buckets; None: never said."""
        return None

    @property
    def remedy(self) -> str:
        """What helps against that."""
        return "use fewer rows"

    def balance_loss(self, report: MemoryReport, tokens: Int[Array, ""]) -> Optional[Float[Array, ""]]:
        """Its weighted loss in a step of so many unmasked tokens, summed over the (possibly stacked) layers of the
        report; None: it has none."""
        return None

    def check(self, backbone: Backbone, vocab_size: int) -> None:
        """Raises `ConfigError` when it does not go with the model."""

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        raise NotImplementedError


def positive(entry: object, *names: str) -> None:
    """Raises `ConfigError` unless these fields are 1 or more."""
    for name in names:
        if getattr(entry, name) < 1:
            raise ConfigError(name, f"{getattr(entry, name)} is not positive")


def within(entry: object, name: str, low: float, high: float) -> None:
    """Raises `ConfigError` unless low ≤ field < high."""
    if not low <= getattr(entry, name) < high:
        raise ConfigError(name, f"{getattr(entry, name)} is outside [{low:g}, {high:g})")


def decayed(running: Float[Array, "*S n"], measured: Float[Array, "*S n"], decay: float) -> Float[Array, "*S n"]:
    """decay · running + (1 − decay) · measured, in each place of S that was met at all: what nobody meets stays."""
    met = measured[..., -1:] > 0
    return jnp.where(met, decay * running + (1 - decay) * measured, running)


def mean_of(running: Float[Array, "*S n"]) -> Float[Array, "*S n-1"]:
    """The running mean; 0 before anything was measured."""
    return running[..., :-1] / jnp.maximum(running[..., -1:], 1e-20)


def with_offsets(buckets: Int[Array, "B T H"], sizes: tuple[int, ...]) -> Int[Array, "B T H"]:
    """Bucket h of table h as a row of all tables one after the other."""
    starts = [sum(sizes[:h]) for h in range(len(sizes))]
    return buckets + jnp.asarray(starts, jnp.int32)


def at_real(ids: Int[Array, "B T K"], inputs: Inputs) -> Int[Array, "B T K"]:
    """−1 in padding."""
    return jnp.where(inputs.real[..., None], ids, -1)
