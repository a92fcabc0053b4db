"""The language model: a decoder, or an encoder of masked tokens or whole rows."""

import dataclasses
from collections.abc import Sequence
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport, Report, Reports, SkimReport
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.budgets import Price, Work
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Hidden, Mode, Totals
from sparsejax.blocks.halting import NoHalting
from sparsejax.blocks.lookups import Lookups, build_lookups
from sparsejax.memory.address import Fixed, Running
from sparsejax.memory.layer import empty_cache
from sparsejax.model.config import EMBEDDING, Layer, ModelConfig
from sparsejax.model.cost import spared_work
from sparsejax.model.stack import Caches, Stack, place
from sparsejax.model.tables import Into, Prefetched, build_tables, prefetch, readers
from sparsejax.nn.attention import HEADS_SPEC, ROWS_SPEC, KVCache
from sparsejax.nn.embed import ClassHead, Embedding, Head
from sparsejax.nn.linear import RMSNorm
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.halting import Step
from sparsejax.ops.head_loss import HeadLosses, Weighting

LOOKUP_BALANCE = "lookup_balance"


@struct
class ModelOutput:
    """`features` is what the head reads: of classes, one vector a row. `logits` are float32; training reads
    `LanguageModel.losses` in their place. `reports` become sums by `scored`. `reads` are what was read of lookup
    tables, by position and memory."""

    features: Float[Array, "B T D"]
    logits: Float[Array, "B T V"]
    reports: dict[str, Report]
    caches: dict[str, Optional[BlockCache]]
    reads: dict[str, dict[str, Int[Array, "*R B T K"]]]
    exits: tuple[Float[Array, "B S D"], ...] = ()  # what the heads of the exits read
    steps: tuple[Step, ...] = ()  # what the head reads of every step of a halting that loses by step


class LanguageModel(nnx.Module):
    """Embedding, stack of blocks, final norm, head. Build it inside a mesh (`jax.set_mesh`)."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        embed_key, stack_key, head_key = jax.random.split(key, 3)
        d_model, residual = config.d_model, config.streams
        self.embedding = Embedding(
            embed_key, config.vocab_size, residual.table_width(d_model), config.dtype, d_model**0.5
        )
        self.stack = Stack(stack_key, config)
        self.final_norm = RMSNorm(residual.norm_width(d_model), config.norm_epsilon)
        self.ends = residual.ends(jax.random.fold_in(key, 5), config)
        width = residual.head_width(d_model)
        self.head = config.head.build(head_key, config.vocab_size, width, config.dtype, config.tied_head)
        at_embedding = config.memories_at(EMBEDDING)
        self.memories = build_lookups(jax.random.fold_in(key, 3), at_embedding, config, config.vocab_size)
        self.tables = build_tables(jax.random.fold_in(key, 4), config)
        weight = lambda key: config.head.exit_weight(key, config.vocab_size, width, config.tied_head)  # noqa: E731
        self.exits = config.exits.build(jax.random.fold_in(key, 6), config, residual.norm_width(d_model), weight)
        self.config = config

    def __call__(
        self,
        batch: Batch,
        *,
        mode: Mode,
        key: Optional[PRNGKeyArray] = None,
        caches: Optional[Caches] = None,
        record: bool = False,
        into: Optional[Into] = None,
    ) -> ModelOutput:
        """Scores of tokens at every position, or of classes at one.

        Args:
          mode: 'train' (noise from `key`, training capacity), 'eval', or 'generate' (no token is dropped).
          caches: from `init_caches`; the batch's `positions` then say where its tokens stand.
          record: reports hold the routers' decisions, token by token.
          into: zeros (`row_zeros`), whose gradient is that of the rows which are read of lookup tables.
        """
        x_BTD = self.embedding(batch.tokens)
        context = Context(batch=batch, mode=mode, key=key, record=record, embedded=x_BTD)
        prefetched = prefetch(self.config, self.tables, batch, caches)
        begun = self.look_up(x_BTD, context, prefetched, caches, into)
        out = self.stack(self.spread(begun.x, batch), context, caches, self.tables, prefetched, into)
        if self.memories:
            out = out.after(EMBEDDING, begun)
        features_BTD = self.read(out.x, batch)
        return ModelOutput(
            features=features_BTD,
            logits=soft_capped(self._head.logits(features_BTD), self.config.logit_soft_cap),
            reports=out.reports,
            caches=out.caches,
            reads=out.reads,
            exits=tuple(self.at_exit(n, at, batch) for n, at in enumerate(out.states) if not isinstance(at, Step)),
            steps=tuple(self._at_step(state) for state in out.states if isinstance(state, Step)),
        )

    def spread(self, x_BTD: Hidden, batch: Batch) -> Hidden:
        """What the first layer gets."""
        assert isinstance(x_BTD, jax.Array)  # what comes before the stack is one stream
        return self.config.halting.begin(self.config.skim.begin(self.ends.spread(x_BTD), batch), batch)

    def read(self, x: Hidden, batch: Batch, norm: Optional[RMSNorm] = None) -> Float[Array, "B S D"]:
        """What the head gets, after the final norm or another."""
        left, weight_BT = self.config.skim.end(self.config.halting.end(x), batch)
        return self.config.head.pooled(self.ends.read(left, self.final_norm if norm is None else norm), weight_BT)

    def at_exit(self, number: int, state: Hidden, batch: Batch) -> Float[Array, "B S D"]:
        """What the head of an exit, counted from 0, reads of the residual there."""
        return self.read(state, batch, None if self.exits.norms is None else self.exits.norms[number])

    def exit_logits(self, features_BTD: Float[Array, "B S D"], depth: int) -> Float[Array, "B S V"]:
        """Scores by the head after so many layers, before any soft cap."""
        depths = self.config.exits.depths
        if self.exits.heads is None or depth not in depths:
            return self._head.logits(features_BTD)
        return self._head.logits(features_BTD, self.exits.heads[depths.index(depth)].weight)

    def look_up(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        prefetched: Prefetched,
        caches: Optional[Caches] = None,
        into: Optional[Into] = None,
    ) -> BlockOutput:
        """The embedded tokens after the memories of the embedding."""
        here = None if into is None else into.get(EMBEDDING)
        reading = readers(self.config, self.tables, prefetched, EMBEDDING, 0, here)
        context = dataclasses.replace(context, readers=reading)
        lookups = Lookups(self.memories, context, None if caches is None else caches.get(EMBEDDING))
        x_BTD, cache = lookups.at(EMBEDDING, x_BTD), BlockCache(memory=lookups.caches)
        return BlockOutput(x=x_BTD, report=Report(memory=lookups.reports), cache=cache, reads=lookups.reads)

    def exit_losses(self, out: ModelOutput, batch: Batch, weighting: Weighting) -> HeadLosses:
        """What every exit of a pass loses, the last one's nll being that of the model, without their logits."""
        passes = (*out.exits, out.features)
        own = [] if self.exits.heads is None else [head.weight[...] for head in self.exits.heads]
        more = {
            "soft_cap": self.config.logit_soft_cap,
            "distill": self.config.exits.distills,
            "heads": (*range(1, len(own) + 1), 0) if own else (),
        }
        return self._head.losses(passes, batch, weighting, own, **more)

    def losses(self, outputs: Sequence[ModelOutput], batch: Batch, consistency: Optional[float] = None) -> HeadLosses:
        """What passes over the same batch lose, and how far two of them differ, without their logits."""
        if outputs[0].steps:
            return self._expected(outputs[0].steps, batch)
        passes, soft_cap = tuple(out.features for out in outputs), self.config.logit_soft_cap
        return self._head.losses(passes, batch, soft_cap=soft_cap, consistency=consistency)

    def _at_step(self, step: Step) -> Step:
        return Step(x=self.ends.read(step.x, self.final_norm), weight=step.weight)

    def _expected(self, steps: Sequence[Step], batch: Batch) -> HeadLosses:
        """Of one pass whose steps each token weighs itself. The head's losses know no gradient of the weights: it is
        that of a sum whose value is 0."""
        shares = [jax.lax.stop_gradient(step.weight) for step in steps]
        lost = self._head.losses(
            tuple(step.x for step in steps), batch, shares=shares, soft_cap=self.config.logit_soft_cap
        )
        nll = [jax.lax.stop_gradient(each) for each in lost.nll]
        of_weights = [jnp.sum((s.weight - w) * each) for s, w, each in zip(steps, shares, nll, strict=True)]
        expected_BT = sum((w * each for w, each in zip(shares, nll, strict=True)), jnp.zeros_like(nll[0]))
        total = lost.total + sum(of_weights)
        return dataclasses.replace(lost, total=total, nll=(expected_BT,), correct=lost.correct[-1:])

    @property
    def _head(self) -> Embedding | Head | ClassHead:
        return self.embedding if self.head is None else self.head


def init_caches(config: ModelConfig, rows: int, length: int) -> dict[str, BlockCache]:
    """Empty caches of `length` positions for every block, laid out as attention leaves them.

    Raises `ConfigError` when a block cannot go on from a cache."""
    if not config.causal:
        raise ConfigError("model.causal", "false: tokens see those after them, and generation has none; it needs true")
    if not config.head.of_tokens:
        raise ConfigError("model.head", "classes: there are no scores of tokens to generate from; it needs tokens")
    for name in dict.fromkeys(config.positions.values()):
        try:
            config.blocks[name].check_cached()
        except ConfigError as error:
            raise error.below(f"model.blocks.{name}") from None
    for name, tokens in (("sequence", config.sequence), ("select", config.select)):
        try:
            tokens.check_cached()
        except ConfigError as error:
            raise error.below(f"model.{name}") from None

    def stacked(array: Array) -> Array:
        """One for every repeat."""
        shape, spec = (config.repeats, *array.shape), P(None, *jax.typeof(array).sharding.spec)
        return jnp.broadcast_to(array[None], shape, out_sharding=spec)

    def cache(position: str) -> BlockCache:
        memories = config.memories_at(position)
        memory = {name: empty_cache(spec, config, rows) for name, spec in memories.items()}
        if position == EMBEDDING:
            return BlockCache(memory=memory)
        tokens = config.tokens_of(config.positions[position])
        size = rows, tokens.room(length, cached=True)
        keys = jnp.zeros((*size, config.kv_heads, config.width_of_head), config.dtype, out_sharding=HEADS_SPEC)
        segments = jnp.zeros(size, jnp.int32, out_sharding=ROWS_SPEC)
        of_tokens = tokens.empty_cache(rows, config.d_model)
        block = BlockCache(attention=KVCache(k=keys, v=keys, segments=segments), memory=memory, **of_tokens)
        return jax.tree.map(stacked, block) if position.startswith("pattern") else block

    positions = [*([EMBEDDING] if config.memories_at(EMBEDDING) else []), *config.positions]
    return {position: cache(position) for position in positions}


def scored(config: ModelConfig, reports: Reports, nll_BT: Float[Array, "B T"], batch: Batch) -> dict[str, Report]:
    """Reports that are sums alone. The reward of what a layer chose for a token is the log-probability of its
    target."""
    rewarded = {
        position: config.blocks[block].reward(reports[position], -nll_BT, batch.loss_mask)
        for position, block in config.positions.items()
    }
    return config.select.scored({**reports, **rewarded}, batch)


def auxiliary_losses(config: ModelConfig, reports: Reports, totals: Totals) -> dict[str, Float[Array, ""]]:
    """Every block's weighted loss terms by name, summed over layers. They are read from the reports that are logged."""
    terms: dict[str, Float[Array, ""]] = {}
    for position, block in config.positions.items():
        counted = None if totals.reports is None else totals.reports[position]
        of_block = config.blocks[block].losses(reports[position], totals, counted)
        of_tokens = config.tokens_of(block).losses(reports[position], totals)
        for name, value in (of_block | of_tokens).items():
            terms[name] = terms[name] + value if name in terms else value
    for report in reports.values():
        for name, found in report.memory.items():
            value = config.memory[name].address.balance_loss(found, totals.tokens)
            if value is not None:
                terms[LOOKUP_BALANCE] = terms[LOOKUP_BALANCE] + value if LOOKUP_BALANCE in terms else value
    if config.skim.learns:
        counted = None if totals.reports is None else _skimmed(config, totals.reports)
        terms |= config.skim.losses(_skimmed(config, reports), _spared_works(config), totals, counted)
    if isinstance(config.halting, NoHalting):
        return terms
    by_layer = lambda reports: None if reports is None else list(layer_reports(config, reports).values())  # noqa: E731
    return terms | config.halting.losses(by_layer(reports) or [], totals, by_layer(totals.reports))


def _skimmed(config: ModelConfig, reports: Reports) -> list[SkimReport]:
    """Of each layer, from the input of the model to its output."""
    found = [report.skim for report in layer_reports(config, reports).values()]
    assert None not in found  # with `config.skim` all layers have one
    return [each for each in found if each is not None]


def _spared_works(config: ModelConfig) -> list[Work]:
    return [spared_work(config, layer.block) for layer in config.layers]


def settle(config: ModelConfig, reports: Reports) -> dict[str, Report]:
    """Reports summed over the microbatches of a step, with what only the whole step can tell."""
    settled = {position: config.blocks[block].settle(reports[position]) for position, block in config.positions.items()}
    return {**reports, **settled}


def next_model_state(config: ModelConfig, model_state: nnx.State, reports: Reports) -> nnx.State:
    """The model's other variables after a step with these settled reports: balancing states and running means move once
    per step, whatever remat recomputes."""
    flat = dict(nnx.to_flat_state(model_state))
    for path, variable in flat.items():
        position, inside = place(path)
        if isinstance(variable, Fixed):
            continue
        if isinstance(variable, Running):
            name = inside.split("/")[-2]
            measured = reports[position].memory[name].measured
            assert measured is not None  # what moves it measures it
            moved = config.memory[name].address.next_running(variable[...], measured)
        elif isinstance(variable, Price):
            moved = config.skim.next_price(variable[...], _skimmed(config, reports), _spared_works(config))
        else:
            spec = config.blocks[config.positions[position]]
            moved = spec.next_state(variable[...], reports[position])
        flat[path] = variable.replace(moved)
    return nnx.from_flat_state(flat)


def without_measured(reports: Reports) -> dict[str, Report]:
    """What is reported: `next_model_state` alone wants what addresses measured, which may be large."""

    def plain(report: Report) -> Report:
        memory = {name: dataclasses.replace(found, measured=None) for name, found in report.memory.items()}
        return dataclasses.replace(report, memory=memory)

    return {position: plain(report) for position, report in reports.items()}


def layer_reports(config: ModelConfig, reports: Reports) -> dict[str, Report]:
    """One unstacked report per layer, by `Layer.name`, from the input of the model to its output."""

    def unstacked(layer: Layer) -> Report:
        report = reports[layer.position]
        return report if layer.repeat is None else jax.tree.map(lambda leaf: leaf[layer.repeat], report)

    return {layer.name: unstacked(layer) for layer in config.layers}


def moe_layers(config: ModelConfig, reports: Reports) -> dict[str, MoEReport]:
    """`layer_reports` of the layers that have experts."""
    layers = layer_reports(config, reports)
    return {name: report.moe for name, report in layers.items() if report.moe is not None}
