"""Merged experts: one network per row or segment, its weights being the mean of all experts' weights under the router's
probabilities (SMEAR, arXiv:2306.03745; Lory, arXiv:2405.03133)."""

from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError, leaks
from sparsejax.base.ratios import moe_ratios
from sparsejax.base.reports import MoEReport, Report
from sparsejax.base.sharding import BATCH_AXES, on_each_device, split_axes, sum_over, whole
from sparsejax.blocks.context import Context, Mode
from sparsejax.blocks.mixtures import mixture_report
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.spec import BlockSpec
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import normal, param
from sparsejax.nn.mlp import Experts, ffn_weights, ffn_width
from sparsejax.ops.ffn import Activation, expert_ffn, whole_weights


@dataclass(frozen=True, kw_only=True)
class MergedSpec(BlockSpec):
    """Config of a block of merged experts.

    In segments each uses the decision of the one before (Lory), and the first has no such: `uniform` mixes all experts
    alike, `own` takes its own tokens' decision without gradient, as the paper does, which lets its tokens see later
    ones of the segment. Without segments (SMEAR) the whole row makes the decision."""

    num_experts: int = 8
    d_ff: Optional[int] = None  # hidden width of one expert; None: 4 · d_model
    gated: bool = False
    activation: Activation = "gelu"
    segment_length: Optional[int] = 256  # tokens of a row that share one network; None: the whole row
    first_segment: Literal["uniform", "own"] = "uniform"
    allow_leak: bool = False  # accept first_segment=own, or a decision of the whole row

    def __post_init__(self):
        for name in ("num_experts", "d_ff", "segment_length"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(name, f"{value} is not positive")

    def unused(self) -> dict[str, str]:
        reasons = {}
        if self.segment_length is None:
            reasons["first_segment"] = "segment_length=none: the row is one segment"
        elif self.first_segment == "uniform":
            reasons["allow_leak"] = "no token sees a later one"
        return reasons

    def check_causal(self) -> None:
        if self.allow_leak or (self.segment_length is not None and self.first_segment == "uniform"):
            return
        where = "row" if self.segment_length is None else "first segment"
        raise leaks("allow_leak", f"tokens of the {where} would share a network that later ones helped to choose")

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        return ("attention", "merged", "mlp")

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> TransformerBlock:
        attention_key, merged_key = jax.random.split(key)
        return TransformerBlock(attention_key, backbone, MergedLayer(merged_key, backbone, self))

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        weights = ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)
        return {
            "router": self._decision(backbone.d_model * self.num_experts),
            "mlp": Cost(per_token=2 * weights),
            "experts": self._decision(self.num_experts * weights),  # merging is a product of p and all weights
        }

    def _decision(self, products: int) -> Cost:
        """Of a product with this many weights, once a decision."""
        if self.segment_length is None:
            return Cost(parameters=products, active=products, per_row=2 * products)
        return Cost(parameters=products, active=products, routed=round(2 * products / self.segment_length))

    def processed_flops(self, report: Report, backbone: Backbone) -> float:
        """Of routing and merging; each expert worked once a decision."""
        assert report.moe is not None  # a block of this kind always has one
        weights = ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)
        return float(report.moe.processed.sum()) * 2 * (weights + backbone.d_model)

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        return {"d_ff": (ffn_width(backbone, self.d_ff), "mlp"), "num_experts": (self.num_experts, "experts")}

    def check_cached(self) -> None:
        lacks = "a network is merged for a whole row or segment, whose tokens generation lacks"
        raise ConfigError("name", f"{lacks}; such a model can be trained and evaluated")

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        assert report.moe is not None
        return moe_ratios(report.moe, self.num_experts)


class MergedLayer(nnx.Module):
    """A linear router and experts, which every device gathers whole: merging needs all of them."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, spec: MergedSpec):
        router_key, expert_key = jax.random.split(key)
        shape, stddev = (backbone.d_model, spec.num_experts), backbone.d_model**-0.5
        self.router = param(normal(router_key, shape, stddev), ("embed", None), "router")
        kind = {"gated": spec.gated, "activation": spec.activation}
        self.experts = Experts(expert_key, backbone, spec.num_experts, ffn_width(backbone, spec.d_ff), **kind)
        self.spec = spec

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], MoEReport]:
        spec, length = self.spec, x_BTD.shape[1]
        alone = spec.segment_length is None
        size = length if spec.segment_length is None else min(length, spec.segment_length)
        weights = self.experts.weights()
        weight_specs = tuple(split_axes(weight) for weight in weights)
        router_spec = split_axes(self.router[...])
        activation = self.experts.activation

        def local(x_BTD, mask_BT, router_DE, *weights):
            rows = x_BTD.shape[0]
            router_DE = whole(router_DE, router_spec, x_BTD)
            weights = whole_weights(weights, weight_specs, x_BTD, BATCH_AXES)
            x_BNSD, mask_BNS = in_segments(x_BTD, size), in_segments(mask_BT, size)
            with jax.named_scope("route"):
                logits_BNE = segment_logits(x_BNSD, mask_BNS, router_DE)
                if not alone:
                    logits_BNE = of_segment_before(logits_BNE, spec.first_segment)
                p_BNE = jax.nn.softmax(logits_BNE, axis=-1)
            with jax.named_scope("merge"):
                flat_NE = p_BNE.reshape(-1, spec.num_experts).astype(x_BTD.dtype)
                merged = tuple(jnp.einsum("ne,eij->nij", flat_NE, weight) for weight in weights)
                merged = tuple(checkpoint_name(weight, "merged") for weight in merged)
            with jax.named_scope("experts"):
                y_NSD = expert_ffn(x_BNSD.reshape(-1, *x_BNSD.shape[2:]), merged, activation)
                if "tensor" in weight_specs[0]:
                    y_NSD = sum_over(y_NSD, "tensor")
            y_BTD = checkpoint_name(y_NSD.reshape(rows, -1, x_BTD.shape[-1])[:, :length], "mlp")
            by_token = lambda values_BNE: jnp.repeat(values_BNE, size, axis=1)[:, :length]  # noqa: E731
            decisions = mask_BNS.any(-1).sum(dtype=jnp.int32)
            moe = mixture_report(by_token(p_BNE), by_token(logits_BNE), mask_BT, decisions, p_BNE.size)
            return jnp.where(mask_BT[..., None], y_BTD, 0), sum_over(moe, BATCH_AXES)

        by_row: Any = P(BATCH_AXES, None, None)
        run = on_each_device(local, (by_row, P(BATCH_AXES, None), router_spec, *weight_specs), (by_row, P()))
        return run(x_BTD.astype(self.experts.dtype), context.batch.segments > 0, self.router[...], *weights)


def in_segments(values_BT: Array, size: int) -> Array:
    """`[B, T, …]` as `[B, N, S, …]`, the last segment filled up with zeros."""
    rows, length, *rest = values_BT.shape
    padded = jnp.pad(values_BT, [(0, 0), (0, -length % size), *[(0, 0)] * len(rest)])
    return padded.reshape(rows, -1, size, *rest)


def segment_logits(
    x_BNSD: Float[Array, "B N S D"], mask_BNS: Bool[Array, "B N S"], router_DE: Float[Array, "D E"]
) -> Float[Array, "B N E"]:
    """Of the mean of each segment's unmasked tokens, in float32; 0 where there is none."""
    counts_BN1 = jnp.maximum(mask_BNS.sum(-1, keepdims=True, dtype=jnp.float32), 1)
    mean_BND = jnp.where(mask_BNS[..., None], x_BNSD.astype(jnp.float32), 0).sum(2) / counts_BN1
    return jnp.einsum("bnd,de->bne", mean_BND, router_DE, precision=jax.lax.Precision.HIGHEST)


def of_segment_before(logits_BNE: Float[Array, "B N E"], first: Literal["uniform", "own"]) -> Float[Array, "B N E"]:
    """Each segment's logits for the next one (Lory, arXiv:2405.03133)."""
    own_B1E = jax.lax.stop_gradient(logits_BNE[:, :1])
    return jnp.concatenate([own_B1E if first == "own" else jnp.zeros_like(own_B1E), logits_BNE[:, :-1]], axis=1)
