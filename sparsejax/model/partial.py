"""Some layers of an unrolled model at a time, of a decoder from its caches: what early exits are made of."""

import dataclasses
from collections.abc import Sequence
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.base.errors import RequestError
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context, Hidden, Mode
from sparsejax.model.config import EMBEDDING
from sparsejax.model.lm import LanguageModel
from sparsejax.model.stack import Caches
from sparsejax.model.tables import NOTHING_READ, readers
from sparsejax.ops.attention import soft_capped


def embedded(
    model: LanguageModel, batch: Batch, caches: Optional[Caches], mode: Mode = "generate"
) -> tuple[Hidden, Context, Caches]:
    """The residual before the first layer."""
    x_BTD = model.embedding(batch.tokens)
    context, found = Context(batch=batch, mode=mode, embedded=x_BTD), dict(caches or {})
    begun = model.look_up(x_BTD, context, NOTHING_READ, caches)
    if begun.cache is not None and EMBEDDING in found:
        found[EMBEDDING] = begun.cache
    return model.spread(begun.x, batch), context, found


def run_layers(
    model: LanguageModel,
    x: Hidden,
    context: Context,
    caches: Optional[Caches],
    layers: Sequence[int],
    active_B: Optional[Bool[Array, " B"]] = None,
    skipped_keys: bool = True,
) -> tuple[Hidden, Caches]:
    """These layers one after the other. Rows that are not `active_B` keep their residual; a layer that no row is active
    in costs its keys and values, or with `skipped_keys=False`, which are then not remembered, nothing."""
    config, found = model.config, dict(caches or {})
    if config.hands_on:
        raise RequestError("routers that add to the logits of the one below (router.residual) need all layers in a row")
    for layer in layers:
        position = f"prefix_{layer}"
        here = dataclasses.replace(
            context,
            pool=model.stack.pool(config.positions[position]),
            readers=readers(config, model.tables, NOTHING_READ, position, layer, None),
            active=active_B,
            skipped_keys=skipped_keys,
        )
        out = model.stack.prefix[layer](x, here.at_layer(layer), found.get(position))
        x = out.x if active_B is None else chosen_rows(active_B, out.x, x)
        if position in found:
            found[position] = out.cache
    return x, found


def chosen_rows(chosen_B: Bool[Array, " B"], left: Hidden, right: Hidden) -> Hidden:
    """Rows of `left` where chosen, else of `right`."""
    pick = lambda a, b: jnp.where(chosen_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, left, right)


def features_at(model: LanguageModel, x: Hidden, batch: Batch, depth: int) -> Float[Array, "B S D"]:
    """What the head of the exit after so many layers reads."""
    depths = model.config.exits.depths
    return model.at_exit(depths.index(depth), x, batch) if depth in depths else model.read(x, batch)


def logits_at(model: LanguageModel, features_BTD: Float[Array, "B S D"], depth: int) -> Float[Array, "B S V"]:
    """What that head says of them, float32."""
    return soft_capped(model.exit_logits(features_BTD, depth), model.config.logit_soft_cap)
