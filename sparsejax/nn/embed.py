"""Token embedding and output heads: of tokens, tied or not, and of classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES, on_each_device, split_axes, sum_over, whole
from sparsejax.base.structs import Batch
from sparsejax.nn.linear import normal, param, project
from sparsejax.ops.head_loss import HeadKind, HeadLosses, Passes, Weighting, head_losses

LOGITS_SPEC = P(BATCH_AXES, None, "tensor")


class Embedding(nnx.Module):
    """A row per token id, times `scale` (√D, if not given) on its way in. Tied, it is the output head, too: hence the
    small initial values of GPT-2, with which a token's own row does not win before anything is learned."""

    def __init__(self, key: PRNGKeyArray, vocab_size: int, d_model: int, dtype: str, scale: Optional[float] = None):
        self.table = param(normal(key, (vocab_size, d_model), 0.02), ("vocab", "embed"), "embedding")
        self.dtype = dtype
        self.scale = d_model**0.5 if scale is None else scale

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = self.table[...]
        specs = split_axes(tokens_BT), split_axes(table_VD)

        def local(tokens_BT: Array, table_VD: Array) -> tuple[Array]:
            table_VD = whole(table_VD.astype(self.dtype), specs[1], tokens_BT)
            if "tensor" not in specs[1]:
                return (table_VD[tokens_BT],)
            row_BT = tokens_BT - jax.lax.axis_index("tensor") * len(table_VD)
            here_BT = (row_BT >= 0) & (row_BT < len(table_VD))
            found_BTD = table_VD[jnp.where(here_BT, row_BT, 0)]
            return (sum_over(jnp.where(here_BT[..., None], found_BTD, 0), "tensor"),)

        look_up = jax.checkpoint(on_each_device(local, specs, (P(BATCH_AXES, None, None),)), prevent_cse=False)
        return self.scale * look_up(tokens_BT, table_VD)[0]

    def logits(self, x_BTD: Float[Array, "B T D"], own: Optional[nnx.Param] = None) -> Float[Array, "B T V"]:
        """Scores of every token under the tied table, or under an exit's `own`, float32."""
        table = self.table if own is None else own
        return project("btd,vd->btv", x_BTD, table, LOGITS_SPEC, self.dtype, jnp.float32)

    def losses(self, passes: Passes, batch: Batch, *weights: Any, **more: Any) -> HeadLosses:
        """`token_losses` of these logits."""
        return token_losses("nd,vd->nv", self.dtype, self.table, passes, batch, *weights, **more)


class Head(nnx.Module):
    """An output projection of its own."""

    def __init__(self, key: PRNGKeyArray, vocab_size: int, d_model: int, dtype: str):
        self.weight = param(normal(key, (d_model, vocab_size), d_model**-0.5), ("embed", "vocab"), "embedding")
        self.dtype = dtype

    def logits(self, x_BTD: Float[Array, "B T D"], own: Optional[nnx.Param] = None) -> Float[Array, "B T V"]:
        weight = self.weight if own is None else own
        return project("btd,dv->btv", x_BTD, weight, LOGITS_SPEC, self.dtype, jnp.float32)

    def losses(self, passes: Passes, batch: Batch, *weights: Any, **more: Any) -> HeadLosses:
        return token_losses("nd,dv->nv", self.dtype, self.weight, passes, batch, *weights, **more)


def token_losses(
    equation: str,
    dtype: str,
    weight: nnx.Param,
    passes: Passes,
    batch: Batch,
    exits: Optional[Weighting] = None,
    others: Sequence = (),
    shares: Sequence = (),
    **more: Any,
) -> HeadLosses:
    """`head_losses` of every token, with weights of `exits` and their `others`, or `shares` of steps; `more` of their
    `HeadKind`."""
    given = batch.targets, batch.loss_mask, exits, tuple(others), tuple(shares)
    return head_losses(HeadKind(equation=equation, dtype=dtype, **more), passes, weight[...], *given)


class ClassHead(nnx.Module):
    """Scores of classes, whole on every device, from one vector for each row; the targets stand at position 0."""

    def __init__(self, key: PRNGKeyArray, classes: int, d_model: int, dtype: str):
        self.weight = param(normal(key, (d_model, classes), d_model**-0.5), ("embed", None), "embedding")
        self.dtype = dtype

    def logits(self, x_BSD: Float[Array, "B S D"], own: Optional[nnx.Param] = None) -> Float[Array, "B S C"]:
        weight = self.weight if own is None else own
        return project("btd,dv->btv", x_BSD, weight, P(BATCH_AXES, None, None), self.dtype, jnp.float32)

    def losses(
        self, passes: Passes, batch: Batch, exits: Optional[Weighting] = None, others: Sequence = (), **more: Any
    ) -> HeadLosses:
        """Of passes `[B, 1, D]`. Their nll is `[B, T]`, as with other heads, and 0 after position 0."""
        kind = HeadKind(equation="nd,dv->nv", dtype=self.dtype, **more)
        where = batch.targets[:, :1], batch.loss_mask[:, :1]
        lost = head_losses(kind, passes, self.weight[...], *where, exits, tuple(others))
        after = ((0, 0), (0, batch.targets.shape[1] - 1))
        return dataclasses.replace(lost, nll=tuple(jnp.pad(nll_B1, after) for nll_B1 in lost.nll))
