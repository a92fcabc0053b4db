"""What blocks in which every expert takes part have in common: nothing is chosen, so nothing can be dropped."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.reports import MoEReport
from sparsejax.ops.losses import router_z_sum


def mixture_report(
    p_BTE: Float[Array, "B T E"],
    logits_BTX: Float[Array, "B T X"],
    mask_BT: Bool[Array, "B T"],
    work: Int[Array, ""],
    slots: int,
) -> MoEReport:
    """Of tokens whose outputs are mixtures of all experts with weights `p_BTE`.

    Args:
      logits_BTX: what each token's weights are a softmax of.
      work: how often each expert worked: `assigned = processed`.
      slots: how often the static shapes let an expert work, over all experts.
    """
    num_experts = p_BTE.shape[-1]
    tokens = mask_BT.sum(dtype=jnp.int32)
    done_E = jnp.zeros(num_experts, jnp.int32) + work
    entropy_BT = -jnp.sum(p_BTE * jnp.log(jnp.maximum(p_BTE, 1e-30)), axis=-1)
    return MoEReport(
        assigned=done_E,
        processed=done_E,
        dropped_capacity=jnp.zeros_like(done_E),
        tokens=tokens,
        masked=jnp.int32(mask_BT.size) - tokens,
        unserved=jnp.zeros_like(tokens),
        slots=jnp.int32(slots),
        probability_sum=jnp.sum(jnp.where(mask_BT[..., None], p_BTE, 0), axis=(0, 1)),
        entropy_sum=jnp.sum(jnp.where(mask_BT, entropy_BT, 0)),
        z_sum=router_z_sum(logits_BTX, mask_BT),
        balance_sum=tokens.astype(jnp.float32),  # even loads have a balance of 1, whatever the probabilities
        balance_units=tokens.astype(jnp.float32),
    )
