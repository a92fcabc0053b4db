"""What a kind of block tells the rest of the house: how it is built, what it costs, how it splits, which losses it
adds.

A new kind is one file with a `BlockSpec`, and one line in `blocks.BLOCKS`; model, step, metrics and config checks ask
the spec and know no kind by name."""

import abc
from typing import Any, ClassVar, Optional

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks.context import Mode, Totals
from sparsejax.blocks.upcycling import Arrays, copied
from sparsejax.nn.backbone import Backbone


class BlockSpec(abc.ABC):
    """A config's description of one kind of block: the base of the frozen dataclasses in `blocks.BLOCKS`."""

    has_network: ClassVar[bool] = True
    """Whether there is a feed-forward part, with a norm before it."""

    @abc.abstractmethod
    def build(self, key: PRNGKeyArray, backbone: Backbone) -> nnx.Module:
        """A block: `(x, context, cache) -> BlockOutput`."""

    def build_pool(self, key: PRNGKeyArray, backbone: Backbone) -> Optional[nnx.Module]:
        """The parameters that all layers of this spec have in common, whatever their depth; each finds them in its
        `Context.pool`. None: every layer has its own alone."""
        return None

    def pool_costs(self, backbone: Backbone, layers: int) -> dict[str, Cost]:
        """Component → cost of the pool, once for a model with so many layers of this spec."""
        return {}

    @abc.abstractmethod
    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of what comes beside attention and norms."""

    def padding_flops(self, backbone: Backbone, length: int) -> float:
        """Forward FLOPs of one token of rows of `length` that static shapes, other than experts' slots, add to
        these."""
        return 0.0

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """Values that `model.remat_names` may keep."""
        return ("attention",)

    @property
    def has_router(self) -> bool:
        """Whether its layers make decisions that can be recorded."""
        return False

    @property
    def hands_on(self) -> int:
        """How many logits its layers hand to the next one like them (`Context.logits`); 0: none."""
        return 0

    @property
    def counts_first(self) -> bool:
        """Whether `losses` wants the loads of the whole step (`counted`) when the step has several microbatches."""
        return False

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        """Config field → (size, logical axis) of what the mesh must split evenly."""
        return {}

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises `ConfigError` when the model's dimensions do not allow such a block."""

    def check_causal(self) -> None:
        """Raises `ConfigError` when a causal model must not have such a block."""

    def decided_for(self, platform: str, expert_devices: int) -> list[str]:
        """What its config leaves to the platform, as sentences. Raises `ConfigError` when that cannot run it."""
        return []

    def check_cached(self) -> None:
        """Raises `ConfigError` when the block cannot go on from a cache, as generation does."""

    def check_some_tokens(self) -> None:
        """Raises `ConfigError` unless a layer may be given some of the tokens of a row alone (`blocks.sequence`)."""
        raise ConfigError("", "a block of this kind decides over whole rows of tokens")

    def check_tokens(self, tokens: int) -> None:
        """Raises `ConfigError` unless the block can take `tokens` tokens: what a device holds of one microbatch."""

    def check_rows_apart(self, length: int, expert_axis: int) -> None:
        """Raises `ConfigError` where, in evaluation, what becomes of a row of `length` tokens may depend on the rows
        beside it. `expert_axis`: devices along the mesh axis of that name."""

    def processed_flops(self, report: Report, backbone: Backbone) -> float:
        """Forward FLOPs of the pairs that experts really processed, from a host report."""
        return 0.0

    def reward(self, report: Report, reward_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Report:
        """The microbatch's report as sums alone, once the tokens' rewards are known: the log-probabilities of their
        targets."""
        return report

    def losses(self, report: Report, totals: Totals, counted: Optional[Report]) -> dict[str, Float[Array, ""]]:
        """Named loss terms of the block's (possibly stacked) report, weighted and summed over its layers."""
        return {}

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        """Ratios of one layer's unstacked host report, by the names of `metrics.jsonl`."""
        return {}

    def next_state(self, state: Float[Array, "*R N E"], report: Report) -> Float[Array, "*R N E"]:
        """The balancing state of its layers for the next step, from the settled report of this one."""
        return state

    of_domain: Optional[int] = None
    """The one domain on which it begins as another run's block; None: on all."""

    def of_beginning(self) -> dict[str, Any]:
        """Settings by name that say how it begins with another run's block, and do nothing in a run that does not."""
        return {}

    def continued(self, fresh: Arrays, trained: Arrays, before: "BlockSpec") -> dict[str, Array]:
        """The block's parameters, `fresh` by path, when it begins with what another run's block, of the spec `before`,
        has learned.

        Raises `RequestError`, which names the arrays, when that block does not fit."""
        return copied(fresh, trained)

    def check_replay(self, expert: int) -> None:
        """Raises `ConfigError` unless the block can take recorded decisions again, of which `expert` is the highest."""
        raise ConfigError("name", "a block of this kind takes no decisions again")

    def settle(self, report: Report) -> Report:
        """The step's report, once its microbatches are summed, with what only the whole step can tell."""
        return report
