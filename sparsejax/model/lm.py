"""The decoder language model."""

from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport, Report, Reports
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import Context, Mode, Totals
from sparsejax.model.config import Layer, ModelConfig
from sparsejax.model.stack import Caches, Stack, place
from sparsejax.nn.attention import HEADS_SPEC, ROWS_SPEC, KVCache
from sparsejax.nn.embed import Embedding, Head
from sparsejax.nn.linear import RMSNorm
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.losses import cross_entropies


@struct
class ModelOutput:
    """`logits` are float32. `reports` become sums by `scored`."""

    logits: Float[Array, "B T V"]
    reports: dict[str, Report]
    caches: dict[str, Optional[KVCache]]


class LanguageModel(nnx.Module):
    """Embedding, stack of blocks, final norm, head. Build it inside a mesh (`jax.set_mesh`)."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig):
        embed_key, stack_key, head_key = jax.random.split(key, 3)
        self.embedding = Embedding(embed_key, config.vocab_size, config.d_model, config.dtype)
        self.stack = Stack(stack_key, config)
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.head = None if config.tied_head else Head(head_key, config.vocab_size, config.d_model, config.dtype)
        self.config = config

    def __call__(
        self,
        batch: Batch,
        *,
        mode: Mode,
        key: Optional[PRNGKeyArray] = None,
        caches: Optional[Caches] = None,
        record: bool = False,
    ) -> ModelOutput:
        """Logits of the next token at every position.

        Args:
          mode: 'train' (noise from `key`, training capacity), 'eval', or 'generate' (no token is dropped).
          caches: from `init_caches`; the batch's `positions` then say where its tokens stand.
          record: reports hold the routers' decisions, token by token.
        """
        x_BTD = self.embedding(batch.tokens)
        out = self.stack(x_BTD, Context(batch=batch, mode=mode, key=key, record=record), caches)
        head = self.embedding if self.head is None else self.head
        logits_BTV = soft_capped(head.logits(self.final_norm(out.x)), self.config.logit_soft_cap)
        return ModelOutput(logits=logits_BTV, reports=out.reports, caches=out.caches)


def init_caches(config: ModelConfig, rows: int, length: int) -> dict[str, KVCache]:
    """Empty key/value caches of `length` positions for every block, laid out as attention leaves them.

    Raises `ConfigError` when a block cannot go on from a cache."""
    for name in dict.fromkeys(config.positions.values()):
        try:
            config.blocks[name].check_cached()
        except ConfigError as error:
            raise error.below(f"model.blocks.{name}") from None

    def zeros(shape, dtype, spec: P, stacked: bool):
        shape, spec = ((config.repeats, *shape), P(None, *spec)) if stacked else (shape, spec)
        return jnp.zeros(shape, dtype, out_sharding=spec)

    def cache(stacked: bool) -> KVCache:
        shape = (rows, length, config.kv_heads, config.width_of_head)
        keys = zeros(shape, config.dtype, HEADS_SPEC, stacked)
        return KVCache(k=keys, v=keys, segments=zeros((rows, length), jnp.int32, ROWS_SPEC, stacked))

    return {position: cache(position.startswith("pattern")) for position in config.positions}


def scored(config: ModelConfig, out: ModelOutput, batch: Batch) -> tuple[Float[Array, ""], dict[str, Report]]:
    """(Σ cross entropy over the batch's targets, reports that are sums alone). The reward of what a layer chose for a
    token is the log-probability of its target."""
    nll_BT = cross_entropies(out.logits, batch.targets, batch.loss_mask)
    reports = {
        position: config.blocks[block].reward(out.reports[position], -nll_BT, batch.loss_mask)
        for position, block in config.positions.items()
    }
    return nll_BT.sum(), reports


def auxiliary_losses(config: ModelConfig, reports: Reports, totals: Totals) -> dict[str, Float[Array, ""]]:
    """Every block's weighted loss terms by name, summed over layers. They are read from the reports that are logged."""
    terms: dict[str, Float[Array, ""]] = {}
    for position, block in config.positions.items():
        counted = None if totals.reports is None else totals.reports[position]
        for name, value in config.blocks[block].losses(reports[position], totals, counted).items():
            terms[name] = terms[name] + value if name in terms else value
    return terms


def settle(config: ModelConfig, reports: Reports) -> dict[str, Report]:
    """Reports summed over the microbatches of a step, with what only the whole step can tell."""
    return {position: config.blocks[block].settle(reports[position]) for position, block in config.positions.items()}


def next_balancing(config: ModelConfig, model_state: nnx.State, reports: Reports) -> nnx.State:
    """The model's balancing state after a step with these settled reports: once per step, whatever remat recomputes."""
    flat = dict(nnx.to_flat_state(model_state))
    for path, variable in flat.items():
        position, _ = place(path)
        spec = config.blocks[config.positions[position]]
        flat[path] = variable.replace(spec.next_state(variable[...], reports[position]))
    return nnx.from_flat_state(flat)


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
