"""Layers that compute on few tokens, beside a small network on all of them: conditional adapters (CoDA,
arXiv:2304.04947), for encoders.

x'_i = x_i + adapter(x_i) + λ_i (block(X̃)_i − x_i): X̃ are the k tokens that are chosen (`blocks.soft_choice`), which see
no others, and λ their weights, 0 for all others. The adapter's last matrix begins at 0."""

import dataclasses
from dataclasses import dataclass
from typing import Optional

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.blocks.context import BlockCache, BlockOutput, Context
from sparsejax.blocks.selection import Decision, SelectedBlock, SelectedTokens
from sparsejax.blocks.soft_choice import SoftChoice, SoftChooser, heavy_report
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear, RMSNorm


@dataclass(frozen=True, kw_only=True)
class ConditionalAdapters(SoftChoice, SelectedTokens):
    """Blocks that need not be trained with adapters: a trained model's can be given them (`--init-from`)."""

    adapter: int = 32  # hidden width of the network that all tokens go through

    def __post_init__(self):
        SelectedTokens.__post_init__(self)
        SoftChoice.__post_init__(self)
        if self.adapter < 1:
            raise ConfigError("adapter", f"{self.adapter} is not positive")

    looks_ahead = True

    def around(
        self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]
    ) -> "AdaptedBlock":
        return AdaptedBlock(block, key, backbone, self)

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        weights = backbone.d_model * (2 * self.adapter + (self.by == "learned"))
        norm = Cost(parameters=backbone.d_model, active=backbone.d_model)
        return super().costs(of_block, backbone, layers) | {"selection": Cost.of_matrices(weights), "norm": norm}

    def check_cached(self) -> None:
        message = "coda chooses among tokens that are not there yet; allowed in generation: mixture_of_depths, d_llm"
        raise ConfigError("name", message)


class Adapter(nnx.Module):
    """Linear, GELU, linear, of tokens that are normalised already."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, hidden: int):
        keys, d = jax.random.split(key), backbone.d_model
        layout = {"out_spec": P(BATCH_AXES, None, None), "dtype": backbone.dtype}
        self.down = Linear(keys[0], "btd,dh->bth", (d, hidden), ("embed", None), stddev=d**-0.5, **layout)
        self.up = Linear(keys[1], "bth,hd->btd", (hidden, d), (None, "embed"), stddev=0.0, **layout)

    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.up(jax.nn.gelu(self.down(h_BTD)))


class AdaptedBlock(SelectedBlock):
    """A block on the tokens that are chosen for it, an adapter on all; one norm for choice and adapter."""

    def __init__(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, settings: ConditionalAdapters):
        chooser_key, adapter_key = jax.random.split(key)
        self.block, self.settings = block, settings
        self.adapter_norm = RMSNorm(backbone.d_model, backbone.norm_epsilon)
        self.chooser = SoftChooser(chooser_key, backbone, settings.capacity, settings)
        self.adapter = Adapter(adapter_key, backbone, settings.adapter)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, cache: Optional[BlockCache] = None
    ) -> BlockOutput:
        h_BTD = self.adapter_norm(x_BTD)
        with jax.named_scope("select"):
            chosen = self.chooser(h_BTD, context)
        decision = Decision(chosen=chosen.chosen, gate=chosen.weight, slots=chosen.slots)
        compact = self.settings.execution == "compact"
        out = self._compact(x_BTD, decision, context) if compact else self._masked(x_BTD, decision, context, cache)
        with jax.named_scope("adapter"):
            adapted_BTD = self.adapter(h_BTD)
        assert isinstance(out.x, jax.Array)  # one stream
        report = dataclasses.replace(
            out.report,
            heavy=heavy_report((chosen,), context.batch.segments > 0),
            kept=chosen.chosen if context.record else None,
        )
        return dataclasses.replace(out, x=out.x + adapted_BTD, report=report)
