"""The parameters of a model that begins with what another model has learned, layer by layer."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sparsejax.base.errors import RequestError
from sparsejax.blocks.upcycling import copied
from sparsejax.model.config import ModelConfig
from sparsejax.model.stack import place

Named = dict[str, Array]

OF_SELECTION = ("chooser/", "adapter/", "adapter_norm/")
"""Arrays of a layer that chooses tokens, which a trained model that computes on all of them lacks."""


def continued(config: ModelConfig, fresh: nnx.State, before: ModelConfig, trained: nnx.State) -> nnx.State:
    """The parameters `fresh` of a model of `config`, with what the model of `before` has learned.

    The two may lay their blocks out differently in prefix, pattern and suffix. Memories that the trained model lacks
    stay as they begin, which is as if they were not there. To be called under `jax.jit`.

    Raises:
      RequestError: depth or arrays do not fit.
    """
    if config.num_layers != before.num_layers:
        raise RequestError(f"it has {before.num_layers} layers, and config.model has {config.num_layers}")
    shape = lambda model: (model.prefix, model.pattern, model.repeats, model.tied_repeats)  # noqa: E731
    if config.tied_repeats and shape(config) != shape(before):
        raise RequestError("config.model.tied_repeats: repeats that were trained apart, or of another pattern, differ")
    # Whole on every device: cutting and stacking need not follow how the arrays are split.
    whole = jax.tree.map(lambda array: jax.sharding.reshard(array, P()), trained)
    flat = dict(nnx.to_flat_state(fresh))
    (own, own_layers), (old, old_layers) = _by_layer(config, flat.items()), _by_layer(before, nnx.to_flat_state(whole))
    new = new_memories(config, before)
    # Exits that it did not have begin as they are, and those that it had may be left behind.
    exits, left = (({path for path in a if path.startswith("exits/")} - b.keys()) for a, b in ((own, old), (old, own)))
    without = lambda arrays, paths: {path: array for path, array in arrays.items() if path not in paths}  # noqa: E731
    outside = copied(without(_taken(own, new), exits), without(old, left))
    outside = _kept(own, new) | {path: own[path] for path in exits} | outside
    layers = []
    for layer, mine, learned, was in zip(config.layers, own_layers, old_layers, before.layers, strict=True):
        try:
            new_here = {name: mine[name] for name in mine if name.startswith(OF_SELECTION) and name not in learned}
            rest = {name: array for name, array in _taken(mine, new).items() if name not in new_here}
            begun = config.blocks[layer.block].continued(rest, learned, before.blocks[was.block])
            layers.append(new_here | _kept(mine, new) | begun)
        except RequestError as error:
            raise RequestError(f"layer {layer.name}: {error}") from None
    for path, variable in flat.items():
        if path[:2] == ("stack", "pools") or path[0] != "stack":
            flat[path] = variable.replace(outside["/".join(map(str, path))])
            continue
        position, name = place(path)
        values = [layers[layer.index][name] for layer in config.layers if layer.position == position]
        flat[path] = variable.replace(jnp.stack(values[: len(variable[...])]) if path[1] == "units" else values[0])
    return nnx.from_flat_state(flat)


def new_memories(config: ModelConfig, before: ModelConfig) -> set[str]:
    """Names of the memories that `config` has and `before` has not."""
    return set(config.memory) - set(before.memory)


def of_memory(path: Sequence[Any], names: Collection[str]) -> bool:
    """Whether a variable, or the table, is of one of these memories."""
    return any(part in ("memories", "tables") and name in names for part, name in itertools.pairwise(path))


def _kept(arrays: Named, new: set[str]) -> Named:
    return {path: array for path, array in arrays.items() if of_memory(path.split("/"), new)}


def _taken(arrays: Named, new: set[str]) -> Named:
    return {path: array for path, array in arrays.items() if not of_memory(path.split("/"), new)}


def _by_layer(config: ModelConfig, variables: Iterable[tuple[tuple, Any]]) -> tuple[Named, list[Named]]:
    """(arrays outside of the blocks, those of each layer), by path."""
    outside: Named = {}
    layers: list[Named] = [{} for _ in config.layers]
    for path, variable in variables:
        if path[:2] == ("stack", "pools") or path[0] != "stack":
            outside["/".join(map(str, path))] = variable[...]
            continue
        position, name = place(path)
        for layer in config.layers:
            if layer.position == position:
                stored = config.stored(layer)
                layers[layer.index][name] = variable[...] if stored is None else variable[stored]
    return outside, layers
