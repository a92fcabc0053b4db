"""Addresses by vector quantisation: the nearest of centres that follow the states, and pairs of such clusters."""

from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.memory.address import (
    Address,
    Addresses,
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
from sparsejax.ops.clusters import cluster_sums, nearest
from sparsejax.ops.ngrams import linear_hash, primes_from
from sparsejax.ops.windows import shifted


@dataclass(frozen=True, kw_only=True)
class Clusters(Address):
    """The state is cut into `heads` parts, and each looks up the row of the nearest of its `clusters` centres. Centres
    are running means of the states nearest to them (van den Oord et al., arXiv:1711.00937, appendix A.1; k-means with
    decay 0.999 as in N-Grammer, arXiv:2207.06366); one that nothing is near to stays."""

    clusters: int = 1024
    heads: int = 1
    decay: float = 0.999  # of the sums and counts that centres are made of, each step

    def __post_init__(self):
        positive(self, "clusters", "heads")
        within(self, "decay", 0, 1)

    def check(self, backbone: Backbone, vocab_size: int) -> None:
        if backbone.d_model % self.heads:
            raise ConfigError("heads", f"{self.heads} parts do not divide d_model={backbone.d_model}")

    def rows_each(self, vocab_size: int) -> int:
        return self.clusters

    @property
    def lookups(self) -> int:
        return self.heads

    def first_running(self, key: PRNGKeyArray, backbone: Backbone) -> Optional[Float[Array, "H C n"]]:
        centres = jax.random.normal(key, (self.heads, self.clusters, backbone.d_model // self.heads))
        return jnp.concatenate([centres, jnp.ones_like(centres[..., :1])], axis=-1)

    def next_running(self, running: Float[Array, "*R n"], measured: Float[Array, "*R n"]) -> Float[Array, "*R n"]:
        return decayed(running, measured, self.decay)

    def size(self, backbone: Backbone) -> tuple[int, int]:
        return 0, self.clusters * backbone.d_model

    def codes(self, inputs: Inputs, variables: Variables) -> tuple[Int[Array, "B T H"], Float[Array, "H C n"]]:
        """(each part's cluster, what this device adds to the running sums)."""
        assert inputs.h is not None
        h_BTD = jax.lax.stop_gradient(inputs.h.astype(jnp.float32))
        h_BTHd = h_BTD.reshape(*h_BTD.shape[:2], self.heads, -1)
        codes_BTH = nearest(h_BTHd, mean_of(variables["running"]))
        return codes_BTH, cluster_sums(h_BTHd, codes_BTH, inputs.real, self.clusters)

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        codes_BTH, measured = self.codes(inputs, variables)
        ids = with_offsets(codes_BTH, self.tables(vocab_size))
        return Addresses(ids=at_real(ids, inputs), measured=measured)


@dataclass(frozen=True, kw_only=True)
class LatentBigrams(Clusters):
    """A token's cluster and that of the token before, hashed to one of `buckets` rows for each head
    ((a x + a) mod p mod buckets with a = head + 1 and a prime p > buckets; N-Grammer, arXiv:2207.06366). The first
    token of a document has no row."""

    clusters: int = 256
    heads: int = 8
    buckets: int = 196_608

    def __post_init__(self):
        super().__post_init__()
        positive(self, "buckets")
        if self.heads * self.clusters**2 >= 2**32:
            message = (
                f"{self.clusters} clusters times {self.heads} heads have more bigrams than uint32 arithmetic holds"
            )
            raise ConfigError("clusters", f"{message}; allowed: heads · clusters² < 2³²")

    def rows_each(self, vocab_size: int) -> int:
        return self.buckets

    @property
    def window(self) -> tuple[int, ...]:
        return (1, self.heads)

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        codes_BTH, measured = self.codes(inputs, variables)
        one_up = codes_BTH + 1
        before_BTH = shifted(one_up, inputs.segments, 1, inputs.window)
        bigrams = (codes_BTH + self.clusters * (before_BTH - 1)).astype(jnp.uint32)
        # A prime of its own for each head: the same for all would make the heads' collisions much the same, too.
        primes = primes_from(self.buckets + 1, self.heads)
        hashed = linear_hash(bigrams, range(1, self.heads + 1), primes, self.buckets)
        ids = jnp.where(before_BTH > 0, with_offsets(hashed, self.tables(vocab_size)), -1)
        return Addresses(ids=at_real(ids, inputs), measured=measured, recent=one_up)
