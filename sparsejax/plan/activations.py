"""What a step keeps between its forward and its backward pass: an estimate, made before any compiler has seen it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jaxtyping import Array

from sparsejax.base.errors import ConfigError
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Totals
from sparsejax.model.config import ModelConfig
from sparsejax.model.tables import Into, row_zeros
from sparsejax.ops.head_loss import pieces
from sparsejax.plan.abstract import device_bytes, device_shape
from sparsejax.plan.work import group_size, moe_blocks, slots_per_expert
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import TrainState, abstract_model, split_tables, with_tables
from sparsejax.train.step import microbatch_loss, pass_keys

NOT_MODELLED = (
    "Not counted: what only the compiled step knows, that is parameters gathered or cast for use, gradient sums of "
    "several microbatches, buffers of collectives and the compiler's temporaries. 'saved_for_backward' is what "
    "automatic differentiation keeps of one microbatch, before the compiler; it is an estimate and not in the total."
)


def saved_for_backward(
    config: ExperimentConfig, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
) -> list[tuple[str, int]]:
    """What the forward pass of one microbatch leaves for the backward pass, as (dtype and shape, bytes) on a device.
    `model.remat`, the dtype and the kind of attention count. Needs the mesh to be set."""
    types = residuals(config, state, batch)
    return [(f"{each.dtype.name}{list(device_shape(each))}", device_bytes(each)) for each in types]


def residuals(config: ExperimentConfig, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]) -> list[Any]:
    """The types, with shardings, of the residuals of `jax.vjp` as traced; arrays of the state and the batch are left
    out, and nothing is there twice. Needs the mesh to be set."""
    graph, slices = _traced(config.model, state.params)

    def residuals_of(params: nnx.State, model_state: nnx.State, arrays: dict[str, Array]) -> Any:
        microbatch = Batch(**{name: rows[0] for name, rows in arrays.items()})
        one = jnp.int32(1)  # what sums are divided by takes no room
        totals = Totals(targets=one, tokens=one, rows=one, microbatches=config.train.accumulation)

        keys = pass_keys(config.train, jnp.int32(0))
        dense, tables = split_tables(params)

        def loss(dense: nnx.State, into: list[Into]) -> Array:
            model = nnx.merge(graph, with_tables(dense, tables, params), model_state)
            return microbatch_loss(config, model, microbatch, keys, into, [totals] * len(keys))[0]

        return jax.vjp(loss, dense, [row_zeros(config.model, *microbatch.tokens.shape) for _ in keys])[1]

    jaxpr = jax.make_jaxpr(residuals_of)(state.params, state.model_state, batch).jaxpr
    inputs = set(jaxpr.invars)
    kept = dict.fromkeys(var for var in jaxpr.outvars if isinstance(var, Var) and var not in inputs)
    found: list[Any] = [var.aval for var in kept]
    return [each for each in found if (each.shape, each.dtype) not in slices]


def _traced(model: ModelConfig, params: nnx.State) -> tuple[Any, set[tuple[tuple[int, ...], Any]]]:
    """(the model that is traced, (shape, dtype) of what is none of its residuals). Unrolled, layers' own slices of the
    stacked parameters would pass for something that is kept; models whose layers have shapes of their own are never
    scanned, and what looks like such a slice is left out."""
    try:
        return abstract_model(dataclasses.replace(model, scan=True))[0], set()
    except ConfigError:
        stacked = [variable for path, variable in nnx.to_flat_state(params) if path[:2] == ("stack", "units")]
        return abstract_model(model)[0], {(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(stacked)}


def buffers(config: ExperimentConfig) -> dict[str, int]:
    """Bytes per device of single large arrays of one microbatch: `logits`, those there are at once, and `BLOCK/slots`,
    those of one layer."""
    model, length = config.model, config.data.sequence_length
    tokens = config.microbatch_size // config.mesh.batch_shards * length
    scored, scores = model.head.logits(tokens, length, model.vocab_size, config.mesh.tensor)
    found = {"logits": scored // pieces(scored, scores) * scores * jnp.dtype("float32").itemsize}
    for name, spec in moe_blocks(model).items():
        size = group_size(spec, length)
        slots = tokens // size * spec.num_experts * slots_per_expert(spec, length, "train")
        found[f"{name}/slots"] = slots * model.d_model * jnp.dtype(model.dtype).itemsize
    return found
