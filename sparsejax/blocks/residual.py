"""The pre-norm Transformer block: attention, then a feed-forward part that may be anything conditional."""

from typing import Optional, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.reports import MoEReport, Report
from sparsejax.blocks.context import BlockOutput, Context
from sparsejax.nn.attention import Attention, KVCache
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import RMSNorm


class FeedForward(Protocol):
    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Optional[MoEReport]]: ...


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, feed_forward: FeedForward):
        self.attention_norm = RMSNorm(backbone.d_model, backbone.norm_epsilon)
        self.attention = Attention(key, backbone)
        self.feed_forward_norm = RMSNorm(backbone.d_model, backbone.norm_epsilon)
        self.feed_forward = feed_forward

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context, cache: Optional[KVCache] = None) -> BlockOutput:
        batch = context.batch
        with jax.named_scope("attention"):
            attended, cache = self.attention(self.attention_norm(x_BTD), batch.positions, batch.segments, cache)
            x_BTD = x_BTD + attended
        with jax.named_scope("feed_forward"):
            y_BTD, moe = self.feed_forward(self.feed_forward_norm(x_BTD), context)
            x_BTD = x_BTD + y_BTD
        return BlockOutput(x=x_BTD, report=Report(moe=moe), cache=cache)
