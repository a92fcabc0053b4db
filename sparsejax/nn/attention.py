"""Grouped-query self-attention with rotary positions and an optional key/value cache."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES, mesh_platform, on_each_device, sum_over
from sparsejax.base.structs import struct
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear, RMSNorm
from sparsejax.nn.mlp import residual_scale
from sparsejax.ops.attention import (
    SPLASH_BLOCK,
    attention_to_some,
    local_attention,
    rope,
    splash_attention,
    xla_attention,
)
from sparsejax.ops.skim import attention_among

HEADS_SPEC = P(BATCH_AXES, None, "tensor", None)
ROWS_SPEC = P(BATCH_AXES, None)


@struct
class KVCache:
    """Keys and values of the positions seen so far; `segments` is 0 where nothing has been written."""

    k: Float[Array, "*R B S M H"]
    v: Float[Array, "*R B S M H"]
    segments: Int[Array, "*R B S"]


CACHE_SPECS: Any = KVCache(k=HEADS_SPEC, v=HEADS_SPEC, segments=ROWS_SPEC)  # type: ignore[arg-type]
"""Specs in the places of arrays."""


class Attention(nnx.Module):
    """Causal within a document, or over the whole of it; `seen` are the keys' segments, where they are not those of
    the queries. With a cache, `places` (or else `positions`) say where the new keys go, and queries see all that is
    written."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone):
        d, n, m, h, dtype = (
            backbone.d_model,
            backbone.num_heads,
            backbone.kv_heads,
            backbone.width_of_head,
            backbone.dtype,
        )
        keys = jax.random.split(key, 4)
        into = {"stddev": d**-0.5, "out_spec": HEADS_SPEC, "dtype": dtype}
        self.q = Linear(keys[0], "btd,dnh->btnh", (d, n, h), ("embed", "heads", None), **into)
        self.k = Linear(keys[1], "btd,dmh->btmh", (d, m, h), ("embed", "kv_heads", None), **into)
        self.v = Linear(keys[2], "btd,dmh->btmh", (d, m, h), ("embed", "kv_heads", None), **into)
        stddev = residual_scale(backbone) * (n * h) ** -0.5
        out = {"stddev": stddev, "out_spec": P(BATCH_AXES, None, None), "dtype": dtype}
        self.out = Linear(keys[3], "btnh,nhd->btd", (n, h, d), ("heads", None, "embed"), **out)
        self.q_norm = RMSNorm(h, backbone.norm_epsilon) if backbone.qk_norm else None
        self.k_norm = RMSNorm(h, backbone.norm_epsilon) if backbone.qk_norm else None
        self.rope_theta, self.soft_cap, self.kind = backbone.rope_theta, backbone.attention_soft_cap, backbone.attention
        self.causal = backbone.causal

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: Optional[KVCache],
        places_BT: Optional[Int[Array, "B T"]] = None,
        seen_BT: Optional[Int[Array, "B T"]] = None,
    ) -> tuple[Float[Array, "B T D"], Optional[KVCache]]:
        if cache is not None:
            cache = self.remember(*self.keys(x_BTD, positions_BT), positions_BT, segments_BT, cache, places_BT)
            return self.recall(x_BTD, positions_BT, segments_BT, cache, places_BT), cache
        q, (k, v) = self._queries(x_BTD, positions_BT), self.keys(x_BTD, positions_BT)
        seen_BT = segments_BT if seen_BT is None else seen_BT
        return self.out(checkpoint_name(self._over_row(q, k, v, segments_BT, seen_BT), "attention")), None

    def keys(self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
        """Keys and values `[B, T, M, H]`."""
        k, v = self.k(x_BTD), self.v(x_BTD)
        k = k if self.k_norm is None else self.k_norm(k)
        return rope(k, positions_BT, self.rope_theta), v

    def remember(
        self,
        k_BTMH: Float[Array, "B T M H"],
        v_BTMH: Float[Array, "B T M H"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: KVCache,
        places_BT: Optional[Int[Array, "B T"]] = None,
    ) -> KVCache:
        """The cache with these keys and values in their places."""

        def local(k, v, places, segments, cache):
            row_B1 = jnp.arange(k.shape[0])[:, None]
            put = lambda store, new: store.at[row_B1, places].set(new.astype(store.dtype), mode="drop")  # noqa: E731
            return KVCache(k=put(cache.k, k), v=put(cache.v, v), segments=put(cache.segments, segments))

        specs: Any = (HEADS_SPEC, HEADS_SPEC, ROWS_SPEC, ROWS_SPEC, CACHE_SPECS)
        run = jax.shard_map(local, in_specs=specs, out_specs=CACHE_SPECS, check_vma=False)
        return run(k_BTMH, v_BTMH, positions_BT if places_BT is None else places_BT, segments_BT, cache)

    def recall(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: KVCache,
        places_BT: Optional[Int[Array, "B T"]] = None,
    ) -> Float[Array, "B T D"]:
        """What tokens find in a cache that holds them already."""

        def local(q, places, segments, cache):
            order = places if self.causal else None
            found = xla_attention(q, cache.k, cache.v, segments, cache.segments, order, self.soft_cap)
            return found.astype(q.dtype)

        specs: Any = (HEADS_SPEC, ROWS_SPEC, ROWS_SPEC, CACHE_SPECS)
        run = jax.shard_map(local, in_specs=specs, out_specs=HEADS_SPEC, check_vma=False)
        places_BT = positions_BT if places_BT is None else places_BT
        attended = run(self._queries(x_BTD, positions_BT), places_BT, segments_BT, cache)
        return self.out(checkpoint_name(attended, "attention"))

    def _queries(self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        q = self.q(x_BTD)
        q = q if self.q_norm is None else self.q_norm(q)
        return rope(q, positions_BT, self.rope_theta)

    def among(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        keep_BT: Float[Array, "B T"],
        learned: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T H"]]:
        """(output, what each key receives, its own part of that, the key), means over heads:
        `ops.skim.attention_among`."""

        def local(q, k, v, segments, keep):
            out, *scores = attention_among(q, k, v, segments, keep, self.soft_cap, learned)
            return out, *sum_over(scores, "tensor")

        q, (k, v) = self._queries(x_BTD, positions_BT), self.keys(x_BTD, positions_BT)
        specs = (HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, ROWS_SPEC, ROWS_SPEC)
        run = on_each_device(local, specs, (HEADS_SPEC, ROWS_SPEC, ROWS_SPEC, P(BATCH_AXES)))
        attended, received_BT, own_BT, keys_BTH = run(q, k, v, segments_BT, keep_BT)
        heads, kv_heads = q.shape[2], k.shape[2]
        attended_BTD = self.out(checkpoint_name(attended, "attention"))
        return attended_BTD, received_BT / heads, own_BT / heads, keys_BTH / kv_heads

    def nearby(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        radius: int,
        blocked: bool = True,
    ) -> Float[Array, "B T D"]:
        """To tokens at most `radius` places away: `ops.attention.local_attention`."""

        def local(q, k, v, segments):
            return (local_attention(q, k, v, segments, radius, self.causal, self.soft_cap, blocked),)

        q, (k, v) = self._queries(x_BTD, positions_BT), self.keys(x_BTD, positions_BT)
        run = on_each_device(local, (HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, ROWS_SPEC), (HEADS_SPEC,))
        return self.out(checkpoint_name(run(q, k, v, segments_BT)[0], "attention"))

    def to_some(
        self,
        x_BKD: Float[Array, "B K D"],
        positions_BK: Int[Array, "B K"],
        segments_BK: Int[Array, "B K"],
        keys_BSD: Float[Array, "B S D"],
        key_positions_BS: Int[Array, "B S"],
        key_segments_BS: Int[Array, "B S"],
        order_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K D"]:
        """Of some tokens to some others. A causal query sees the keys up to place `order` of theirs."""

        def local(q, k, v, q_segments, k_segments, order):
            order = order if self.causal else None
            return (attention_to_some(q, k, v, q_segments, k_segments, order, self.soft_cap),)

        q, (k, v) = self._queries(x_BKD, positions_BK), self.keys(keys_BSD, key_positions_BS)
        specs = (HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, ROWS_SPEC, ROWS_SPEC, ROWS_SPEC)
        run = on_each_device(local, specs, (HEADS_SPEC,))
        attended = run(q, k, v, segments_BK, key_segments_BS, order_BK)[0]
        return self.out(checkpoint_name(attended, "attention"))

    def _over_row(self, q_BTNH, k_BTMH, v_BTMH, segments_BT, seen_BT):
        """Attention inside the rows of a batch; a device holds whole rows and whole heads, so nothing is exchanged."""
        fits = mesh_platform() == "tpu" and q_BTNH.shape[1] % SPLASH_BLOCK == 0
        use_splash = self.kind == "splash" or (self.kind == "auto" and fits)

        def local(q, k, v, segments, seen):
            if use_splash:
                return splash_attention(q, k, v, segments, self.soft_cap, self.causal, k_segments=seen)
            order = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segments.shape) if self.causal else None
            return xla_attention(q, k, v, segments, seen, order, self.soft_cap)

        # Pallas calls carry no varying-axes types, hence check_vma; nothing here is replicated, so nothing to check.
        specs = (HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, ROWS_SPEC, ROWS_SPEC)
        return jax.shard_map(local, in_specs=specs, out_specs=HEADS_SPEC, check_vma=False)(
            q_BTNH, k_BTMH, v_BTMH, segments_BT, seen_BT
        )
