"""Addresses by locality-sensitive hashing of a token's state: nothing is learned, and similar states share rows."""

import math
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.memory.address import (
    Address,
    Addresses,
    Fixed,
    Inputs,
    Variables,
    at_real,
    decayed,
    mean_of,
    positive,
    with_offsets,
    within,
)
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.lsh import cross_polytope_buckets, euclidean_buckets, hyperplane_buckets


@dataclass(frozen=True, kw_only=True)
class Centred(Address):
    """H hash tables of the state less its running mean. States of a language model have a large mean in common; not
    taken away, it sends most of them to the same few buckets."""

    hashes: int = 1  # tables
    centre: bool = True
    decay: float = 0.99  # of the running mean, each step
    entropy_floor: float = 0.5  # of the attainable bucket entropy; below it the log says so

    def __post_init__(self):
        positive(self, "hashes")
        within(self, "decay", 0, 1)
        within(self, "entropy_floor", 0, 1)

    @property
    def columns_each(self) -> int:
        """Projections that a table's bucket is read from."""
        raise NotImplementedError

    def hashed(self, centred_BTD: Float[Array, "B T D"], variables: Variables) -> Int[Array, "B T H"]:
        raise NotImplementedError

    @property
    def lookups(self) -> int:
        return self.hashes

    @property
    def collapse(self) -> Optional[float]:
        return self.entropy_floor

    @property
    def remedy(self) -> str:
        if not self.centre:
            return "take away what all states have in common with centre=true"
        return "place it in an earlier layer, or use fewer buckets"

    def unused(self) -> dict[str, str]:
        return {} if self.centre else {"decay": "centre=false keeps no mean"}

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Variable]:
        shape = (self.hashes, backbone.d_model, self.columns_each)
        return {"normals": Fixed(jax.random.normal(key, shape), axes=(None, None, None))}

    def first_running(self, key: PRNGKeyArray, backbone: Backbone) -> Optional[Float[Array, " n"]]:
        return jnp.zeros(backbone.d_model + 1, jnp.float32) if self.centre else None

    def next_running(self, running: Float[Array, "*R n"], measured: Float[Array, "*R n"]) -> Float[Array, "*R n"]:
        return decayed(running, measured, self.decay)

    def size(self, backbone: Backbone) -> tuple[int, int]:
        return 0, self.hashes * backbone.d_model * self.columns_each

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        assert inputs.h is not None
        h_BTD = jax.lax.stop_gradient(inputs.h.astype(jnp.float32))
        measured = None
        if self.centre:
            real_BT1 = inputs.real[..., None].astype(jnp.float32)
            measured = jnp.concatenate([(h_BTD * real_BT1).sum((0, 1)), real_BT1.sum((0, 1))])
            h_BTD = h_BTD - mean_of(variables["running"])
        ids = with_offsets(self.hashed(h_BTD, variables), self.tables(vocab_size))
        return Addresses(ids=at_real(ids, inputs), measured=measured)


@dataclass(frozen=True, kw_only=True)
class Hyperplanes(Centred):
    """The sides of `bits` random hyperplanes on which the state lies (arXiv:2302.00003, arXiv:2208.04461): 2^bits
    buckets a table."""

    bits: int = 12

    def __post_init__(self):
        super().__post_init__()
        within(self, "bits", 0, 31)

    def rows_each(self, vocab_size: int) -> int:
        return 2**self.bits

    @property
    def columns_each(self) -> int:
        return self.bits

    def hashed(self, centred_BTD: Float[Array, "B T D"], variables: Variables) -> Int[Array, "B T H"]:
        return hyperplane_buckets(centred_BTD, variables["normals"])


@dataclass(frozen=True, kw_only=True)
class Euclidean(Centred):
    """The cell of a randomly shifted grid of `width` along `projections` random directions (Datar et al., SCG 2004),
    hashed into `buckets`. Unlike the other two it tells lengths apart."""

    projections: int = 8
    width: float = 4.0
    buckets: int = 4096

    def __post_init__(self):
        super().__post_init__()
        positive(self, "projections", "buckets")
        within(self, "width", 1e-6, math.inf)

    def rows_each(self, vocab_size: int) -> int:
        return self.buckets

    @property
    def columns_each(self) -> int:
        return self.projections

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Variable]:
        shape = (self.hashes, self.projections)
        offsets = jax.random.uniform(jax.random.fold_in(key, 1), shape, maxval=self.width)
        return super().init(key, backbone) | {"offsets": Fixed(offsets, axes=(None, None))}

    def hashed(self, centred_BTD: Float[Array, "B T D"], variables: Variables) -> Int[Array, "B T H"]:
        return euclidean_buckets(centred_BTD, variables["normals"], variables["offsets"], self.width, self.buckets)


@dataclass(frozen=True, kw_only=True)
class CrossPolytope(Centred):
    """The nearest of the 2 · `columns` corners of a randomly turned cross-polytope (arXiv:1509.02897, as in Reformer,
    arXiv:2001.04451)."""

    columns: int = 128

    def __post_init__(self):
        super().__post_init__()
        positive(self, "columns")

    def rows_each(self, vocab_size: int) -> int:
        return 2 * self.columns

    @property
    def columns_each(self) -> int:
        return self.columns

    def hashed(self, centred_BTD: Float[Array, "B T D"], variables: Variables) -> Int[Array, "B T H"]:
        return cross_polytope_buckets(centred_BTD, variables["normals"])
