"""How the outputs of routed and of shared experts become one, when they are not simply added."""

from typing import Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.reports import MoEReport
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch
from sparsejax.nn.linear import Linear
from sparsejax.routers.candidates import Noise


def mixing(key: PRNGKeyArray, d_model: int, width: int) -> Linear:
    """A token's `width` logits of how the two are mixed."""
    sharing = {"out_spec": P(BATCH_AXES, None, None), "dtype": "float32"}
    return Linear(key, "btd,dc->btc", (d_model, width), ("embed", None), stddev=d_model**-0.5, **sharing)


def softmax_mix(
    logits_BT2: Float[Array, "B T 2"], routed_BTD: Float[Array, "B T D"], shared_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """c₁ · routed + c₂ · shared, c = softmax(logits) (PR-MoE, arXiv:2201.05596, as in DeepSpeed)."""
    c_BT2 = jax.nn.softmax(logits_BT2, axis=-1).astype(routed_BTD.dtype)
    return c_BT2[..., :1] * routed_BTD + c_BT2[..., 1:] * shared_BTD


def gated_mix(
    logit_BT1: Float[Array, "B T 1"],
    routed_BTD: Float[Array, "B T D"],
    shared_BTD: Float[Array, "B T D"],
    batch: Batch,
    keys_B: Optional[PRNGKeyArray],
    dropout: float,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """(g · routed + (1 − g) · shared with g = sigmoid(logit), Σ over tokens of g): conditional MoE routing (NLLB,
    arXiv:2207.04672). With keys, those of rows, g is 0 for a share `dropout` of tokens; the sum is of all."""
    g_BT1 = jax.nn.sigmoid(logit_BT1)
    real_BT = batch.segments > 0
    gate_sum = jnp.sum(jnp.where(real_BT, g_BT1[..., 0], 0))
    if keys_B is not None:
        rows, length = real_BT.shape
        noise = Noise(keys_B=keys_B, row_length=length, groups=(rows, length))
        g_BT1 = jnp.where(noise.uniform(14, 1) < dropout, 0, g_BT1)
    g_BT1 = g_BT1.astype(routed_BTD.dtype)
    return g_BT1 * routed_BTD + (1 - g_BT1) * shared_BTD, gate_sum


def gate_loss(moe: MoEReport, whole: MoEReport, target: float) -> Float[Array, ""]:
    """A microbatch's part of Σ over the stacked layers of |mean of g − target|, the mean being of the `whole` step: the
    parts add up to it, and have its gradient."""
    assert moe.gate_sum is not None and whole.gate_sum is not None and moe.gated is not None and whole.gated is not None
    tokens = jnp.maximum(whole.gated, 1)
    sign = jnp.sign(jax.lax.stop_gradient(whole.gate_sum) - target * whole.gated)
    return jnp.sum(sign * (moe.gate_sum - target * moe.gated) / tokens)
