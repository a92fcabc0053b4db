"""Which tokens of a row a layer computes on: what the kinds of `blocks.SEQUENCES` and `blocks.SELECTIONS` share."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.reports import Decisions, Report
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context, Hidden, Totals
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.anchors import at
from sparsejax.ops.selection import Recursing, put

NOWHERE = 2**30
"""A place beyond the end of every cache."""


class Tokens:
    """A config's description of which tokens layers compute on: the base of frozen dataclasses."""

    blocks: tuple[str, ...] = ()

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> nnx.Module:
        """`block`, run on some tokens. `layers`: numbers of the layers with its spec."""
        return block

    def entered(self, x: Hidden, batch: Batch) -> Hidden:
        """What a layer is given of what the one below gives."""
        return x.x if isinstance(x, Recursing) else x

    def room(self, length: int, cached: bool = False) -> int:
        """Tokens that the block has room for, of `length` in a row; cached, of one document."""
        return length

    def empty_cache(self, rows: int, d_model: int) -> dict[str, Array]:
        """What a `BlockCache` holds of these layers, beside what their blocks put there, before there is a token."""
        return {}

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        """Component → cost of a layer, from that of its block on every token, in the mean of so many layers."""
        return of_block

    needs_dense = False
    """Whether layers with a router cannot be inside."""

    def scored(self, reports: dict[str, Report], batch: Batch) -> dict[str, Report]:
        """Reports of a pass that are sums alone."""
        return reports

    def losses(self, report: Report, totals: Totals) -> dict[str, Float[Array, ""]]:
        """Named loss terms of a (possibly stacked) report, weighted and summed over its layers."""
        return {}

    def check_causal(self) -> None:
        """Raises `ConfigError` when a causal model must not do so."""

    def check_cached(self) -> None:
        """Raises `ConfigError` when layers cannot go on from a cache, as generation does."""


@dataclass(frozen=True, kw_only=True)
class EveryToken(Tokens):
    """The plain model."""


ROWS: Any = P(BATCH_AXES)


def context_at(context: Context, token_BS: Int[Array, "B S"]) -> Context:
    """What a block is told that is given these tokens alone, T being none."""
    fields = ("tokens", "targets", "segments", "positions", "loss_mask", "domains")

    def local(context: tuple[Any, ...], token_BS: Array) -> tuple[Any, ...]:
        batch, experts = context
        taken = {name: at(getattr(batch, name), token_BS) for name in fields}
        previous = at(batch.preceding(), token_BS, otherwise=-1)
        batch = dataclasses.replace(batch, **taken, previous=previous, experts=None)
        return batch, None if experts is None else at(experts, token_BS, otherwise=-1)

    # The decisions of all layers stay behind: those of this one are in the context.
    batch = dataclasses.replace(context.batch, experts=None)
    batch, experts = on_each_device(local, (ROWS, ROWS), (ROWS, ROWS))((batch, context.experts), token_BS)
    return dataclasses.replace(context, batch=batch, experts=experts)


def report_of(report: Report, token_BS: Int[Array, "B S"], length: int) -> Report:
    """The report of a block that was given these tokens alone: what was recorded by token, of all of the row."""
    if report.moe is None or report.moe.decisions is None:
        return report
    decisions = report.moe.decisions

    def local(decisions: Decisions, token_BS: Array) -> tuple[Decisions]:
        nothing = lambda found: jnp.zeros((len(found), length, *found.shape[2:]), found.dtype)  # noqa: E731
        spread = jax.tree.map(lambda found: put(nothing(found), found, token_BS), decisions)
        nobody = nothing(decisions.experts) - 1
        return (dataclasses.replace(spread, experts=put(nobody, decisions.experts, token_BS)),)

    (whole,) = on_each_device(local, (ROWS, ROWS), (ROWS,))(decisions, token_BS)
    return dataclasses.replace(report, moe=dataclasses.replace(report.moe, decisions=whole))
