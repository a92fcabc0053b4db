"""Soft MoE: experts work on mixtures of tokens, and tokens receive mixtures of what comes out (arXiv:2308.00951)."""

from dataclasses import dataclass
from typing import Any, Optional

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
from sparsejax.blocks.expert_parallel import expert_parallel
from sparsejax.blocks.mixtures import mixture_report
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.spec import BlockSpec
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import normal, param
from sparsejax.nn.mlp import Experts, ffn_weights, ffn_width
from sparsejax.ops.ffn import Activation


@dataclass(frozen=True, kw_only=True)
class SoftSpec(BlockSpec):
    """Config of a Soft MoE block. With as many slots in all as a row has tokens its experts cost what a dense network
    does. Documents of one row are mixed, too."""

    num_experts: int = 8
    slots_per_expert: int = 16  # for every row, however long
    d_ff: Optional[int] = None  # hidden width of one expert; None: 4 · d_model
    gated: bool = False
    activation: Activation = "gelu"
    allow_leak: bool = False  # accept that every slot mixes all tokens of a row

    def __post_init__(self):
        for name in ("num_experts", "slots_per_expert", "d_ff"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(name, f"{value} is not positive")

    def check_causal(self) -> None:
        if not self.allow_leak:
            raise leaks("allow_leak", "a token's output would depend on the tokens after it")

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        return ("attention", "slots", "experts")

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> TransformerBlock:
        attention_key, soft_key = jax.random.split(key)
        return TransformerBlock(attention_key, backbone, SoftMoELayer(soft_key, backbone, self))

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        weights = ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)
        slots = self.num_experts * self.slots_per_expert
        matrix = backbone.d_model * slots  # logits, dispatch and combine multiply by matrices of this size
        experts = Cost(
            parameters=self.num_experts * weights, active=self.num_experts * weights, per_row=slots * 2 * weights
        )
        return {"router": Cost(parameters=matrix + 1, active=matrix + 1, per_token=3 * 2 * matrix), "experts": experts}

    def processed_flops(self, report: Report, backbone: Backbone) -> float:
        assert report.moe is not None  # a block of this kind always has one
        return float(report.moe.processed.sum()) * 2 * ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        return {"d_ff": (ffn_width(backbone, self.d_ff), "mlp"), "num_experts": (self.num_experts, "experts")}

    def check_cached(self) -> None:
        lacks = "a slot mixes all tokens of the row, which generation lacks"
        raise ConfigError("name", f"{lacks}; such a model can be trained and evaluated")

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        assert report.moe is not None
        return moe_ratios(report.moe, self.num_experts)


class SoftMoELayer(nnx.Module):
    """φ `[D, E, P]`, a scale, and experts. Slots are exchanged over the mesh axis `expert` as those of an MoE layer."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, spec: SoftSpec):
        phi_key, expert_key = jax.random.split(key)
        shape = (backbone.d_model, spec.num_experts, spec.slots_per_expert)
        self.phi = param(normal(phi_key, shape, backbone.d_model**-0.5), ("embed", None, None), "router")
        self.scale = param(jnp.ones((), jnp.float32), (), "router")
        kind = {"gated": spec.gated, "activation": spec.activation}
        self.experts = Experts(expert_key, backbone, spec.num_experts, ffn_width(backbone, spec.d_ff), **kind)

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], MoEReport]:
        weights, activation = self.experts.weights(), self.experts.activation
        weight_specs = tuple(split_axes(weight) for weight in weights)
        phi_spec = split_axes(self.phi[...])

        def local(x_BTD, mask_BT, phi_DEP, scale, *weights):
            with jax.named_scope("route"):
                phi_DEP = whole(phi_DEP, phi_spec, x_BTD)
                logits_BTEP = soft_logits(x_BTD, phi_DEP, scale)
                dispatch_BTEP, combine_BTEP = soft_weights(logits_BTEP, mask_BT)
            with jax.named_scope("dispatch"):
                z_EBPD = jnp.einsum("btep,btd->ebpd", dispatch_BTEP.astype(x_BTD.dtype), x_BTD)
            out_EBPD = expert_parallel(checkpoint_name(z_EBPD, "slots"), weights, weight_specs, activation)
            with jax.named_scope("combine"):
                out_EBPD = checkpoint_name(out_EBPD, "experts")
                y_BTD = jnp.einsum("btep,ebpd->btd", combine_BTEP.astype(x_BTD.dtype), out_EBPD)
                if "tensor" in weight_specs[0]:
                    y_BTD = sum_over(y_BTD, "tensor")
            rows, slots = mask_BT.any(-1).sum(dtype=jnp.int32), logits_BTEP.shape[0] * phi_DEP[0].size
            flat_BTX = logits_BTEP.reshape(*mask_BT.shape, -1)
            moe = mixture_report(combine_BTEP.sum(-1), flat_BTX, mask_BT, rows * phi_DEP.shape[-1], slots)
            return y_BTD, sum_over(moe, BATCH_AXES)

        by_row: Any = P(BATCH_AXES, None, None)
        run = on_each_device(local, (by_row, P(BATCH_AXES, None), phi_spec, P(), *weight_specs), (by_row, P()))
        mask_BT = context.batch.segments > 0
        return run(x_BTD.astype(self.experts.dtype), mask_BT, self.phi[...], self.scale[...], *weights)


def soft_logits(
    x_BTD: Float[Array, "B T D"], phi_DEP: Float[Array, "D E P"], scale: Float[Array, ""]
) -> Float[Array, "B T E P"]:
    """Scale × the cosine of every token with every slot's φ, float32 (arXiv:2308.00951)."""
    x_BTD = _unit(x_BTD.astype(jnp.float32), axis=-1)
    return jnp.einsum("btd,dep->btep", x_BTD, scale * _unit(phi_DEP, axis=0), precision=jax.lax.Precision.HIGHEST)


def soft_weights(
    logits_BTEP: Float[Array, "B T E P"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T E P"], Float[Array, "B T E P"]]:
    """(dispatch, combine): a softmax over the row's tokens for every slot, one over all slots for every token. Padding
    is in neither."""
    real_BT11 = mask_BT[..., None, None]
    # A row of padding has no token to be a softmax over: −∞ for all of them would be nan.
    dispatch_BTEP = jax.nn.softmax(jnp.where(real_BT11, logits_BTEP, -1e30), axis=1)
    combine_BTEP = jax.nn.softmax(logits_BTEP, axis=(2, 3))
    return jnp.where(real_BT11, dispatch_BTEP, 0), jnp.where(real_BT11, combine_BTEP, 0)


def _unit(values: Array, axis: int) -> Array:
    return values * jax.lax.rsqrt(jnp.square(values).sum(axis=axis, keepdims=True) + 1e-6)
