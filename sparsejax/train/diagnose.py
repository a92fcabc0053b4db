"""Which module first produced something that is not finite: asked once, when a run has to stop over it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.model.lm import LanguageModel
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import TrainState, abstract_model
from sparsejax.train.step import Microbatches, make_grads_of_step


def first_bad_module(config: ExperimentConfig, state: TrainState, microbatches: Microbatches) -> str:
    """A phrase that names the first module, from input to output, with a non-finite parameter or output; failing that, the
    parameter whose gradient is not finite and lies nearest to the loss."""
    for path, parameter in nnx.to_flat_state(state.params):
        if not _finite(parameter[...]):
            return f"parameter {_name(path)} is not finite"
    graph, _, _ = abstract_model(config.model)
    model = nnx.merge(graph, state.params, state.model_state)
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    for number in range(config.train.accumulation):
        batch = Batch(**{name: rows[number] for name, rows in microbatches.items()})
        for name, output in _outputs(model, Context(batch=batch, mode="train", key=key)):
            if not _finite(output):
                return f"the output of {name} is not finite"
    _, grads = jax.jit(make_grads_of_step(config))(state.params, state.model_state, microbatches, state.step)
    bad = [_name(path) for path, gradient in nnx.to_flat_state(grads) if not _finite(gradient[...])]
    return f"the gradient of {bad[-1]} is not finite" if bad else "every module is finite when the step is repeated"


def _outputs(model: LanguageModel, context: Context) -> Iterator[tuple[str, jax.Array]]:
    """(name, output) of every module that the residual stream goes through, one at a time."""
    x_BTD = model.embedding(context.batch.tokens)
    yield "embedding", x_BTD
    for layer in model.config.layers:
        x_BTD = model.stack.block(layer)(x_BTD, context.at_layer(layer.index)).x
        yield f"layer {layer.name}", x_BTD
    x_BTD = model.final_norm(x_BTD)
    yield "final_norm", x_BTD
    yield "head", (model.embedding if model.head is None else model.head).logits(x_BTD)


def _finite(value: jax.Array) -> bool:
    return bool(jnp.isfinite(value).all())


def _name(path: tuple) -> str:
    return ".".join(str(key) for key in path)
