"""The pre-norm Transformer block: attention, then a feed-forward part that may be anything conditional."""

import dataclasses
import functools
from typing import Optional, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.reports import MoEReport, NeuronReport, Report
from sparsejax.base.sharding import zeros_of
from sparsejax.blocks.context import BlockCache, BlockOutput, Context
from sparsejax.blocks.lookups import Lookups
from sparsejax.nn.attention import Attention, KVCache
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import RMSNorm


class FeedForward(Protocol):
    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], MoEReport | NeuronReport | None]: ...


def reported(found: MoEReport | NeuronReport | None) -> Report:
    """By a feed-forward part."""
    return Report(neurons=found) if isinstance(found, NeuronReport) else Report(moe=found)


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), unless there is none; with lookup layers before, between,
    beside and after."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, feed_forward: Optional[FeedForward]):
        self.attention_norm = RMSNorm(backbone.d_model, backbone.norm_epsilon)
        self.attention = Attention(key, backbone)
        norm = RMSNorm(backbone.d_model, backbone.norm_epsilon)
        self.feed_forward_norm = None if feed_forward is None else norm
        self.feed_forward = feed_forward
        self.memories = nnx.Dict()

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, cache: Optional[BlockCache] = None
    ) -> BlockOutput:
        if context.active is not None and cache is not None and cache.attention is not None and not self.memories:
            return self._for_active(x_BTD, context, cache.attention)
        batch, lookups = context.batch, Lookups(self.memories, context, cache)
        x_BTD = lookups.at("before_attention", x_BTD)
        with jax.named_scope("attention"):
            keys = None if cache is None else cache.attention
            where = (batch.positions, batch.segments, keys, batch.places, context.seen)
            attended, keys = self.attention(self.attention_norm(x_BTD), *where)
            x_BTD = x_BTD + attended
        x_BTD = lookups.at("before_feed_forward", x_BTD)
        found = None
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            with jax.named_scope("feed_forward"):
                h_BTD = self.feed_forward_norm(x_BTD)
                y_BTD, found = self.feed_forward(h_BTD, context)
            x_BTD = lookups.at("parallel", x_BTD, h_BTD) + y_BTD
        x_BTD = lookups.at("after", x_BTD)
        return BlockOutput(
            x=x_BTD,
            report=dataclasses.replace(reported(found), memory=lookups.reports),
            cache=None if keys is None else BlockCache(attention=keys, memory=lookups.caches),
            reads=lookups.reads,
            aside=lookups.aside,
        )

    def _for_active(self, x_BTD: Float[Array, "B T D"], context: Context, cache: KVCache) -> BlockOutput:
        """The block where only some rows want it: where none does, all that is done are keys and values, if those of
        skipped layers are remembered. Caches stay outside of the branches, which would copy them."""
        batch, active_B = context.batch, context.active
        assert active_B is not None
        any_active, where = active_B.any(), (batch.positions, batch.segments)
        keys = lambda x_BTD: self.attention.keys(self.attention_norm(x_BTD), batch.positions)  # noqa: E731
        if context.skipped_keys:
            k, v = keys(x_BTD)
            seen_BT = batch.segments
        else:
            k, v = jax.lax.cond(any_active, keys, functools.partial(zeros_of, keys), x_BTD)
            seen_BT = jnp.where(active_B[:, None], batch.segments, 0)
        cache = self.attention.remember(k, v, batch.positions, seen_BT, cache, batch.places)

        rest = lambda x_BTD: self.onwards(x_BTD, *where, cache, batch.places, context)  # noqa: E731
        x_BTD = jax.lax.cond(any_active, rest, lambda x_BTD: x_BTD, x_BTD)
        return BlockOutput(x=x_BTD, report=Report(), cache=BlockCache(attention=cache))

    def onwards(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_BS: Int[Array, "B S"],
        segments_BS: Int[Array, "B S"],
        cache: KVCache,
        places_BS: Optional[Int[Array, "B S"]],
        context: Context,
    ) -> Float[Array, "B S D"]:
        """The block on tokens of rows whose keys and values are all remembered already."""
        where = positions_BS, segments_BS, cache, places_BS
        x_BSD = x_BSD + self.attention.recall(self.attention_norm(x_BSD), *where)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x_BSD
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD), context)[0]
