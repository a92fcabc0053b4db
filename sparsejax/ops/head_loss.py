"""The losses of an output head, piece by piece: the logits of a whole batch, the largest array of a step, are never
there.

Each piece is differentiated at once, when its logits are known; so none is computed twice, and what is left for the
backward pass are the gradients of the head and of what it read."""

import functools
import math
from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import BATCH_AXES, on_each_device, split_axes, sum_over, vary_like, whole
from sparsejax.base.structs import struct
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.losses import cross_entropies, hits, kls, symmetric_kls

AT_ONCE = 2**26
"""Logits that a device holds of one pass: 256 MiB."""

Passes = tuple[Float[Array, "B T D"], ...]
Weights = tuple[Array, ...]


@struct
class HeadLosses:
    """`total`, Σ over targets of all that a pass loses and of `consistency` times their divergence, has a gradient; the
    others have none: `nll`, by pass, 0 where masked, and Σ ½ (KL(p₁‖p₂) + KL(p₂‖p₁)), 0 with one pass. Nats.
    `correct` are the targets that each pass finds likeliest.

    With a `Weighting`, `total` is Σ over passes of hard · nll + soft · KL(p_last ‖ p), and `divergence` the part of it
    with KL. With `shares`, `total` is Σ over passes and targets of share · nll, without gradient of the shares."""

    total: Float[Array, ""]
    nll: tuple[Float[Array, "B T"], ...]
    divergence: Float[Array, ""]
    correct: Int[Array, " P"]


@struct
class Weighting:
    """Of what each pass loses, and of how far it is from the last one, which learns nothing from that."""

    hard: Float[Array, " P"]
    soft: Float[Array, " P"]


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """How logits come about, and what is lost with them."""

    equation: str  # of features and weight, such as 'nd,dv->nv'
    dtype: str  # of both; products are float32
    soft_cap: Optional[float] = None
    consistency: Optional[float] = None  # weight of the divergence of two passes; None: they are not compared
    distill: bool = False  # whether any pass has a `Weighting.soft`
    heads: tuple[int, ...] = ()  # which of several weights each pass is multiplied with; (): the first

    @property
    def vocabulary(self) -> int:
        """The weight's axis."""
        return self.equation.split("->")[0].split(",")[1].index("v")


def head_losses(
    kind: HeadKind,
    passes: Passes,
    stored: Float[Array, "_ _"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    weighting: Optional[Weighting] = None,
    others: tuple[Float[Array, "_ _"], ...] = (),
    shares: tuple[Float[Array, "B T"], ...] = (),
) -> HeadLosses:
    """Of what forward passes hand to the head: one, two that are compared, those of several exits with their
    `weighting`, or of several steps with the `shares` that each token has in them. The `stored` weight, split as it may
    be, is gathered once, and the gradient scattered once; exits may have `others` of the same shape
    (`HeadKind.heads`)."""
    given = (stored, *others), targets_BT, mask_BT, weighting, shares
    found: Any = _losses(kind, split_axes(stored), passes, *given)
    return HeadLosses(total=found[0], nll=found[1], divergence=found[2], correct=found[3])


def pieces(tokens: int, vocab: int) -> int:
    """The least number of equal pieces of a device's tokens with at most `AT_ONCE` logits. Where that would be more
    than four times as many as are needed, as with a prime number of tokens, fewer and larger ones."""
    fewest = min(tokens, math.ceil(tokens * vocab / AT_ONCE))
    enough = next(number for number in range(fewest, tokens + 1) if tokens % number == 0)
    return enough if enough <= 4 * fewest else next(n for n in range(fewest, 0, -1) if tokens % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(
    kind: HeadKind, spec: P, passes: Passes, stored: Weights, targets_BT: Array, mask_BT: Array, weighting, shares
):
    def local(passes, stored, targets_BT, mask_BT, weighting, shares):
        w = _gathered(kind, spec, stored, passes[0])
        one = lambda _, piece: (None, _of_piece(kind, spec, piece[0], w, weighting, *piece[1:])[1])  # noqa: E731
        _, found = jax.lax.scan(one, None, _split(kind, (passes, targets_BT, mask_BT, shares), w, weighting))
        return _told(kind, found, targets_BT, weighting, shares)

    given = passes, stored, targets_BT, mask_BT, weighting, shares
    return on_each_device(local, _specs(spec), (P(), P(BATCH_AXES), P(), P()))(*given)


def _losses_fwd(
    kind: HeadKind, spec: P, passes: Passes, stored: Weights, targets_BT: Array, mask_BT: Array, weighting, shares
):
    def local(passes, stored, targets_BT, mask_BT, weighting, shares):
        w, scatter = jax.vjp(lambda stored: _gathered(kind, spec, stored, passes[0]), stored)

        def one(dw, piece):
            passes, *others = piece
            lost = lambda passes, w: _of_piece(kind, spec, passes, w, weighting, *others)  # noqa: E731
            (dpasses, more), found = jax.grad(lost, argnums=(0, 1), has_aux=True)(passes, w)
            return jax.tree.map(lambda dw, more: dw + more.astype(jnp.float32), dw, more), (found, dpasses)

        zeros = tuple(vary_like(jnp.zeros(each.shape, jnp.float32), each) for each in w)
        dw, (found, dpasses) = jax.lax.scan(
            one, zeros, _split(kind, (passes, targets_BT, mask_BT, shares), w, weighting)
        )
        dpasses = tuple(d.reshape(x.shape) for d, x in zip(dpasses, passes, strict=True))
        told = _told(kind, found, targets_BT, weighting, shares)
        return *told, dpasses, *scatter(tuple(d.astype(each.dtype) for d, each in zip(dw, w, strict=True)))

    out_specs = P(), P(BATCH_AXES), P(), P(), P(BATCH_AXES), jax.typeof(stored[0]).sharding.spec
    given = passes, stored, targets_BT, mask_BT, weighting, shares
    *told, dpasses, dstored = on_each_device(local, _specs(spec), out_specs)(*given)
    return tuple(told), (dpasses, dstored)


def _losses_bwd(kind: HeadKind, spec: P, residuals, cotangents):
    of_total, *_ = cotangents
    times = lambda grad: (grad.astype(jnp.float32) * of_total).astype(grad.dtype)  # noqa: E731
    return *jax.tree.map(times, residuals), None, None, None, None


_losses.defvjp(_losses_fwd, _losses_bwd)


def _specs(spec: P) -> tuple[P, ...]:
    return P(BATCH_AXES), spec, P(BATCH_AXES), P(BATCH_AXES), P(), P(BATCH_AXES)


def _gathered(kind: HeadKind, spec: P, stored: Weights, like: Array) -> Weights:
    return tuple(whole(each.astype(kind.dtype), spec, like) for each in stored)  # half the bytes travel in bfloat16


def _split(kind: HeadKind, arrays, w: Weights, weighting: Optional[Weighting]):
    """`[B, T, …]` → `[pieces, tokens of one, …]`."""
    passes, targets_BT, _, shares = arrays
    tokens, vocab = targets_BT.size, w[0].shape[kind.vocabulary]
    at_once = len(passes) if shares or weighting is not None else 1  # there may be many exits, or steps
    number = pieces(tokens, vocab * at_once)
    return jax.tree.map(lambda array: array.reshape(number, tokens // number, *array.shape[2:]), arrays)


def _of_piece(
    kind: HeadKind, spec: P, passes, w: Weights, weighting: Optional[Weighting], targets_N: Array, mask_N, shares
):
    """(what is differentiated, (nll by pass, divergence, correct))."""
    split = "tensor" if "tensor" in spec else None
    product = functools.partial(jnp.einsum, kind.equation, preferred_element_type=jnp.float32)
    heads = kind.heads or (0,) * len(passes)
    pairs = zip(passes, heads, strict=True)
    logits = [soft_capped(product(x_ND.astype(kind.dtype), w[head]), kind.soft_cap) for x_ND, head in pairs]
    nll = tuple(cross_entropies(each, targets_N, mask_N, split) for each in logits)
    divergence = jnp.zeros_like(nll[0]).sum()
    if weighting is not None and kind.distill:
        last = jax.lax.stop_gradient(logits[-1])
        far = [kls(last, each, mask_N, split).sum() for each in logits[:-1]]
        divergence = sum(weighting.soft[i] * each for i, each in enumerate(far))
    elif kind.consistency is not None:
        divergence = symmetric_kls(*logits, mask_N, split).sum()
    weight = 1.0 if weighting is not None else kind.consistency or 0.0
    found = [hits(jax.lax.stop_gradient(each), targets_N, mask_N, split) for each in logits]
    correct = jnp.stack([each.sum(dtype=jnp.int32) for each in found])
    return _lost(nll, weighting, shares) + weight * divergence, (nll, divergence, correct)


def _lost(nll: Weights, weighting: Optional[Weighting], shares: Weights) -> Array:
    sums = [each.sum() for each in nll]
    if shares:
        sums = [jnp.sum(share * each) for share, each in zip(shares, nll, strict=True)]
    weighted = [each if weighting is None else weighting.hard[i] * each for i, each in enumerate(sums)]
    return sum(weighted[1:], weighted[0])


def _told(kind: HeadKind, found, targets_BT: Array, weighting: Optional[Weighting], shares: Weights):
    """(total, nll by pass `[B, T]`, divergence, correct), summed over devices."""
    nll, divergence, correct = found
    nll = tuple(each.reshape(targets_BT.shape) for each in nll)
    sums = _lost(nll, weighting, shares), divergence.sum(), correct.sum(0)
    lost, divergence, correct = sum_over(sums, BATCH_AXES)
    weight = 1.0 if weighting is not None else kind.consistency or 0.0
    return lost + weight * divergence, nll, divergence, correct
