"""The row of a token is that of its id."""

from dataclasses import dataclass
from typing import Optional

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparsejax.base.errors import ConfigError
from sparsejax.memory.address import Address, Addresses, Inputs, Variables, at_real, positive, with_offsets
from sparsejax.memory.id_files import check_ids, numbers_of_ids
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.hashing import mix


@dataclass(frozen=True, kw_only=True)
class TokenId(Address):
    """A row for every vocabulary id (Alternating updates and its sparse companion, arXiv:2302.00003), or, with
    `buckets`, one in each of `hashes` tables of so many rows, by a hash of the id (hash embeddings, arXiv:1709.03933).

    With `counts`, a file of how many rows each id has, an id looks up all of its own: frequent ids may have many, and
    some none. Lookups are as many as the most that any id has."""

    buckets: Optional[int] = None  # None: as many as the vocabulary has ids, and no hash
    counts: Optional[str] = None  # .npy, [V] integers
    hashes: int = 1
    seed: int = 0

    known_at = "input"

    def __post_init__(self):
        positive(self, "hashes")
        if self.buckets is not None:
            positive(self, "buckets")
        if self.counts is not None:
            if self.buckets is not None:
                raise ConfigError(
                    "counts", f"{self.counts!r} with buckets={self.buckets}, which ids share; allowed: None"
                )
            if not self._counts.any():
                raise ConfigError("counts", f"{self.counts!r} gives no id a row")
        if self.buckets is None and self.hashes > 1:
            raise ConfigError("hashes", f"{self.hashes} hashes of an id that has a row of its own; set buckets, or 1")

    @property
    def _counts(self) -> Int[np.ndarray, " V"]:
        assert self.counts is not None
        return numbers_of_ids("counts", self.counts)

    def check(self, backbone: Backbone, vocab_size: int) -> None:
        if self.counts is not None:
            check_ids("counts", self.counts, vocab_size)

    def tables(self, vocab_size: int) -> tuple[int, ...]:
        return super().tables(vocab_size) if self.counts is None else (int(self._counts.sum()),)

    def rows_each(self, vocab_size: int) -> int:
        return vocab_size if self.buckets is None else self.buckets

    @property
    def lookups(self) -> int:
        return self.hashes if self.counts is None else int(self._counts.max())

    def unused(self) -> dict[str, str]:
        return {"seed": "without buckets nothing is hashed"} if self.buckets is None else {}

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        ids_BT1 = inputs.tokens[..., None]
        if self.counts is not None:
            first_V = np.cumsum(self._counts) - self._counts
            order_K = jnp.arange(self.lookups, dtype=jnp.int32)
            own_BTK = order_K < jnp.asarray(self._counts)[ids_BT1]
            return Addresses(ids=at_real(jnp.where(own_BTK, jnp.asarray(first_V)[ids_BT1] + order_K, -1), inputs))
        if self.buckets is None:
            return Addresses(ids=at_real(ids_BT1, inputs))
        table_H = jnp.arange(self.hashes, dtype=jnp.uint32)
        hashed = mix(ids_BT1.astype(jnp.uint32), table_H, self.seed) % jnp.uint32(self.buckets)
        return Addresses(ids=at_real(with_offsets(hashed.astype(jnp.int32), self.tables(vocab_size)), inputs))
