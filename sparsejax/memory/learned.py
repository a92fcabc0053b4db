"""Addresses that are learned: rows with the best scores, which the task's gradient reaches through their weights."""

from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MemoryReport
from sparsejax.memory.address import Address, Addresses, Inputs, Variables, at_real, positive
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import normal, param
from sparsejax.ops.loads import MOST_BINS
from sparsejax.ops.losses import load_balance
from sparsejax.ops.product_key import product_key_top_k


@dataclass(frozen=True, kw_only=True)
class Softmax(Address):
    """The k entries with the highest softmax(h W), weighted with that probability or with its share among the k
    (arXiv:2302.00003). It forms a score for every entry: for many, there are product keys.

    `balance` is the coefficient of the loss that a router of experts would have, N/k Σ f · P over the entries
    (arXiv:2101.03961), without which few entries may get all lookups."""

    entries: int = 1024
    k: int = 1
    weight: Literal["probability", "share"] = "probability"
    balance: float = 0.0

    def __post_init__(self):
        positive(self, "entries", "k")
        if not 0 <= self.balance < float("inf"):
            raise ConfigError("balance", f"{self.balance} is not ≥ 0 and finite")
        if self.balance and self.entries > MOST_BINS:
            message = f"{self.balance} with entries={self.entries}: loads are counted row by row up to {MOST_BINS}"
            raise ConfigError("balance", f"{message}; allowed: 0")
        if self.k > self.entries:
            raise ConfigError("k", f"{self.k} of {self.entries} entries; allowed: 1 … {self.entries}")
        if self.k == 1 and self.weight == "share" and self.entries > 1:
            message = "the only entry's share is always 1, so scores would get no gradient"
            raise ConfigError("weight", f"{message}; with k=1 use probability")

    def tables(self, vocab_size: int) -> tuple[int, ...]:
        return (self.entries,)

    @property
    def lookups(self) -> int:
        return self.k

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Variable]:
        shape = (backbone.d_model, self.entries)
        return {"scores": param(normal(key, shape, backbone.d_model**-0.5), ("embed", None), "router")}

    def size(self, backbone: Backbone) -> tuple[int, int]:
        return backbone.d_model * self.entries, backbone.d_model * self.entries

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        logits_BTN = _projected("btd,dn->btn", inputs, variables["scores"])
        values_BTK, ids_BTK = jax.lax.top_k(logits_BTN, self.k)
        scores_BTN = values_BTK if self.weight == "share" else logits_BTN
        weights_BTK = jnp.exp(values_BTK - jax.nn.logsumexp(scores_BTN, axis=-1, keepdims=True))
        sums_N = None
        if self.balance:
            sums_N = jnp.where(inputs.real[..., None], jax.nn.softmax(logits_BTN, axis=-1), 0).sum((0, 1))
        return Addresses(ids=at_real(ids_BTK, inputs), weights=weights_BTK, probability_sum=sums_N)

    def balance_loss(self, report: MemoryReport, tokens: Int[Array, ""]) -> Optional[Float[Array, ""]]:
        if report.probability_sum is None:
            return None
        each = load_balance(report.loads, report.probability_sum, report.tokens, self.k)
        return self.balance * jnp.sum(each * report.tokens) / jnp.maximum(tokens, 1)


@dataclass(frozen=True, kw_only=True)
class ProductKeys(Address):
    """Row (i, j) of `keys` × `keys` scores q₁ · a_i + q₂ · b_j, q₁ and q₂ being the halves of a head's query of `width`
    numbers; every head takes the k best, found exactly without all keys² scores (Lample et al., arXiv:1907.05242, and
    Memory layers at scale, arXiv:2412.09764). With `norm_query` a head's query is divided by its root mean square and
    scaled feature by feature, where Lample et al. have a batch norm, which would tie the rows of a batch together.

    Weights are the softmax over a head's k scores, or, as PEER's experts that do not compete (arXiv:2407.04153), each
    score's ReLU. The heads share one table."""

    keys: int = 128
    heads: int = 4
    k: int = 32
    width: int = 128
    weight: Literal["softmax", "relu"] = "softmax"
    norm_query: bool = False

    def __post_init__(self):
        positive(self, "keys", "heads", "k", "width")
        if self.width % 2:
            raise ConfigError("width", f"{self.width} is odd; a query has two halves")
        if self.k > self.keys**2:
            raise ConfigError("k", f"{self.k} of {self.keys}² rows; allowed: 1 … {self.keys**2}")
        if self.k == 1 and self.weight == "softmax":
            message = "the only row's weight is always 1, so scores would get no gradient"
            raise ConfigError("weight", f"{message}; with k=1 use relu")

    def tables(self, vocab_size: int) -> tuple[int, ...]:
        return (self.keys**2,)

    @property
    def lookups(self) -> int:
        return self.heads * self.k

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Variable]:
        query_key, keys_key = jax.random.split(key)
        d_model, half = backbone.d_model, self.width // 2
        query = normal(query_key, (d_model, self.heads, self.width), d_model**-0.5)
        bound = self.width**-0.5
        sub_keys = jax.random.uniform(keys_key, (2, self.heads, self.keys, half), minval=-bound, maxval=bound)
        made: dict[str, nnx.Variable] = {
            "query": param(query, ("embed", None, None), "router"),
            "sub_keys": param(sub_keys, (None, None, None, None), "router"),
        }
        if self.norm_query:
            made["query_scale"] = param(jnp.ones((self.heads, self.width), jnp.float32), (None, None), "norm")
        return made

    def size(self, backbone: Backbone) -> tuple[int, int]:
        weights = self.heads * self.width * (backbone.d_model + self.keys)
        return weights + self.heads * self.width * self.norm_query, weights

    def __call__(self, inputs: Inputs, variables: Variables, vocab_size: int) -> Addresses:
        query_BTHq = _projected("btd,dhq->bthq", inputs, variables["query"])
        if self.norm_query:
            power = jnp.mean(jnp.square(query_BTHq), -1, keepdims=True)
            query_BTHq = query_BTHq * jax.lax.rsqrt(power + 1e-6) * variables["query_scale"]
        halves = query_BTHq.reshape(*query_BTHq.shape[:3], 2, -1)
        scores = jnp.einsum("bthsq,shnq->sbthn", halves, variables["sub_keys"], precision=jax.lax.Precision.HIGHEST)
        values_BTHk, ids_BTHk = product_key_top_k(scores[0], scores[1], self.k)
        weights_BTHk = jax.nn.softmax(values_BTHk, axis=-1) if self.weight == "softmax" else jax.nn.relu(values_BTHk)
        flat = (*ids_BTHk.shape[:2], self.lookups)
        return Addresses(ids=at_real(ids_BTHk.reshape(flat), inputs), weights=weights_BTHk.reshape(flat))


def _projected(equation: str, inputs: Inputs, weight: Array) -> Float[Array, "..."]:
    """In float32 at full precision: rows are told apart by small differences."""
    assert inputs.h is not None
    return jnp.einsum(equation, inputs.h.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
