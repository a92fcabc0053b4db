"""Which module first produced something that is not finite: asked once, when a run has to stop over it."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from sparsejax.base.reports import handed_on
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context, Hidden
from sparsejax.model.config import Layer
from sparsejax.model.lm import LanguageModel
from sparsejax.model.tables import prefetch, readers
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import TrainState, abstract_model
from sparsejax.train.step import Microbatches, make_grads_of_step


def first_bad_module(config: ExperimentConfig, state: TrainState, microbatches: Microbatches, step: int) -> str:
    """A phrase that names the first module, from input to output, with a non-finite parameter or output.

    Failing that, the parameter whose gradient is not finite and lies nearest to the loss.

    `state` is the one that step number `step`, on `microbatches`, left: as it was skipped, parameters and noise are
    those it had.
    """
    for path, parameter in nnx.to_flat_state(state.params):
        if not _finite(parameter[...]):
            return f"parameter {_name(path)} is not finite"
    before = jnp.int32(step - 1)  # what the step's noise is drawn from
    key = jax.random.fold_in(jax.random.key(config.train.seed), before)
    for number in range(config.train.accumulation):
        batch = Batch(**{name: rows[number] for name, rows in microbatches.items()})
        for name, output in _outputs(config, state, Context(batch=batch, mode="train", key=key)):
            if not _finite(output):
                return f"the output of {name} is not finite"
    _, grads = jax.jit(make_grads_of_step(config))(state.params, state.model_state, microbatches, before)
    rows = {("tables", name): read.rows for name, read in grads.rows.items()}
    bad_rows = [path for path, gradient in rows.items() if not _finite(gradient)]
    bad = bad_rows + [path for path, gradient in nnx.to_flat_state(grads.dense) if not _finite(gradient[...])]
    if not bad:
        return "every module is finite when the step is repeated"
    return f"the gradient of {_name(min(bad, key=_distance_from_loss))} is not finite"


def _outputs(config: ExperimentConfig, state: TrainState, context: Context) -> Iterator[tuple[str, Hidden]]:
    """(name, output) of every module that the residual goes through. Repeats of a block share one program."""
    graph, _, _ = abstract_model(config.model)

    @functools.partial(jax.jit, static_argnums=0)
    def run(part, state, *args):
        return part(nnx.merge(graph, state.params, state.model_state), *args)

    def embed(model, batch, key):
        embedded_BTD = model.embedding(batch.tokens)
        seen = Context(batch=batch, mode=context.mode, key=key, embedded=embedded_BTD)
        begun = model.look_up(embedded_BTD, seen, prefetch(config.model, model.tables, batch))
        return embedded_BTD, model.spread(begun.x, batch)

    def block(position, model, x, logits, embedded_BTD, index, repeat, batch, key):
        layer = Layer(index=index, block="", position=position, repeat=repeat)
        pool = model.stack.pool(config.model.positions[position])
        prefetched = prefetch(config.model, model.tables, batch)
        if repeat is not None:
            own = jax.tree.map(lambda rows: rows[repeat], prefetched.stacked())
            prefetched = dataclasses.replace(prefetched, own=own)
        reading = readers(config.model, model.tables, prefetched, position, index, None)
        seen = Context(batch=batch, mode=context.mode, key=key, pool=pool, readers=reading, embedded=embedded_BTD)
        out = model.stack.block(layer)(x, dataclasses.replace(seen, logits=logits).at_layer(index))
        return out.x, handed_on(out.report, logits)[1]

    blocks = {position: functools.partial(block, position) for position in config.model.positions}
    embedded_BTD, x = run(embed, state, context.batch, context.key)
    logits = None
    yield "embedding", x
    for layer in config.model.layers:
        given = (x, logits, embedded_BTD, layer.index, layer.repeat, context.batch, context.key)
        x, logits = run(blocks[layer.position], state, *given)
        yield f"layer {layer.name}", x
    read_BTW = run(_norm, state, x, context.batch)
    yield "final_norm", read_BTW
    yield "head", run(_head, state, read_BTW)


def _norm(model: LanguageModel, x: Hidden, batch: Batch) -> Array:
    return model.read(x, batch)


def _head(model: LanguageModel, x_BTD: Array) -> Array:
    return (model.embedding if model.head is None else model.head).logits(x_BTD)


def _distance_from_loss(path: tuple) -> tuple[int, int]:
    """Sorts parameters from the output of the model to its input; later blocks come before earlier ones."""
    parts = ("head", "final_norm", "ends", "suffix", "units", "prefix", "pools", "tables", "memories", "embedding")
    place = next(i for i, part in enumerate(parts) if part in path)
    return place, -next((key for key in path if isinstance(key, int)), 0)


def _finite(value: Hidden) -> bool:
    return all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(value))


def _name(path: tuple) -> str:
    return ".".join(str(key) for key in path)
