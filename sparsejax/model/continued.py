"""The parameters of a model that begins with what another model has learned, layer by layer."""

from collections.abc import Iterable
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


def continued(config: ModelConfig, fresh: nnx.State, before: ModelConfig, trained: nnx.State) -> nnx.State:
    """The parameters `fresh` of a model of `config`, with what the model of `before` has learned.

    The two may lay their blocks out differently in prefix, pattern and suffix. To be called under `jax.jit`.

    Raises:
      RequestError: depth or arrays do not fit.
    """
    if config.num_layers != before.num_layers:
        raise RequestError(f"it has {before.num_layers} layers, and config.model has {config.num_layers}")
    # Whole on every device: cutting and stacking need not follow how the arrays are split.
    whole = jax.tree.map(lambda array: jax.sharding.reshard(array, P()), trained)
    flat = dict(nnx.to_flat_state(fresh))
    (own, own_layers), (old, old_layers) = _by_layer(config, flat.items()), _by_layer(before, nnx.to_flat_state(whole))
    outside, layers = copied(own, old), []
    for layer, mine, learned in zip(config.layers, own_layers, old_layers, strict=True):
        try:
            layers.append(config.blocks[layer.block].continued(mine, learned))
        except RequestError as error:
            raise RequestError(f"layer {layer.name}: {error}") from None
    for path, variable in flat.items():
        if path[:2] == ("stack", "pools") or path[0] != "stack":
            flat[path] = variable.replace(outside["/".join(map(str, path))])
            continue
        position, name = place(path)
        values = [layers[layer.index][name] for layer in config.layers if layer.position == position]
        flat[path] = variable.replace(jnp.stack(values) if path[1] == "units" else values[0])
    return nnx.from_flat_state(flat)


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
                layers[layer.index][name] = variable[...] if layer.repeat is None else variable[layer.repeat]
    return outside, layers
