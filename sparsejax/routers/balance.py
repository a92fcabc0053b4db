"""Axis 6, balance: what keeps the load even. Each is 1.0 at perfect balance with k pairs a token, before its
coefficient.

A balance is a formula over one *unit* of tokens; its scope says what a unit is. The functions below the registry apply
the formula at the right moment: units that lie on one device inside the layer, wider ones once their counts are
summed. Loads are always those before capacity: dropping must not flatter them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.base.reports import MoEReport
from sparsejax.ops.assignment import Pairs
from sparsejax.ops.losses import load_balance
from sparsejax.routers.entropy import Entropy, SelectorEntropy
from sparsejax.routers.observed import Observed, Scope
from sparsejax.routers.variation import ImportanceLoad


class Balance(Protocol):
    @property
    def coefficient(self) -> float: ...

    @property
    def scope(self) -> Scope: ...

    @property
    def needs(self) -> frozenset[str]:
        """Of: normal noise, first choices, selectors."""
        ...

    def measure(self, observed: Observed) -> Optional[Float[Array, "G S N E"]]:
        """N numbers for every token and expert whose sums it wants to know beside pairs and probabilities."""
        ...

    def __call__(
        self,
        counts: Int[Array, "*U E"],
        probability_sum: Float[Array, "*U E"],
        tokens: Int[Array, "*U"],
        k: int,
        measured: Optional[Float[Array, "*U N E"]],
    ) -> Float[Array, "*U"]:
        """The imbalance of each unit, from its pairs by expert, its summed probabilities, its number of tokens and its
        sums of what was measured. With scope `global`, linear in the probabilities, which have the gradient alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoBalance:
    """No pressure; the balance of the whole batch is still measured, as `load_balance` would."""

    @property
    def coefficient(self) -> float:
        return 0.0

    @property
    def scope(self) -> Scope:
        return "microbatch"

    needs = frozenset()

    def measure(self, observed: Observed) -> None:
        return None

    def __call__(self, counts, probability_sum, tokens, k, measured):
        return load_balance(counts, probability_sum, tokens, k)


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """E/k · Σ_e f_e · P_e over the tokens of one unit, averaged over units (Switch, arXiv:2101.03961, eq. 4, for any
    k).

    The narrower the unit, the more the loss forbids experts to specialise: a row (`sequence`), what one device holds
    of a microbatch (`device`), a microbatch, or the tokens of the whole step (`global`). `sequence` and `global` do
    not depend on mesh or accumulation; with accumulation `global` costs one more forward pass, in which the loads are
    counted. With count = `first`, f_e are first choices alone and k is 1 (GShard, arXiv:2006.16668, algorithm 1).

    In f_e a pair of an expert without a network counts `free_weight` (MoE++, arXiv:2410.07348): with less than 1 these
    experts may have more than the others. Balance is then where they have 1 / `free_weight` times the load.

    With `expert_groups`, such as devices, of equally many experts each, `group_share` of the coefficient presses on the
    loads of groups and leaves alone how a group shares its own out: the mean of f over the group stands for each f_e,
    which makes the sum that of f′ · P′ over groups (DeepSeekMoE, arXiv:2401.06066, its device-level balance; with
    coefficients α₁ and α₂ of experts and devices, `coefficient` is α₁ + α₂ and `group_share` α₂ / (α₁ + α₂)). With
    count = `groups` a token counts once in every group that it is sent to, however many experts it has there
    (DeepSeek-V2, arXiv:2405.04434, its communication balance, over the mean number of groups of a token in place of the
    most that it may have)."""

    coefficient: float = 0.01
    scope: Scope = "global"
    count: Literal["all", "first", "groups"] = "all"
    free_weight: float = 1.0
    expert_groups: Optional[int] = None
    group_share: float = 1.0

    def __post_init__(self):
        if self.coefficient <= 0:
            raise ConfigError(
                "coefficient", f"{self.coefficient} is not positive; for no balance loss choose balance = 'none'"
            )
        if self.free_weight <= 0:
            raise ConfigError("free_weight", f"{self.free_weight} is not positive")
        if self.expert_groups is not None and self.expert_groups < 2:
            raise ConfigError("expert_groups", f"{self.expert_groups}: nothing is to be balanced between fewer than 2")
        if not 0 < self.group_share <= 1:
            raise ConfigError("group_share", f"{self.group_share} is outside (0, 1]")
        if self.count == "groups" and self.expert_groups is None:
            raise ConfigError("count", "groups are those of expert_groups, and there are none")

    def unused(self) -> dict[str, str]:
        if self.expert_groups is None:
            return {"group_share": "there are no expert_groups"}
        return {"group_share": "count=groups knows no experts"} if self.count == "groups" else {}

    def check(self, num_experts: int) -> None:
        """Raises `ConfigError` unless there are groups of two experts or more."""
        groups = self.expert_groups
        if groups is not None and num_experts % groups:
            raise ConfigError("expert_groups", f"{groups} groups do not divide num_experts={num_experts}")
        if groups == num_experts:
            raise ConfigError(
                "expert_groups", f"{groups} groups of num_experts={num_experts} have one each; allowed: none"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"first choices"} if self.count == "first" else ())

    def measure(self, observed: Observed) -> Optional[Float[Array, "G S N E"]]:
        """The pairs that count, with what they count, unless all do and alike."""
        first, num_experts = self.count == "first", observed.clean.shape[-1]
        if self.count == "groups":
            sent = self._by_group(observed.selected()).max(-1)
            return jnp.repeat(sent, num_experts // sent.shape[-1], axis=-1)[..., None, :]
        if not first and self.free_weight == 1:
            return None
        is_free_E = jnp.arange(num_experts) >= num_experts - observed.inputs.free
        weight_E = jnp.where(is_free_E, self.free_weight, 1.0)
        chosen_GSE = observed.first_choices() if first else observed.selected()
        return (chosen_GSE * weight_E * jnp.mean(1 / weight_E))[..., None, :]

    def __call__(self, counts, probability_sum, tokens, k, measured):
        if measured is not None:
            counts = measured[..., 0, :]
        if self.count == "groups":
            counts = counts * (k * tokens / jnp.maximum(counts.sum(-1), 1))[..., None]
        elif self.expert_groups is not None:
            own = self._by_group(counts)
            shared = own.mean(-1, keepdims=True)
            counts = (own + self.group_share * (shared - own)).reshape(counts.shape)
        return load_balance(counts, probability_sum, tokens, 1 if self.count == "first" else k)

    def _by_group(self, values: Float[Array, "*B E"]) -> Float[Array, "*B groups each"]:
        assert self.expert_groups is not None
        return values.reshape(*values.shape[:-1], self.expert_groups, -1)


BALANCES = Registry(
    "balance",
    {
        "load_balance": LoadBalance,
        "importance_load": ImportanceLoad,
        "entropy": Entropy,
        "selector_entropy": SelectorEntropy,
        "none": NoBalance,
    },
)


def with_local_balance(
    moe: MoEReport,
    pairs: Pairs,
    probabilities_GSE: Float[Array, "G S E"],
    mask_BT: Bool[Array, "B T"],
    balance: Balance,
    k: int,
    measured_GSNE: Optional[Float[Array, "G S N E"]],
) -> MoEReport:
    """One device's report with the balance of the units that lie on it, which the scopes `sequence` and `device`
    have."""
    if balance.scope == "device":
        return with_whole_balance(moe, balance, k)
    if balance.scope != "sequence":
        return moe
    rows, length = mask_BT.shape
    num_experts = probabilities_GSE.shape[-1]
    groups, size, _ = pairs.of_token.shape
    first_G1 = size * jnp.arange(groups, dtype=jnp.int32)[:, None]
    row_GP = (first_G1 + pairs.token) // length
    counts_BE = jnp.zeros((rows, num_experts), jnp.int32).at[row_GP, pairs.expert].add(pairs.valid.astype(jnp.int32))
    p_BTE = jnp.where(mask_BT[..., None], probabilities_GSE.reshape(rows, length, num_experts), 0)
    tokens_B = mask_BT.sum(-1, dtype=jnp.int32)
    measured_BNE = None
    if measured_GSNE is not None:
        by_row = measured_GSNE.reshape(rows, length, -1, num_experts)
        measured_BNE = jnp.where(mask_BT[..., None, None], by_row, 0).sum(1)
    return _with_units(moe, balance(counts_BE, p_BTE.sum(1), tokens_B, k, measured_BNE), tokens_B)


def with_whole_balance(moe: MoEReport, balance: Balance, k: int) -> MoEReport:
    """`moe` with the balance of all its tokens together as its one unit."""
    value = balance(moe.assigned, moe.probability_sum, moe.tokens, k, moe.balance_measured)
    return _with_units(moe, value, moe.tokens)


def balance_loss(
    moe: MoEReport,
    balance: Balance,
    k: int,
    rows: Int[Array, ""],
    microbatches: int,
    counted: Optional[MoEReport],
) -> Float[Array, ""]:
    """What one microbatch adds to the step's loss: its share of the mean over the step's units, summed over the layers
    stacked in `moe`.

    Args:
      rows, microbatches: of the whole step.
      counted: the step's summed report, when a `global` balance has several microbatches.
    """
    if balance.scope == "global" and counted is not None:
        # Those that the layer saw, which need not be all.
        value = balance(counted.assigned, moe.probability_sum, counted.tokens, k, counted.balance_measured)
    elif balance.scope == "sequence":
        value = moe.balance_sum / jnp.maximum(rows, 1)
    else:
        value = moe.balance_sum / jnp.maximum(moe.balance_units, 1) / microbatches
    return balance.coefficient * value.sum()


def _with_units(moe: MoEReport, values: Float[Array, "*U"], tokens: Int[Array, "*U"]) -> MoEReport:
    """`values` of units with so many tokens, as the report's sums."""
    layers = moe.tokens.ndim  # leading axes that stay: repeats of the layer
    over = tuple(range(layers, values.ndim))
    return dataclasses.replace(
        moe, balance_sum=values.sum(over), balance_units=(tokens > 0).sum(over, dtype=jnp.float32)
    )
