"""How much a method that learns which tokens leave is to spend: a price, a target, a prior, or a hard budget.

A batch's spending is known only once all of its microbatches are counted, so each of them adds to the loss what a step
of its own sums along the slope at the whole step's: value and gradient are those of the whole batch."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.base.reports import SkimReport
from sparsejax.base.structs import struct
from sparsejax.ops import budgets


class Price(nnx.Variable):
    """What a hard budget charges for all of the layers' FLOPs, float32, the same number in every layer. Read in the
    forward pass and moved once per optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Forward FLOPs of one layer that tokens can be spared."""

    before: float  # of a token that is there when attention begins
    pair: float  # of a query and a key
    after: float  # of a token that is left after attention


@struct
class Spending:
    """Shares of a step, or what one of its microbatches adds to them."""

    kept: Float[Array, " L"]  # tokens that are left after each layer, of all tokens
    flops: Float[Array, ""]  # of what the layers would compute on all tokens, by the gates of training
    decided: Float[Array, ""]  # the same, by what evaluation would decide on these states
    price: Float[Array, ""]


def spending(layers: Sequence[SkimReport], works: Sequence[Work], whole: Sequence[SkimReport]) -> Spending:
    """What the layers of `layers` spend, over the tokens of `whole`."""
    tokens = jnp.maximum(jnp.asarray(whole[0].tokens, jnp.float32), 1)
    spent, decided, full, price = jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    for found, of_whole, work in zip(layers, whole, works, strict=True):
        here, everything = found.spending, of_whole.spending
        assert here is not None and everything is not None  # whoever has a budget reports them
        spent += _flops(work, here.attended_sum, here.keys_sum, found.keep_sum)
        decided += _flops(work, here.would_attend, here.would_pair, here.would_stay)
        full += _flops(work, of_whole.tokens, everything.all_keys, of_whole.tokens)
        price = price if everything.price_sum is None else jnp.asarray(everything.price_sum, jnp.float32) / tokens
    return Spending(
        kept=jnp.stack([jnp.asarray(found.keep_sum, jnp.float32) for found in layers]) / tokens,
        flops=spent / jnp.maximum(full, 1),
        decided=decided / jnp.maximum(full, 1),
        price=price,
    )


def _flops(work: Work, attended: Array, keys: Array, left: Array) -> Float[Array, ""]:
    each = (work.before, attended), (work.pair, keys), (work.after, left)
    return sum((cost * jnp.asarray(count, jnp.float32) for cost, count in each), start=jnp.zeros(()))


class Budget(abc.ABC):
    """A config's description of what may be spent: the base of the frozen dataclasses in `BUDGETS`."""

    linear = False
    """Whether the loss is a sum over tokens, and a microbatch needs to know nothing of the others."""
    priced = False
    """Whether there is a price that follows what is spent."""

    @abc.abstractmethod
    def __call__(self, spent: Spending) -> Float[Array, ""]:
        """The loss of a whole step, before its coefficient."""

    def next_price(self, price: Float[Array, "*R"], spent: Spending) -> Float[Array, "*R"]:
        """That of the next step, from what this one spent."""
        return price


@dataclass(frozen=True, kw_only=True)
class Linear(Budget):
    """The share of tokens that is left, mean over layers: the coefficient is its price."""

    linear = True

    def __call__(self, spent: Spending) -> Float[Array, ""]:
        return spent.kept.mean()


@dataclass(frozen=True, kw_only=True)
class Targeted(Budget, abc.ABC):
    """With a share of the layers' FLOPs to spend."""

    target: float = 0.5  # of the FLOPs that the layers would take on all tokens

    def __post_init__(self):
        if not 0 < self.target <= 1:
            raise ConfigError("target", f"{self.target} is outside (0, 1]")


@dataclass(frozen=True, kw_only=True)
class AbsoluteTarget(Targeted):
    """|spent − target| of the batch."""

    def __call__(self, spent: Spending) -> Float[Array, ""]:
        return budgets.batch_l1(spent.flops, self.target)


@dataclass(frozen=True, kw_only=True)
class SquaredTarget(Targeted):
    """(spent − target)² of the batch (DynamicViT, arXiv:2106.02034)."""

    def __call__(self, spent: Spending) -> Float[Array, ""]:
        return budgets.batch_l2(spent.flops, self.target)


@dataclass(frozen=True, kw_only=True)
class DepthPrior(Budget):
    """KL of the batch's distribution of depths, the number of layers after which a token is left, to a normal one
    (A-ViT, arXiv:2112.07658)."""

    depth: float = 0.5  # mean of the prior, as a share of the layers
    deviation: float = 1.0  # of the prior, in layers

    def __post_init__(self):
        if not 0 <= self.depth <= 1:
            raise ConfigError("depth", f"{self.depth} is outside [0, 1]")
        if self.deviation <= 0:
            raise ConfigError("deviation", f"{self.deviation} is not positive")

    def __call__(self, spent: Spending) -> Float[Array, ""]:
        layers = len(spent.kept)
        reached = jnp.concatenate([jnp.ones(1), spent.kept, jnp.zeros(1)])
        # Leaving is counted layer by layer; rounding may take it below 0.
        depths = jnp.maximum(reached[:-1] - reached[1:], 0)
        return budgets.kl_to_prior(depths, budgets.gaussian_prior(self.depth * layers + 1, self.deviation, layers + 1))


@dataclass(frozen=True, kw_only=True)
class HardBudget(Targeted):
    """Neither more nor less than the target, by dual ascent: after every step the price goes up by rate · (decided −
    target), decided being what evaluation would spend on the states of training, without noise; and the loss is
    (price + damping · (decided − target)) · (spent − target), of which spent alone has a gradient."""

    rate: float = 0.05  # of the price
    damping: float = 1.0  # keeps price and spending from swinging about each other
    most: float = 100.0  # |price| at most

    priced = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("rate", "most"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if self.damping < 0:
            raise ConfigError("damping", f"{self.damping} is negative")

    def __call__(self, spent: Spending) -> Float[Array, ""]:
        price = spent.price + self.damping * (spent.decided - self.target)
        return budgets.priced(spent.flops, price, self.target)

    def next_price(self, price: Float[Array, "*R"], spent: Spending) -> Float[Array, "*R"]:
        return budgets.next_price(price, spent.decided, self.target, rate=self.rate, least=-self.most, most=self.most)


def loss_of(
    budget: Budget,
    layers: Sequence[SkimReport],
    works: Sequence[Work],
    counted: Optional[Sequence[SkimReport]],
    microbatches: int,
) -> Float[Array, ""]:
    """What one of a step's microbatches adds to the loss; `counted` are the reports of the whole step, None where these
    are."""
    if counted is None:
        return budget(spending(layers, works, layers))
    own = spending(layers, works, counted)
    at = jax.lax.stop_gradient(spending(counted, works, counted))
    value, slope = jax.value_and_grad(budget.__call__)(at)
    moved = jax.tree.map(lambda slope, own: jnp.sum(slope * (own - jax.lax.stop_gradient(own))), slope, own)
    return value / microbatches + sum(jax.tree.leaves(moved))


BUDGETS = Registry(
    "budget", {"linear": Linear, "l1": AbsoluteTarget, "l2": SquaredTarget, "kl": DepthPrior, "hard": HardBudget}
)
