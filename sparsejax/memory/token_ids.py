"""The row of a token is that of its id."""

from dataclasses import dataclass
from typing import Optional

import jax.numpy as jnp

from sparsejax.base.errors import ConfigError
from sparsejax.memory.address import Address, Addresses, Inputs, Variables, at_real, positive, with_offsets
from sparsejax.ops.hashing import mix


@dataclass(frozen=True, kw_only=True)
class TokenId(Address):
    """A row for every vocabulary id (Alternating updates and its sparse companion, arXiv:2302.00003), or, with
    `buckets`, one in each of `hashes` tables of so many rows, by a hash of the id (hash embeddings, arXiv:1709.03933).
    """

    buckets: Optional[int] = None  # None: as many as the vocabulary has ids, and no hash
    hashes: int = 1
    seed: int = 0

    known_at = "input"

    def __post_init__(self):
        positive(self, "hashes")
        if self.buckets is not None:
            positive(self, "buckets")
        elif self.hashes > 1:
            raise ConfigError("hashes", f"{self.hashes} hashes of an id that has a row of its own; set buckets, or 1")

    def rows_each(self, vocab_size: int) -> int:
        return vocab_size if self.buckets is None else self.buckets

    @property
    def lookups(self) -> int:
        return self.hashes

    def unused(self) -> dict[str, str]:
        return {"seed": "without buckets nothing is hashed"} if self.buckets is None else {}

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        ids_BT1 = inputs.tokens[..., None]
        if self.buckets is None:
            return Addresses(ids=at_real(ids_BT1, inputs))
        table_H = jnp.arange(self.hashes, dtype=jnp.uint32)
        hashed = mix(ids_BT1.astype(jnp.uint32), table_H, self.seed) % jnp.uint32(self.buckets)
        return Addresses(ids=at_real(with_offsets(hashed.astype(jnp.int32), self.tables(vocab_size)), inputs))
