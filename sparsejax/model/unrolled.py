"""The same model with all of its layers one after the other, each with arrays of its own: what decoding runs on.

A step that reads every weight once must not copy any, and XLA copies a layer's weights out of a scanned stack."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from sparsejax.blocks.context import BlockCache
from sparsejax.model.config import EMBEDDING, ModelConfig
from sparsejax.model.stack import in_layer


def unrolled(config: ModelConfig) -> ModelConfig:
    """The model whose prefix is all of `config`'s layers."""
    layers = tuple(layer.block for layer in config.layers)
    return dataclasses.replace(config, prefix=layers, pattern=(), repeats=0, suffix=())


def unrolled_variables(config: ModelConfig, variables: nnx.State) -> nnx.State:
    """Variables of `config` as those of `unrolled(config)`. To be called under `jax.jit`, which makes the copies."""
    flat: dict[tuple, Any] = {}
    for path, variable in nnx.to_flat_state(variables):
        if path[0] != "stack" or path[1] == "pools":
            flat[path] = variable
            continue
        position, inside = in_layer(path)
        for layer in config.layers:
            if layer.position == position:
                stored = config.stored(layer)
                own = variable if stored is None else variable.replace(variable[...][stored])
                flat[("stack", "prefix", layer.index, *inside)] = own
    return nnx.from_flat_state(flat)


def unrolled_caches(config: ModelConfig, caches: Mapping[str, BlockCache]) -> dict[str, BlockCache]:
    """Caches of `config` as those of `unrolled(config)`."""
    found = {EMBEDDING: caches[EMBEDDING]} if EMBEDDING in caches else {}
    for layer in config.layers:
        cache, repeat = caches[layer.position], layer.repeat
        own = cache if repeat is None else jax.tree.map(lambda array, r=repeat: array[r], cache)
        found[f"prefix_{layer.index}"] = own
    return found
