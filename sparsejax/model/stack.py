"""The stack of blocks: prefix, the repeated pattern (scanned, or unrolled with the same parameters), suffix."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.reports import Report
from sparsejax.base.structs import struct
from sparsejax.blocks.context import BlockOutput, Context
from sparsejax.model.config import Layer, ModelConfig
from sparsejax.nn.attention import KVCache

Caches = Mapping[str, KVCache]


@struct
class StackOutput:
    """`reports` and `caches` by position; those of the pattern have a leading axis R."""

    x: Float[Array, "B T D"]
    reports: dict[str, Report]
    caches: dict[str, Optional[KVCache]]


class Unit(nnx.Module):
    """One repeat of the pattern."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        keys = jax.random.split(key, len(config.pattern))
        self.blocks = nnx.List(
            [config.blocks[name].build(k, config) for name, k in zip(config.pattern, keys, strict=True)]
        )


class Stack(nnx.Module):
    """All blocks of the model. The pattern's parameters are stacked along a leading axis R, scanned or not. What all
    layers of a block spec share is in `pools`, by the spec's name, and no part of the scanned axis."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        prefix_key, pattern_key, suffix_key = jax.random.split(key, 3)
        self.prefix = nnx.List(_build(prefix_key, config.prefix, config))
        unit_keys = jax.random.split(pattern_key, config.repeats)
        has_units = bool(config.pattern) and config.repeats > 0
        self.units = jax.vmap(lambda k: Unit(k, config))(unit_keys) if has_units else None
        self.suffix = nnx.List(_build(suffix_key, config.suffix, config))
        self.pools = _build_pools(jax.random.fold_in(key, 3), config)
        self.config = config

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context, caches: Optional[Caches] = None) -> StackOutput:
        reports, new_caches, layer = {}, {}, 0
        for where, blocks in (("prefix", self.prefix), ("pattern", None), ("suffix", self.suffix)):
            if blocks is None:
                x_BTD, unit_reports, unit_caches = self._units(x_BTD, context, caches, layer)
                layer += self.config.repeats * len(self.config.pattern)
            else:
                x_BTD, unit_reports, unit_caches = self._run(blocks, where, x_BTD, context, caches, layer)
                layer += len(blocks)
            reports |= unit_reports
            new_caches |= unit_caches
        return StackOutput(x=x_BTD, reports=reports, caches=new_caches)

    def block(self, layer: Layer) -> nnx.Module:
        """The block at one place of the depth, with its own parameters."""
        where, number = layer.position.split("_")
        if layer.repeat is None:
            return getattr(self, where)[int(number)]
        return jax.tree.map(lambda leaf: leaf[layer.repeat], self.units).blocks[int(number)]

    def pool(self, block: str) -> Optional[nnx.Module]:
        """What all layers with this block spec share."""
        return self.pools.get(block)

    def _run(
        self, blocks, where: str, x_BTD, context: Context, caches: Optional[Caches], first_layer: int | Int[Array, ""]
    ):
        """Blocks one after the other, each recomputed in the backward pass as `remat` says."""
        reports, new_caches = {}, {}
        for i, block in enumerate(blocks):
            position = f"{where}_{i}"
            pool = self.pool(self.config.positions[position])
            call = _remat(_call_block, self.config, scanned=where == "pattern" and self.config.scan)
            cache = None if caches is None else caches[position]
            here = first_layer + i
            out = call(block, x_BTD, context.batch, context.key, cache, here, context.mode, context.record, pool)
            x_BTD, reports[position], new_caches[position] = out.x, out.report, out.cache
        return x_BTD, reports, new_caches

    def _units(self, x_BTD, context: Context, caches: Optional[Caches], first_layer: int):
        if self.units is None:
            return x_BTD, {}, {}
        config = self.config
        caches_R = (
            None if caches is None else {p: caches[p] for p in (f"pattern_{i}" for i in range(len(config.pattern)))}
        )
        first_R = first_layer + len(config.pattern) * jnp.arange(config.repeats)

        def step(x_BTD, of_unit):
            unit, unit_caches, first = of_unit
            x_BTD, reports, new_caches = self._run(unit.blocks, "pattern", x_BTD, context, unit_caches, first)
            return x_BTD, (reports, new_caches)

        if config.scan:
            x_BTD, (reports, new_caches) = jax.lax.scan(step, x_BTD, (self.units, caches_R, first_R))
            return x_BTD, reports, new_caches
        outputs = []
        for r in range(config.repeats):
            x_BTD, output = step(x_BTD, jax.tree.map(lambda leaf: leaf[r], (self.units, caches_R, first_R)))
            outputs.append(output)
        reports, new_caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return x_BTD, reports, new_caches


def place(path: Sequence[Any]) -> tuple[str, str]:
    """(position, path within the block) of a variable of the stack, from its path in the model."""
    where, *rest = (
        path[1:] if path[1] != "units" else ("pattern", *path[3:])
    )  # stack.prefix.0… or stack.units.blocks.0…
    return f"{where}_{rest[0]}", "/".join(map(str, rest[1:]))


def _build(key: PRNGKeyArray, names: tuple[str, ...], config: ModelConfig) -> list[nnx.Module]:
    return [config.blocks[name].build(jax.random.fold_in(key, i), config) for i, name in enumerate(names)]


def _build_pools(key: PRNGKeyArray, config: ModelConfig) -> nnx.Dict:
    used = dict.fromkeys(layer.block for layer in config.layers)
    built = {name: config.blocks[name].build_pool(jax.random.fold_in(key, i), config) for i, name in enumerate(used)}
    return nnx.Dict({name: pool for name, pool in built.items() if pool is not None})


def _call_block(block, x_BTD, batch, key, cache, layer, mode, record, pool) -> BlockOutput:
    return block(x_BTD, Context(batch=batch, mode=mode, key=key, record=record, pool=pool).at_layer(layer), cache)


def _remat(call: Callable[..., BlockOutput], config: ModelConfig, scanned: bool) -> Callable[..., Any]:
    """`call`, with the values that its backward pass keeps chosen by `config.remat`."""
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_saveable,
        "names": jax.checkpoint_policies.save_only_these_names(*config.remat_names),
    }
    if config.remat == "none":
        return call
    # Under scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(call, policy=policies[config.remat], prevent_cse=not scanned, static_argnums=(6, 7))
