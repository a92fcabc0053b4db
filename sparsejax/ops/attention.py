"""Rotary positions, soft-capped logits and masked attention, as functions of one device's heads and rows."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rope(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al., arXiv:2104.09864), pairing feature i with i + H/2; computed in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTNH.dtype)


def soft_capped(x: Float[Array, "..."], cap: Optional[float]) -> Float[Array, "..."]:
    """cap · tanh(x / cap); None leaves `x` alone (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible(
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], q_order: Optional[Int[Array, "B T"]]
) -> Bool[Array, "B 1 T S"]:
    """A query sees the keys of its own segment that stand no later than it does; keys stand at 0, 1, …, S − 1. Without
    an order it sees them all."""
    same = q_segments[:, :, None] == k_segments[:, None, :]
    if q_order is None:
        return same[:, None]
    past = jnp.arange(k_segments.shape[1])[None, None, :] <= q_order[:, :, None]
    return (same & past)[:, None]


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_order: Optional[Int[Array, "B T"]],
    soft_cap: Optional[float] = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention in XLA. Query head n reads key head n // (N / M); softmax in float32."""
    return masked_attention(q_BTNH, k_BSMH, v_BSMH, visible(q_segments, k_segments, q_order), soft_cap)


def masked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    mask: Bool[Array, "B 1 T S"],
    soft_cap: Optional[float] = None,
) -> Float[Array, "B T N H"]:
    """The same among the pairs of a mask; of a query with no key the output is finite, and nothing else."""
    if soft_cap is None:
        return jax.nn.dot_product_attention(q_BTNH, k_BSMH, v_BSMH, mask=mask, implementation="xla")
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSMH.shape[2]
    q_BTMgH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btmgh,bsmh->bmgts", q_BTMgH, k_BSMH, preferred_element_type=jnp.float32) / width**0.5
    logits = jnp.where(mask[:, :, None], soft_capped(logits, soft_cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSMH.dtype)
    return jnp.einsum("bmgts,bsmh->btmgh", weights, v_BSMH).reshape(q_BTNH.shape)


def attention_to_some(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_order: Optional[Int[Array, "B T"]],
    soft_cap: Optional[float] = None,
) -> Float[Array, "B T N H"]:
    """`xla_attention` to keys of which a query may see none: it then gets zeros."""
    mask = visible(q_segments, k_segments, q_order)
    attended = masked_attention(q_BTNH, k_BSMH, v_BSMH, mask, soft_cap)
    return jnp.where(mask.any(-1)[:, 0, :, None, None], attended, 0)


def local_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segments_BT: Int[Array, "B T"],
    radius: int,
    causal: bool,
    soft_cap: Optional[float] = None,
    blocked: bool = True,
) -> Float[Array, "B T N H"]:
    """Of every token to those of its document at most `radius` places away. In blocks of that many tokens, each with
    the keys of the blocks beside it, where this is less work than all pairs of the row, or if not `blocked` among all
    pairs."""
    batch, length = segments_BT.shape
    keys = keys_nearby(length, radius, causal)
    if not blocked or keys == length:
        order_T = jnp.arange(length)
        mask = visible(segments_BT, segments_BT, None) & _near(order_T, order_T, radius, causal)
        return masked_attention(q_BTNH, k_BTMH, v_BTMH, mask, soft_cap)
    count = -(-length // radius)
    rest = count * radius - length

    def blocks(array: Array, before: int, after: int, fill: int = 0) -> Array:
        """Each block with so many before and after it."""
        ends = (before * radius, rest + after * radius)
        padded = jnp.pad(array, ((0, 0), ends, *[(0, 0)] * (array.ndim - 2)), constant_values=fill)
        parts = [padded[:, n * radius : (n + count) * radius] for n in range(before + 1 + after)]
        parts = [part.reshape(batch * count, radius, *array.shape[2:]) for part in parts]
        return jnp.concatenate(parts, axis=1)

    own, beside = (0, 0), (1, 0 if causal else 1)
    mask = visible(blocks(segments_BT, *own, -1), blocks(segments_BT, *beside, -1), None)
    mask = mask & _near(jnp.arange(radius), jnp.arange(keys) - radius, radius, causal)
    k, v = blocks(k_BTMH, *beside), blocks(v_BTMH, *beside)
    attended = masked_attention(blocks(q_BTNH, *own), k, v, mask, soft_cap)
    return attended.reshape(batch, count * radius, *q_BTNH.shape[2:])[:, :length]


def keys_nearby(length: int, radius: int, causal: bool) -> int:
    """Keys for which `local_attention` computes the logits of a token, seen or not."""
    return min((2 if causal else 3) * radius, length)


def _near(q_order: Int[Array, " T"], k_order: Int[Array, " S"], radius: int, causal: bool) -> Bool[Array, "T S"]:
    ahead_TS = k_order[None, :] - q_order[:, None]
    return (ahead_TS >= -radius) & (ahead_TS <= (0 if causal else radius))


SPLASH_BLOCK = 128
"""The flash kernel works on blocks of this many tokens; a row must be a multiple of it."""


BIDIRECTIONAL = "bidirectional"
"""The scope of a kernel call whose mask is not causal: nothing else in a compiled program tells."""


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segments_BT: Int[Array, "B T"],
    soft_cap: Optional[float] = None,
    causal: bool = True,
    interpret: bool = False,
    k_segments: Optional[Int[Array, "B T"]] = None,
) -> Float[Array, "B T N H"]:
    """The same over a whole row by JAX's Pallas flash kernel for TPU: no T × T array. `interpret` runs it anywhere,
    slowly."""
    # The kernel module is heavy and only a TPU (or its compiler) needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q_BTNH.shape[1:]
    mask = masks.CausalMask if causal else masks.FullMask
    every_head = masks.MultiHeadMask([mask((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha(
        every_head, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=soft_cap, interpret=interpret
    )

    def one_row(q_NTH, k_MTH, v_MTH, segments_T, of_keys_T):
        return kernel(q_NTH, k_MTH, v_MTH, segment_ids=splash.SegmentIds(q=segments_T, kv=of_keys_T))

    q_BNTH = q_BTNH.transpose(0, 2, 1, 3) / width**0.5
    k_BMTH, v_BMTH = k_BTMH.transpose(0, 2, 1, 3), v_BTMH.transpose(0, 2, 1, 3)
    with jax.named_scope("causal" if causal else BIDIRECTIONAL):
        of_keys_BT = segments_BT if k_segments is None else k_segments
        attended_BNTH = jnp.asarray(jax.vmap(one_row)(q_BNTH, k_BMTH, v_BMTH, segments_BT, of_keys_BT))
    return attended_BNTH.transpose(0, 2, 1, 3)
