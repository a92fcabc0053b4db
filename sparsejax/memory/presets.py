"""Lookup layers by the names of their papers: each a setting of the axes, to be changed one axis at a time.

    from sparsejax.memory import presets

    config.model.memory.ngrams = presets.engram(blocks=("dense",))
    config.model.memory.ngrams.address.heads = 4

Sizes are those of a small model, not the papers'. Where a paper's part is not an entry of an axis, its docstring says
so."""

from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.memory.clusters import LatentBigrams
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import Add, Expert
from sparsejax.memory.contents import GateRow, KeyValues, PartialExpert, Vector
from sparsejax.memory.gates import GatedAdd, PerLayer
from sparsejax.memory.learned import ProductKeys, Softmax
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.memory.n_grams import NGrams
from sparsejax.memory.projections import GatedOutput, Project, UpProjection
from sparsejax.memory.token_ids import TokenId


def _with(overrides: dict[str, Any], **settings: Any) -> MemorySpec:
    return MemorySpec(**settings | overrides)


def token_id(**overrides: Any) -> MemorySpec:
    """A vector for every id in every layer, added (arXiv:2302.00003)."""
    return _with(overrides, address=TokenId(), content=Vector(), consume=Add())


def lsh(**overrides: Any) -> MemorySpec:
    """A vector by random hyperplanes, added (arXiv:2302.00003). The centring is not in the paper."""
    return _with(overrides, address=Hyperplanes(), content=Vector(), consume=Add())


def softmax(**overrides: Any) -> MemorySpec:
    """The vector with the highest probability, weighted with it (arXiv:2302.00003)."""
    return _with(overrides, address=Softmax(), content=Vector(), consume=Add())


def partial_experts(**overrides: Any) -> MemorySpec:
    """A narrow expert by token id, beside the feed-forward network (arXiv:2302.00003)."""
    return _with(overrides, address=TokenId(), content=PartialExpert(), consume=Expert(), place="parallel")


def engram(**overrides: Any) -> MemorySpec:
    """Bigrams and trigrams of 8 hashes each, side by side, gated and convolved (arXiv:2601.07372). The prime numbers of
    rows and the multipliers are the same in all layers; tables start at zero."""
    return _with(
        overrides,
        address=NGrams(orders=(2, 3), heads=8),
        content=Vector(size=32, join="concat"),
        consume=GatedAdd(kernel=4, dilation=3),
        place="before_attention",
    )


def per_layer_embedding(**overrides: Any) -> MemorySpec:
    """A narrow vector for every id in every layer, which multiplies a projection of the state (Gemma 3n), here of the
    normalised state."""
    return _with(overrides, address=TokenId(), content=Vector(size=32), consume=PerLayer(), place="after")


def product_key(**overrides: Any) -> MemorySpec:
    """Four heads' 32 best of keys² vectors (arXiv:1907.05242). The query's norm is not over the batch but over its
    features."""
    return _with(overrides, address=ProductKeys(norm_query=True), content=Vector(), consume=Add(), place="parallel")


def memory_plus(**overrides: Any) -> MemorySpec:
    """`product_key` with a gate at the output and one table for all layers (arXiv:2412.09764), and no norm of the
    query."""
    return _with(
        overrides, address=ProductKeys(), content=Vector(), consume=GatedOutput(), place="parallel", shared=True
    )


def peer(**overrides: Any) -> MemorySpec:
    """Eight heads' 16 best of keys² experts of one neuron each (arXiv:2407.04153). The query's norm is not over the
    batch but over its features."""
    keys = ProductKeys(heads=8, k=16, norm_query=True)
    return _with(overrides, address=keys, content=PartialExpert(rank=1), consume=Expert(), place="parallel")


def stem(**overrides: Any) -> MemorySpec:
    """A gated network whose up-projection is looked up by token id (arXiv:2601.10639). In the paper it is a layer's
    only one: give it to blocks of attention alone (`model.blocks.NAME = "attention"`). Tables start at zero."""
    return _with(overrides, address=TokenId(), content=GateRow(), consume=UpProjection(), place="after")


def over_encoding(**overrides: Any) -> MemorySpec:
    """Narrow vectors of hashed bigrams and trigrams, projected and added to the embedding (arXiv:2501.16975)."""
    return _with(
        overrides,
        address=NGrams(orders=(2, 3), heads=4),
        content=Vector(size=32, join="concat"),
        consume=Project(),
        place="embedding",
    )


def n_grammer(**overrides: Any) -> MemorySpec:
    """Vectors of 8 numbers by hashed bigrams of clusters of the embedding's parts (arXiv:2207.06366), projected and
    added, where the paper's replace a part of the embedding."""
    return _with(
        overrides, address=LatentBigrams(), content=Vector(size=8, join="concat"), consume=Project(), place="embedding"
    )


def l3(**overrides: Any) -> MemorySpec:
    """Keys and values of its own for every id, over which it attends (arXiv:2601.21461), the same number for all. With
    `address.counts` and `content.over = "token"` ids have as many as a file says."""
    return _with(overrides, address=TokenId(), content=KeyValues(), consume=Add(), place="parallel")


PRESETS: Mapping[str, Callable[..., MemorySpec]] = {
    preset.__name__: preset
    for preset in (
        token_id,
        lsh,
        softmax,
        partial_experts,
        engram,
        per_layer_embedding,
        product_key,
        memory_plus,
        peer,
        stem,
        over_encoding,
        n_grammer,
        l3,
    )
}
