"""The rows of a token are those of the n-grams that end with it."""

from dataclasses import dataclass
from typing import Optional

import jax.numpy as jnp

from sparsejax.base.errors import ConfigError
from sparsejax.memory.address import Address, Addresses, Inputs, Variables, at_real, positive, with_offsets
from sparsejax.memory.id_files import check_ids, numbers_of_ids
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.ngrams import multiplicative_hash, ngrams, odd_multipliers, primes_from


@dataclass(frozen=True, kw_only=True)
class NGrams(Address):
    """Hashed n-grams of the orders given, each looked up in `heads` tables of about `buckets` rows (Engram,
    arXiv:2601.07372; Over-Encoding, arXiv:2501.16975). Every table has a prime number of rows of its own, the first
    from `buckets` on.

    N-grams do not reach beyond their document: what would lie there counts as a token of no id. With `canonical`, a
    file of one id for each id of the vocabulary, ids that mean nearly the same are one (Engram's token compression)."""

    orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    buckets: int = 65_536
    canonical: Optional[str] = None  # .npy, [V] integers
    seed: int = 0

    known_at = "input"

    def __post_init__(self):
        positive(self, "heads", "buckets")
        if not self.orders or min(self.orders) < 1 or list(self.orders) != sorted(set(self.orders)):
            raise ConfigError("orders", f"{self.orders} are not ascending lengths; allowed: (2, 3) or the like")
        if self.canonical is not None:
            numbers_of_ids("canonical", self.canonical)

    def tables(self, vocab_size: int) -> tuple[int, ...]:
        return primes_from(self.buckets, self.lookups)

    @property
    def lookups(self) -> int:
        return len(self.orders) * self.heads

    @property
    def window(self) -> Optional[tuple[int, ...]]:
        return (max(self.orders) - 1,) if max(self.orders) > 1 else None

    def check(self, backbone: Backbone, vocab_size: int) -> None:
        if self.canonical is not None:
            check_ids("canonical", self.canonical, vocab_size)

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        tokens_BT = inputs.tokens
        if self.canonical is not None:
            tokens_BT = jnp.asarray(numbers_of_ids("canonical", self.canonical))[tokens_BT]
        longest, primes = max(self.orders), self.tables(vocab_size)
        ngrams_BTN = ngrams(tokens_BT, inputs.segments, longest, inputs.window)
        multipliers_N = odd_multipliers(longest, self.seed)
        hashed = [
            multiplicative_hash(ngrams_BTN[..., :order], multipliers_N, primes[i * self.heads : (i + 1) * self.heads])
            for i, order in enumerate(self.orders)
        ]
        ids = with_offsets(jnp.concatenate(hashed, axis=-1), primes)
        return Addresses(ids=at_real(ids, inputs), recent=tokens_BT + 1)
