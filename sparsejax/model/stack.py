"""The stack of blocks: prefix, the repeated pattern (scanned, or unrolled with the same parameters), suffix."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.reports import Report, handed_on
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Hidden, Mode
from sparsejax.blocks.lookups import build_lookups
from sparsejax.blocks.tokens import EveryToken
from sparsejax.model.config import EMBEDDING, Layer, ModelConfig
from sparsejax.model.exits import rescaled
from sparsejax.model.tables import NOTHING_READ, Into, Prefetched, readers
from sparsejax.nn.table import Table
from sparsejax.ops.dropout import rows_drawn
from sparsejax.ops.halting import Halted, Step

Caches = Mapping[str, BlockCache]


@struct
class StackOutput:
    """`reports`, `caches` and `reads` by position; those of the pattern have a leading axis R. `states` is the residual
    at each exit but the last, or what is read of every step."""

    x: Hidden
    reports: dict[str, Report]
    caches: dict[str, Optional[BlockCache]]
    reads: dict[str, dict[str, Int[Array, "*R B T K"]]]
    states: tuple[Hidden | Step, ...] = ()

    def after(self, position: str, before: BlockOutput) -> "StackOutput":
        """The same with what came before the stack, at this position."""
        reports, caches = {position: before.report, **self.reports}, {position: before.cache, **self.caches}
        reads = {position: before.reads, **self.reads}
        return StackOutput(x=self.x, reports=reports, caches=caches, reads=reads, states=self.states)


class Unit(nnx.Module):
    """One repeat of the pattern."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        keys = jax.random.split(key, len(config.pattern))
        self.blocks = nnx.List([_build(k, f"pattern_{i}", config) for i, k in enumerate(keys)])


class Stack(nnx.Module):
    """All blocks of the model. The pattern's parameters are stacked along a leading axis R, scanned or not; tied ones
    along an axis of 1. What all layers of a block spec share is in `pools`, by the spec's name, and no part of the
    scanned axis."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        prefix_key, pattern_key, suffix_key = jax.random.split(key, 3)
        self.prefix = nnx.List(_build_all(prefix_key, "prefix", config))
        unit_keys = jax.random.split(pattern_key, 1 if config.tied_repeats else config.repeats)
        has_units = bool(config.pattern) and config.repeats > 0
        self.units = jax.vmap(lambda k: Unit(k, config))(unit_keys) if has_units else None
        self.suffix = nnx.List(_build_all(suffix_key, "suffix", config))
        self.pools = _build_pools(jax.random.fold_in(key, 3), config)
        self.config = config

    def __call__(
        self,
        x: Hidden,
        context: Context,
        caches: Optional[Caches] = None,
        tables: Optional[Mapping[str, Table]] = None,
        prefetched: Optional[Prefetched] = None,
        into: Optional[Into] = None,
    ) -> StackOutput:
        """`tables` are those of the model's memories, and `prefetched` what has been read of them; gradients of what is
        read go `into`."""
        run = _Pass(self, context, caches, tables or {}, prefetched or NOTHING_READ, into)
        x = run.blocks(self.prefix, "prefix", x, 0)
        x = run.units(x, len(self.prefix))
        x = run.blocks(self.suffix, "suffix", x, self.config.num_layers - len(self.suffix))
        x = EveryToken().entered(x, context.batch)
        return StackOutput(x=x, reports=run.reports, caches=run.caches, reads=run.reads, states=run.at_exits())

    def block(self, layer: Layer) -> nnx.Module:
        """The block at one place of the depth, with its own parameters."""
        where, number = layer.position.split("_")
        if layer.repeat is None:
            return getattr(self, where)[int(number)]
        return jax.tree.map(lambda leaf: leaf[self.config.stored(layer)], self.units).blocks[int(number)]

    def pool(self, block: str) -> Optional[nnx.Module]:
        """What all layers with this block spec share."""
        return self.pools.get(block)


class _Pass:
    """One pass through a stack; collects by position what blocks return beside the residual stream."""

    def __init__(
        self,
        stack: Stack,
        context: Context,
        caches: Optional[Caches],
        tables: Mapping[str, Table],
        prefetched: Prefetched,
        into: Optional[Into],
    ):
        self.stack, self.config, self.context, self.tables = stack, stack.config, context, tables
        self.given_caches, self.prefetched, self.into = caches, prefetched, into
        self.reports, self.caches, self.reads, self.states = {}, {}, {}, {}
        self.logits = _no_logits(self.config, context.batch)
        self.depths = _depths(self.config, context.mode)
        self.exit_positions = {layer.position for layer in self.config.layers if layer.index + 1 in self.depths}

    def blocks(self, blocks: Sequence[nnx.Module], where: str, x: Hidden, first_layer: int | Int[Array, ""]) -> Hidden:
        """Blocks one after the other, each recomputed in the backward pass as `remat` says."""
        context = self.context
        for i, block in enumerate(blocks):
            position, here = f"{where}_{i}", first_layer + i
            name = self.config.positions[position]
            x, pool = self.config.tokens_of(name).entered(x, context.batch), self.stack.pool(name)
            into = None if self.into is None else self.into.get(position)
            reading = readers(self.config, self.tables, self.prefetched, position, here, into)
            call = _remat(
                functools.partial(_call_block, self.config),
                self.config,
                scanned=where == "pattern" and self.config.scan,
            )
            cache = None if self.given_caches is None else self.given_caches[position]
            given = (context.batch, context.key, cache, here, context.mode, context.record, pool)
            out = call(block, x, *given, reading, context.embedded, self.logits)
            x, self.caches[position] = out.x, out.cache
            self.reports[position], self.logits = handed_on(out.report, self.logits)
            self.reads[position] = out.reads
            if position in self.exit_positions:
                x, self.states[position] = _parted(self.config, x, here)
        return x

    def at_exits(self) -> tuple[Hidden | Step, ...]:
        """The residual after each layer that has an exit. The scan hands on that of every repeat: what its backward
        pass keeps, too."""
        by_depth = {layer.index + 1: layer for layer in self.config.layers}
        layers = [by_depth[depth] for depth in self.depths]
        one_of = lambda state, repeat: state if repeat is None else jax.tree.map(lambda a: a[repeat], state)  # noqa: E731
        return tuple(one_of(self.states[layer.position], layer.repeat) for layer in layers)

    def units(self, x: Hidden, first_layer: int) -> Hidden:
        """The pattern, so often as it repeats."""
        units, config = self.stack.units, self.config
        if units is None:
            return x
        x = config.tokens_of(config.pattern[0]).entered(x, self.context.batch)  # a scan carries what it is given
        first_of = lambda repeat: first_layer + len(config.pattern) * repeat  # noqa: E731
        stacked = lambda given: {p: v for p, v in given.items() if p.startswith("pattern")} if given else None  # noqa: E731

        def step(carried, of_unit, first):
            x, logits = carried
            unit, caches, into, own = of_unit
            unit = jax.tree.map(lambda leaf: leaf[0], units) if config.tied_repeats else unit
            prefetched = dataclasses.replace(self.prefetched, own=own)
            run = _Pass(self.stack, self.context, caches, self.tables, prefetched, into)
            run.logits = logits
            x = run.blocks(unit.blocks, "pattern", x, first)
            return (x, run.logits), (run.reports, run.caches, run.reads, run.states)

        of_repeats = None if config.tied_repeats else units
        per_unit = of_repeats, stacked(self.given_caches), stacked(self.into), self.prefetched.stacked()
        if config.scan:
            number_R = jnp.arange(config.repeats)
            repeat = lambda carried, of: step(carried, of[0], first_of(of[1]))  # noqa: E731
            carried, found = jax.lax.scan(repeat, (x, self.logits), (per_unit, number_R))
        else:
            carried, outputs = (x, self.logits), []
            for r in range(config.repeats):
                carried, output = step(carried, jax.tree.map(lambda leaf: leaf[r], per_unit), first_of(r))
                outputs.append(output)
            found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        x, self.logits = carried
        reports, caches, reads, states = found
        self.reports |= reports
        self.caches |= caches
        self.reads |= reads
        self.states |= states
        return x


def place(path: Sequence[Any]) -> tuple[str, str]:
    """(position, path within the block) of a variable, from its path in the model."""
    if path[0] != "stack":
        return EMBEDDING, "/".join(map(str, path))
    position, inside = in_layer(path)
    while inside[0] == "block":  # of one with several streams, that computes on some tokens, or that tokens halt after
        inside = inside[1:]
    return position, "/".join(map(str, inside))


def in_layer(path: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """(position, path within the layer) of a variable of the stack's layers."""
    # stack.prefix.0… or stack.units.blocks.0…
    where, number, *inside = path[1:] if path[1] != "units" else ("pattern", *path[3:])
    return f"{where}_{number}", tuple(inside)


def _build_all(key: PRNGKeyArray, where: str, config: ModelConfig) -> list[nnx.Module]:
    return [_build(jax.random.fold_in(key, i), f"{where}_{i}", config) for i in range(len(getattr(config, where)))]


def _build(key: PRNGKeyArray, position: str, config: ModelConfig) -> nnx.Module:
    """The block of a position, with its lookup layers, run on its tokens and joined to the residual."""
    name = config.positions[position]
    block: Any = config.blocks[name].build(key, config)
    memory = config.memories_at(position)
    if memory:
        block.memories = build_lookups(jax.random.fold_in(key, 2), memory, config, config.vocab_size)
    alike = tuple(layer.index for layer in config.layers if layer.block == name)
    block = config.tokens_of(name).around(block, jax.random.fold_in(key, 3), config, alike)
    block = config.skim.around(block, jax.random.fold_in(key, 4), config)
    block = config.halting.around(block, jax.random.fold_in(key, 5), config)
    layers = tuple(layer.index for layer in config.layers if layer.position == position)
    return config.streams.around(block, jax.random.fold_in(key, 1), config, layers)


def _build_pools(key: PRNGKeyArray, config: ModelConfig) -> nnx.Dict:
    used = dict.fromkeys(layer.block for layer in config.layers)
    built = {name: config.blocks[name].build_pool(jax.random.fold_in(key, i), config) for i, name in enumerate(used)}
    return nnx.Dict({name: pool for name, pool in built.items() if pool is not None})


def _depths(config: ModelConfig, mode: Mode) -> tuple[int, ...]:
    """After how many layers something is read, beside the last."""
    by_step = config.halting.by_step and mode == "train"
    return tuple(range(1, config.num_layers + 1)) if by_step else config.exits.depths


def _parted(config: ModelConfig, x: Hidden, layer: int | Int[Array, ""]) -> tuple[Hidden, Hidden | Step]:
    """What goes on after a layer and what its exit reads, if it has one."""
    if isinstance(x, Halted):
        return x, Step(x=x.x, weight=x.weight)
    factors = config.exits.rescaled
    if not factors:
        return x, x
    by_layer = jnp.asarray([factors.get(depth, (1.0, 1.0)) for depth in range(1, config.num_layers + 1)], jnp.float32)
    of_head, onwards = by_layer[layer]
    each = lambda factor: jax.tree.map(lambda a: rescaled(a, factor), x)  # noqa: E731
    return each(onwards), each(of_head)


def _no_logits(config: ModelConfig, batch: Batch) -> Optional[Float[Array, "B T E"]]:
    """What routers add to where there is none below, if routers of this model add anything."""
    if not config.hands_on:
        return None
    return jnp.zeros((*batch.tokens.shape, config.hands_on), jnp.float32, out_sharding=P(BATCH_AXES, None, None))


def _call_block(
    config, block, x, batch, key, cache, layer, mode, record, pool, reading, embedded, logits
) -> BlockOutput:
    seen = Context(batch=batch, mode=mode, key=key, record=record, pool=pool, readers=reading, embedded=embedded)
    seen = dataclasses.replace(seen, logits=logits).at_layer(layer)
    if not config.layer_dropout or seen.key is None:
        return block(x, seen, cache)
    rate = config.layer_dropout * (2.0 ** (layer / max(config.num_layers - 1, 1)) - 1)  # LayerSkip, arXiv:2404.16710
    stays_B = ~rows_drawn(jax.random.bits(jax.random.fold_in(seen.key, 0)), batch.rows, rate)
    out = block(x, seen, cache)  # of all rows: what is skipped is no work that is saved
    new = jax.tree.map(lambda new, old: jnp.where(stays_B[:, None, None], new, old), out.x, x)
    return dataclasses.replace(out, x=new)


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
