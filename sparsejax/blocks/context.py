"""What every block is given beside the residual stream, and what it gives back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Optional

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.reports import Report, Reports
from sparsejax.base.structs import Batch, struct
from sparsejax.memory.layer import MemoryCache
from sparsejax.nn.attention import KVCache
from sparsejax.nn.table import Given, Reader
from sparsejax.ops.halting import Halted
from sparsejax.ops.selection import Recursing
from sparsejax.ops.skim import Survivors
from sparsejax.ops.streams import Streams

Mode = Literal["train", "eval", "generate"]
"""train: noise, training capacity. eval: no noise, evaluation capacity. generate: no noise, a slot for every token."""


Hidden = Float[Array, "B T D"] | Streams | Survivors | Halted | Recursing
"""What goes from layer to layer: one residual stream, several, that of the tokens that are left, or one with outputs of
tokens that have halted, or with the tokens that go on from recursion to recursion."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The batch a block runs on, seen from one layer, whose number `layer` is. `key` is None outside training.

    Where no row is `active`, a block may leave `x` as it is, and its report empty; what it returns for other rows is
    not used. With `record` the reports hold the decisions of the routers; with `experts` routers choose these."""

    batch: Batch
    mode: Mode
    key: Optional[PRNGKeyArray] = None
    step_key: Optional[PRNGKeyArray] = None  # the same for all layers, `key` where there is but one
    record: bool = False
    experts: Optional[Int[Array, "B T K"]] = None
    layer: int | Int[Array, ""] = 0
    pool: Optional[nnx.Module] = None  # what the block shares with all layers of its spec (`BlockSpec.build_pool`)
    readers: Mapping[str, Reader | Given] = field(default_factory=dict)  # of the lookup tables of the layer's memories
    embedded: Optional[Float[Array, "B T D"]] = None  # the output of the model's embedding
    logits: Optional[Float[Array, "B T E"]] = None  # of the router below, for one that adds to them
    seen: Optional[Int[Array, "B T"]] = None  # segments of tokens as keys, 0 for those that others do not see
    active: Optional[Bool[Array, " B"]] = None  # rows that have left no exit; None: all
    skipped_keys: bool = True  # whether rows that have left remember keys and values of layers that they skip

    def at_layer(self, layer: int | Int[Array, ""]) -> "Context":
        """The same with a key, and decisions to be taken again, of the layer's own."""
        key = None if self.key is None else jax.random.fold_in(self.key, layer)
        all_layers = self.batch.experts
        experts = None if all_layers is None else jax.lax.dynamic_index_in_dim(all_layers, layer, 2, keepdims=False)
        return dataclasses.replace(self, key=key, step_key=self.key, experts=experts, layer=layer)


@struct
class Totals:
    """What one step's sums are divided by: counted over all of its microbatches before the first forward pass.

    `reports` holds the summed reports of a counting pass, when a loss needs the loads of the whole step and there are
    several microbatches."""

    targets: Int[Array, ""]
    tokens: Int[Array, ""]
    rows: Int[Array, ""]
    microbatches: int
    reports: Optional[Reports] = None


@struct
class BlockCache:
    """What a block remembers of the tokens before (leading axes: repeats of the layer)."""

    attention: Optional[KVCache] = None  # none where there is no attention
    memory: dict[str, MemoryCache] = field(default_factory=dict)
    anchor: Optional[Float[Array, "*R B D"]] = None  # what tokens take from their anchor; float32
    written: Optional[Int[Array, "*R B"]] = None  # tokens so far that the layer computed on


@struct
class BlockOutput:
    """`reads` are the numbers of the rows that were read of lookup tables, by memory; `aside` is what is to be added to
    other streams, counted from the one that the block computes on."""

    x: Hidden
    report: Report
    cache: Optional[BlockCache] = None
    reads: dict[str, Int[Array, "B T K"]] = field(default_factory=dict)
    aside: dict[int, Float[Array, "B T D"]] = field(default_factory=dict)
