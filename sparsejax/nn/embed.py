"""Token embedding and output head, tied or not."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES, gather_for_compute
from sparsejax.nn.linear import normal, param


class Embedding(nnx.Module):
    """A row per token id, scaled by √D on its way in. Tied, it is the output head, too: hence the small initial
    values of GPT-2, with which a token's own row does not win before anything is learned."""

    def __init__(self, key: PRNGKeyArray, vocab_size: int, d_model: int, dtype: str):
        self.table = param(normal(key, (vocab_size, d_model), 0.02), ("vocab", "embed"), "embedding")
        self.dtype = dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = gather_for_compute(self.table[...].astype(self.dtype))
        scale = self.table.shape[-1] ** 0.5
        return scale * table_VD.at[tokens_BT].get(out_sharding=P(BATCH_AXES, None, None))

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of every token under the tied table, float32."""
        return _logits(x_BTD, gather_for_compute(self.table[...].astype(self.dtype)).T)


class Head(nnx.Module):
    """An output projection of its own."""

    def __init__(self, key: PRNGKeyArray, vocab_size: int, d_model: int, dtype: str):
        self.weight = param(normal(key, (d_model, vocab_size), d_model**-0.5), ("embed", "vocab"), "embedding")
        self.dtype = dtype

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return _logits(x_BTD, gather_for_compute(self.weight[...].astype(self.dtype)))


def _logits(x_BTD: Float[Array, "B T D"], weight_DV: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    spec = P(BATCH_AXES, None, "tensor")
    x_BTD = x_BTD.astype(weight_DV.dtype)
    return jnp.einsum("btd,dv->btv", x_BTD, weight_DV, preferred_element_type=jnp.float32, out_sharding=spec)
