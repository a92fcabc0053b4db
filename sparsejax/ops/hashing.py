"""Integer hashes, in uint32 arithmetic that wraps around on purpose, and tables of experts by vocabulary id.

Tables are made once, on the host: NumPy int32 `[V, K]`, K distinct experts for every id, the same every time."""

import heapq

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt


def mix(left: UInt[Array, "*A"], right: UInt[Array, "*B"], seed: int) -> UInt[Array, "*C"]:
    """A hash of two broadcast uint32 arrays: finalised multiply–xorshift rounds (the finaliser of MurmurHash3)."""
    hashed = _finalise(left ^ jnp.uint32(seed & 0xFFFFFFFF))
    return _finalise(hashed * jnp.uint32(0x9E3779B1) + right)


def chain(values: UInt[Array, "*A n"], seed: int) -> UInt[Array, "*A"]:
    """A hash of the list along the last axis, in order."""
    hashed = jnp.full(values.shape[:-1], seed, jnp.uint32)
    for i in range(values.shape[-1]):
        hashed = mix(hashed, values[..., i], i)
    return hashed


def uniform(left: UInt[Array, "*A"], right: UInt[Array, "*B"], seed: int) -> Float[Array, "*C"]:
    """Of U[0, 1), float32, from the hash of two arrays: the same wherever a mesh puts them."""
    return (mix(left, right, seed) >> 8).astype(jnp.float32) * 2**-24


def _finalise(value: UInt[Array, "*A"]) -> UInt[Array, "*A"]:
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)


def balanced_table(counts_V: np.ndarray, num_experts: int, k: int) -> np.ndarray:
    """Ids by descending count, each to the k experts with the least load so far (Hash Layers, arXiv:2106.04426).

    A load is the sum of counts; ties go to the expert with fewer ids, so that ids that never occur are spread, too, and
    then to the lower one."""
    table = np.empty((len(counts_V), k), np.int32)
    experts = [(0, 0, expert) for expert in range(num_experts)]  # a heap: (load, ids, expert)
    for token in np.argsort(-counts_V, kind="stable").tolist():
        least = [heapq.heappop(experts) for _ in range(k)]
        table[token] = [expert for _, _, expert in least]
        count = counts_V[token].item()
        for load, ids, expert in least:
            heapq.heappush(experts, (load + count, ids + 1, expert))
    return table


def clustered_table(vectors_VD: np.ndarray, num_experts: int, k: int, seed: int, rounds: int = 25) -> np.ndarray:
    """The k nearest of E centres, which k-means finds among the ids' vectors (Hash Layers, arXiv:2106.04426).

    Centres start as ids drawn in proportion to their squared distance to those drawn before (k-means++); one that loses
    all its ids stays where it is."""
    rng, vectors_VD = np.random.default_rng(seed), vectors_VD.astype(np.float64)
    centres_ED = vectors_VD[rng.integers(len(vectors_VD), size=1)]
    for _ in range(num_experts - 1):
        nearest_V = _square_distances(vectors_VD, centres_ED).min(axis=1)
        apart = nearest_V.sum()
        drawn = rng.choice(len(vectors_VD), p=nearest_V / apart if apart > 0 else None)
        centres_ED = np.concatenate([centres_ED, vectors_VD[[drawn]]])
    for _ in range(rounds):
        own_V = _square_distances(vectors_VD, centres_ED).argmin(axis=1)
        sizes_E = np.bincount(own_V, minlength=num_experts)
        sums_ED = np.zeros_like(centres_ED)
        np.add.at(sums_ED, own_V, vectors_VD)
        centres_ED = np.where(sizes_E[:, None] > 0, sums_ED / np.maximum(sizes_E, 1)[:, None], centres_ED)
    distances_VE = _square_distances(vectors_VD, centres_ED)
    return np.argsort(distances_VE, axis=1, kind="stable")[:, :k].astype(np.int32)


def _square_distances(vectors_VD: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    squares_VE = (vectors_VD**2).sum(-1)[:, None] - 2 * vectors_VD @ centres_ED.T + (centres_ED**2).sum(-1)
    return np.maximum(squares_VE, 0)
