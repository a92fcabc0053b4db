"""Slots through the experts that hold them, wherever those live on the mesh. Called inside `shard_map`."""

import functools
from typing import Optional

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sparsejax.ops.ffn import Activation, Weights, expert_ffn


def expert_parallel(
    z_EGCD: Float[Array, "E G C D"],
    weights: Weights,
    weight_specs: tuple[P, ...],
    activation: Activation,
    scale_EGC: Optional[Float[Array, "E G C"]] = None,
) -> Float[Array, "E G C D"]:
    """Slots to the devices that hold their experts, through them, and back, each output scaled by `scale_EGC`. Weights
    split for storage are gathered here, so that their gradients leave by reduce-scatter. Where `weight_specs` split the
    hidden width over `tensor`, what comes back is one summand of several."""
    exchange = "expert" in weight_specs[0]
    weights = whole_weights(weights, weight_specs)
    if exchange:
        with jax.named_scope("exchange"):
            there = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=1, tiled=True)
            z_EGCD, scale_EGC = jax.tree.map(there, (z_EGCD, scale_EGC))
    experts, groups, num_slots, width = z_EGCD.shape
    with jax.named_scope("experts"):
        scale_EN = None if scale_EGC is None else scale_EGC.reshape(experts, groups * num_slots)
        out_END = expert_ffn(z_EGCD.reshape(experts, groups * num_slots, width), weights, activation, scale_EN)
    out_EGCD = out_END.reshape(experts, groups, num_slots, width)
    if exchange:
        with jax.named_scope("exchange"):
            out_EGCD = jax.lax.all_to_all(out_EGCD, "expert", split_axis=1, concat_axis=0, tiled=True)
    return out_EGCD


def whole_weights(weights: Weights, specs: tuple[P, ...]) -> Weights:
    """Weights as they are used: not split over `data`."""
    return tuple(_gather_data(weight, spec) for weight, spec in zip(weights, specs, strict=True))


def _gather_data(weight: Float[Array, "E ..."], spec: P) -> Float[Array, "E ..."]:
    return jax.lax.all_gather(weight, "data", axis=tuple(spec).index("data"), tiled=True) if "data" in spec else weight
