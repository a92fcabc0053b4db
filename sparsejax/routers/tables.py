"""Selectors that look a token's experts up, whatever the network thinks of it."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs, choice_major_pairs
from sparsejax.ops.hashing import balanced_table, clustered_table, mix
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits

AXES_OF_FILE = {"balanced": "[V] counts", "clustered": "[V, D] vectors", "distilled": "[V, E] counts"}
COUNTS = ("balanced", "distilled")


@dataclass(frozen=True, kw_only=True)
class Hash(ChoosesK):
    """k fixed experts for every vocabulary id (Hash Layers, arXiv:2106.04426).

    A token's experts never change with context, position or training. With weight=constant there is no router at all;
    with another weight the scores of the looked-up experts are used, as in DeepSeek-V4.

    The kinds: `random`, by a hash of the id; `bigram`, by one of the id and the id before it in the same document;
    `balanced`, so that experts get equal shares of the ids' counts (`data.corpus.token_counts` counts a corpus);
    `clustered`, so that ids with similar vectors share experts; `distilled`, the experts to which a trained router most
    often sent the id (`counts_by_expert` counts a trace), which of all routers that see the id alone agrees most with
    it (StableMoE, arXiv:2204.08396, second stage; its distilled router is a product of small embeddings). The last
    three are made from the file at `path`, which belongs to the tokenizer as the vocabulary does; ids that it lacks, or
    that were never counted by expert, are hashed."""

    k: int = 1
    kind: Literal["random", "balanced", "clustered", "distilled", "bigram"] = "random"
    path: Optional[str] = None  # .npy: [V] counts for balanced, [V, D] vectors for clustered, [V, E] for distilled
    seed: int = 42

    traits = Traits(needs=frozenset({"tokens"}), fixed=True)

    def __post_init__(self):
        super().__post_init__()
        if self.kind in AXES_OF_FILE:
            _values(self.kind, self.path)

    def check(self, num_experts: int) -> None:
        """Raises `ConfigError` when the file is about another number of experts."""
        counted = _values(self.kind, self.path).shape[1] if self.kind == "distilled" else num_experts
        if counted != num_experts:
            raise ConfigError("path", f"{self.path!r} counts {counted} experts; the router has {num_experts}")

    @property
    def fingerprint(self) -> Optional[str]:
        """The SHA-256 of the file that the table is made from, if it is."""
        if self.kind not in AXES_OF_FILE or self.path is None:
            return None
        return hashlib.sha256(Path(self.path).expanduser().read_bytes()).hexdigest()

    def unused(self) -> dict[str, str]:
        return {} if self.kind in AXES_OF_FILE else {"path": f"kind={self.kind} is made from no file"}

    def __call__(self, candidates: Candidates) -> Pairs:
        inputs, num_experts = candidates.inputs, candidates.scores.shape[-1]
        keys_GS = inputs.tokens.astype(jnp.uint32)
        if self.kind == "bigram":
            keys_GS = mix(keys_GS, (inputs.previous + 1).astype(jnp.uint32), self.seed)
        experts_GSK = _hashed(keys_GS, num_experts, self.k, self.seed)
        if self.kind in AXES_OF_FILE:
            table_VK = jnp.asarray(self.table(num_experts))
            found_GSK = table_VK.at[inputs.tokens].get(mode="fill", fill_value=-1)
            experts_GSK = jnp.where(found_GSK >= 0, found_GSK, experts_GSK)
        scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, scores_GSK, inputs.mask)

    def table(self, num_experts: int) -> np.ndarray:
        """Of the kinds that are made from a file, int32 `[V, K]`; −1 for ids that are to be hashed."""
        return _table(self.kind, self.path, num_experts, self.k, self.seed)


@functools.cache
def _table(kind: str, path: Optional[str], num_experts: int, k: int, seed: int) -> np.ndarray:
    values = _values(kind, path)
    if kind == "balanced":
        return balanced_table(values, num_experts, k)
    if kind == "distilled":
        most_VK = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return np.where(values.any(axis=1, keepdims=True), most_VK, -1).astype(np.int32)
    return clustered_table(values, num_experts, k, seed)


@functools.lru_cache(maxsize=4)
def _values(kind: str, path: Optional[str]) -> np.ndarray:
    """The array of the file; `ConfigError` if there is none such."""
    wanted = f"kind={kind} is made from a .npy file of {AXES_OF_FILE[kind]}"
    if path is None:
        raise ConfigError("path", f"none is given, but {wanted}")
    try:
        values = np.load(Path(path).expanduser())
    except OSError as error:
        raise ConfigError("path", f"{path!r} could not be read ({error.strerror or error}); {wanted}") from None
    except (ValueError, EOFError):
        raise ConfigError("path", f"{path!r} is no array; {wanted}") from None
    if not isinstance(values, np.ndarray) or values.ndim != (1 if kind == "balanced" else 2) or not values.size:
        shape = getattr(values, "shape", "of several arrays")
        raise ConfigError("path", f"{path!r} has the shape {shape}; {wanted}")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ConfigError("path", f"{path!r} holds what is no finite number; {wanted}")
    if kind in COUNTS and (values < 0).any():
        raise ConfigError("path", f"{path!r} has negative counts; {wanted}")
    return values


def counts_by_expert(tokens: np.ndarray, experts: np.ndarray, vocab_size: int, num_experts: int) -> np.ndarray:
    """How often each id went to each expert, int64 `[V, E]`: of a trace's `tokens` `[…]` and a layer's `experts`
    `[…, K]`, −1 in either standing for none."""
    tokens = np.broadcast_to(tokens[..., None], experts.shape)
    counted = (tokens >= 0) & (experts >= 0)
    places = tokens[counted].astype(np.int64) * num_experts + experts[counted]
    return np.bincount(places, minlength=vocab_size * num_experts).reshape(vocab_size, num_experts)


def _hashed(keys_GS: UInt32[Array, "G S"], num_experts: int, k: int, seed: int) -> Int[Array, "G S K"]:
    """The k experts whose hash with the key is largest: distinct, and each equally likely."""
    hashed_GSE = mix(keys_GS[..., None], jnp.arange(num_experts, dtype=jnp.uint32), seed)
    return jnp.argsort(hashed_GSE, axis=-1, descending=True)[..., :k]


@dataclass(frozen=True, kw_only=True)
class ByDomain(ChoosesK):
    """All tokens of a document go to the experts of its domain (DEMix, arXiv:2108.05036): domain mod E, and the k − 1
    that follow."""

    k: int = 1

    traits = Traits(needs=frozenset({"domains"}), fixed=True)

    def __call__(self, candidates: Candidates) -> Pairs:
        num_experts = candidates.scores.shape[-1]
        experts_GSK = (candidates.inputs.domains[..., None] + jnp.arange(self.k, dtype=jnp.int32)) % num_experts
        scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, scores_GSK, candidates.inputs.mask)


def draw(candidates: Candidates, lots_GS: UInt32[Array, "G S"], k: int, seed: int) -> Pairs:
    """k experts for every token by the hash of its lot."""
    experts_GSK = _hashed(lots_GS, candidates.scores.shape[-1], k, seed)
    scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
    return choice_major_pairs(experts_GSK, scores_GSK, candidates.inputs.mask)
