"""Who leaves: methods of token pruning for encoders."""

import abc
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.blocks.budgets import BUDGETS, Budget, loss_of, spending
from sparsejax.blocks.skim import BY_ROW, Chooser, Decision, Seen, Skimming
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear, RMSNorm, param
from sparsejax.ops import draws
from sparsejax.ops.gates import GATES, GateEstimator
from sparsejax.ops.hashing import uniform
from sparsejax.ops.merging import destinations, merged
from sparsejax.ops.skim import Survivors, rank


@dataclass(frozen=True, kw_only=True)
class LearnedSkimming(Skimming, abc.ABC):
    """Methods that learn in soft training how many tokens to keep, from what that costs."""

    coefficient: float = 0.1  # of the budget's loss
    budget: Budget = choice(BUDGETS, "linear")  # what may be spent

    def __post_init__(self):
        super().__post_init__()
        if self.coefficient < 0:
            raise ConfigError("coefficient", f"{self.coefficient} is negative; allowed: 0 or more")

    def unused(self) -> dict[str, str]:
        if self.stage == "hard":
            return dict.fromkeys(("coefficient", "budget"), "stage=hard: what is kept has no gradient")
        return {"coefficient": "the price of budget=hard follows what is spent"} if self.budget.priced else {}

    @property
    def learns(self) -> bool:
        return self.stage == "soft"

    @property
    def counts_first(self) -> bool:
        return self.learns and not self.budget.linear

    @property
    def priced(self) -> bool:
        return self.learns and self.budget.priced

    def losses(self, layers, works, totals, counted=None):
        if not self.learns:
            return {}
        if self.budget.linear:
            each = [found.keep_sum / totals.tokens for found in layers]
            return {"skim": self.coefficient * sum(each[1:], each[0]) / len(each)}
        scale = 1.0 if self.priced else self.coefficient
        return {"skim": scale * loss_of(self.budget, layers, works, counted, totals.microbatches)}

    def next_price(self, price, layers, works):
        return self.budget.next_price(price, spending(layers, works, layers))


@dataclass(frozen=True, kw_only=True)
class LearnedThreshold(LearnedSkimming):
    """Tokens whose keys receive less attention than a learned threshold leave (LTP, arXiv:2107.00910). The threshold of
    layer ℓ of L begins at ℓ / L of `threshold`; it is learned as a factor, for Adam moves every parameter as far."""

    threshold: float = 0.01  # of the last layer, at first: of all the attention of an average query
    temperature: float = 1e-3  # soft stage: a token is kept by σ((score − threshold) / temperature)
    rate: float = 30.0  # the threshold's factor is exp(rate · parameter): its learning rate over that of the weights

    def __post_init__(self):
        super().__post_init__()
        for name in ("threshold", "temperature", "rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")

    def unused(self) -> dict[str, str]:
        soft_alone = {"temperature": "stage=hard: a threshold alone decides"} if self.stage == "hard" else {}
        return super().unused() | soft_alone

    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> "Threshold":
        return Threshold(self, backbone.num_layers)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return {"skim": Cost(parameters=1, active=1)}


class Threshold(Chooser):
    """That of one layer."""

    def __init__(self, settings: LearnedThreshold, num_layers: int):
        self.log_factor = param(jnp.zeros(()), (), "router")
        self.settings, self.num_layers = settings, num_layers

    def after(self, row: Survivors, seen: Seen, soft: bool) -> Decision:
        share = (seen.layer + 1).astype(jnp.float32) / self.num_layers
        threshold = self.settings.threshold * share * jnp.exp(self.settings.rate * self.log_factor[...])
        over_BT = seen.received - threshold
        gate_BT = jax.nn.sigmoid(over_BT / self.settings.temperature) if soft else (over_BT >= 0).astype(jnp.float32)
        return Decision(gate=gate_BT, priority=seen.received)


@dataclass(frozen=True, kw_only=True)
class PowerBert(LearnedSkimming):
    """Tokens keep the place that their score gives them, and every layer learns how many places it needs (PoWER-BERT,
    arXiv:2001.08950). The score is the attention that the key receives from all but its own token.

    Soft stage: a token is multiplied by the learned retention of its rank. Hard: the first ⌈f · n⌉ of a document of n
    tokens stay, f being the mean retention. Ranks are in `bins` parts of the document, whatever its length."""

    bins: int = 64
    rate: float = 100.0  # retention is σ(rate · parameter): its learning rate over that of the weights

    def __post_init__(self):
        super().__post_init__()
        for name in ("bins", "rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")

    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> "Retention":
        return Retention(self)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return {"skim": Cost(parameters=self.bins, active=self.bins)}


NEARLY_ALL = 4.0
"""Retention begins at σ of this."""


class Retention(Chooser):
    """That of one layer."""

    def __init__(self, settings: PowerBert):
        start = jnp.full(settings.bins, NEARLY_ALL / settings.rate)
        self.retention = param(start, (None,), "router")
        self.settings = settings

    def after(self, row: Survivors, seen: Seen, soft: bool) -> Decision:
        score_BT = seen.received * row.sizes - seen.own
        r_bins = jax.nn.sigmoid(self.settings.rate * self.retention[...])

        def local(score_BT: Array, row: Survivors, r_bins: Array) -> tuple[Array]:
            first_BT = (row.positions == 0) & (row.segments > 0)
            rank_BT = rank(jnp.where(first_BT, jnp.inf, score_BT), row.keep > 0, row.segments)
            if soft:
                bin_BT = jnp.minimum(rank_BT * self.settings.bins // jnp.maximum(row.sizes, 1), self.settings.bins - 1)
                return (r_bins[bin_BT],)
            return (_best(rank_BT, r_bins.mean() * row.sizes),)

        gate_BT = on_each_device(local, (BY_ROW, BY_ROW, P()), (BY_ROW,))(score_BT, row, r_bins)[0]
        return Decision(gate=gate_BT, priority=score_BT)


@dataclass(frozen=True, kw_only=True)
class Transkimmer(LearnedSkimming):
    """A small network before each layer says of every token whether it stays, learned by straight-through Gumbel noise
    (arXiv:2205.07324) or another estimator. Evaluation takes the likelier of the two."""

    bias: float = 5.0  # of the last matrix: at first a token stays with odds of e to twice this
    estimator: GateEstimator = choice(GATES, "gumbel")  # of the gate's gradient, in soft training

    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> "SkimPredictor":
        return SkimPredictor(key, backbone, self)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        d = backbone.d_model
        return {"skim": Cost.of_matrices(d * d + d) + Cost(parameters=2 * d + 1, active=2 * d + 1)}


class SkimPredictor(Chooser):
    """Norm, linear, norm, GELU, linear to the log-odds of staying, in float32."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, settings: Transkimmer):
        d, keys = backbone.d_model, jax.random.split(key)
        into = {"dtype": "float32", "group": "router", "out_spec": P(BATCH_AXES, None, None)}
        self.norm = RMSNorm(d, backbone.norm_epsilon)
        self.hidden = Linear(keys[0], "btd,de->bte", (d, d), ("embed", None), stddev=d**-0.5, **into)
        self.hidden_norm = RMSNorm(d, backbone.norm_epsilon)
        self.odds = Linear(keys[1], "bte,eo->bto", (d, 1), (None, None), stddev=d**-0.5, **into)
        self.bias = param(jnp.full((), 2 * settings.bias), (), "router")
        self.estimator = settings.estimator

    def before(self, x_BTD: Float[Array, "B T D"], row: Survivors, seen: Seen, soft: bool) -> Decision:
        h_BTD = self.hidden_norm(self.hidden(self.norm(x_BTD.astype(jnp.float32))))
        odds_BT = self.odds(jax.nn.gelu(h_BTD))[..., 0] + self.bias[...]
        gate_BT = self.estimator(odds_BT, seen.keys) if soft else (odds_BT > 0).astype(jnp.float32)
        return Decision(gate=gate_BT, priority=odds_BT)


@dataclass(frozen=True, kw_only=True)
class Schedule(Skimming):
    """Every layer keeps a set share of each document, which the score of LTP, chance or the place decides: lengths as
    in Length-Adaptive (arXiv:2010.07003), and the controls that other methods are compared with.

    Soft stage: every layer of a row draws its share from U[share, 1]; hard and in evaluation: the share."""

    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)  # of the document's tokens that are left after each layer
    by: Literal["attention", "random", "place"] = "attention"  # place: the first ones

    def __post_init__(self):
        super().__post_init__()
        if not self.shares or any(not 0 < share <= 1 for share in self.shares):
            raise ConfigError("shares", f"{self.shares}: a share of (0, 1] for every layer")

    def check(self, num_layers: int) -> None:
        super().check(num_layers)
        if len(self.shares) != num_layers:
            raise ConfigError("shares", f"{len(self.shares)} shares for {num_layers} layers")

    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> "Scheduled":
        return Scheduled(self)


class Scheduled(Chooser):
    """By a share that is known beforehand."""

    def __init__(self, settings: Schedule):
        self.settings = settings

    def after(self, row: Survivors, seen: Seen, soft: bool) -> Decision:
        by, share = self.settings.by, jnp.asarray(self.settings.shares)[seen.layer]
        score_BT = seen.received
        if by == "place":
            score_BT = -row.positions.astype(jnp.float32)
        if by == "random":
            score_BT = uniform(row.positions.astype(jnp.uint32), seen.layer.astype(jnp.uint32), 0x5C1A)

        def local(score_BT: Array, row: Survivors, share_B: Array) -> tuple[Array]:
            first_BT = (row.positions == 0) & (row.segments > 0)
            rank_BT = rank(jnp.where(first_BT, jnp.inf, score_BT), row.keep > 0, row.segments)
            return (_best(rank_BT, share_B[:, None] * row.sizes),)

        share_B = jnp.broadcast_to(share, row.keep.shape[:1], out_sharding=BY_ROW)
        if soft and seen.keys is not None:
            share_B = 1 - (1 - share) * draws.uniform(seen.keys, row.keep.shape[:1])
        gate_BT = on_each_device(local, (BY_ROW, BY_ROW, BY_ROW), (BY_ROW,))(score_BT, row, share_B)[0]
        return Decision(gate=gate_BT, priority=score_BT)


@dataclass(frozen=True, kw_only=True)
class TokenMerging(Skimming):
    """Tokens join the most similar other one, which is from then on their mean and counts for all of them (ToMe,
    arXiv:2210.09461, without learning): every second token of a document may, and after each layer a share of all that
    are left does. The head's mean is that of all tokens."""

    merge: float = 0.25  # share of the tokens left in a document that join another after each layer; at most half can

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.merge <= 0.5:
            raise ConfigError("merge", f"{self.merge} is outside [0, 0.5]")

    def unused(self) -> dict[str, str]:
        return {"stage": "the share is set, and nothing is learned"}

    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> "Merging":
        return Merging(self)


class Merging(Chooser):
    """By the cosine of the keys."""

    def __init__(self, settings: TokenMerging):
        self.settings = settings

    def after(self, row: Survivors, seen: Seen, soft: bool) -> Decision:
        def local(key_BTH: Array, row: Survivors) -> tuple[Array, Array, Array]:
            alive_BT = row.keep > 0
            same_BTS = (row.segments[:, :, None] == row.segments[:, None, :]) & alive_BT[:, None, :]
            count_BT = jnp.floor(self.settings.merge * same_BTS.sum(-1)).astype(jnp.int32)
            into_BT = destinations(jax.lax.stop_gradient(key_BTH), alive_BT, row.segments, count_BT)
            x_BTD, size_BT = merged(row.x, row.keep, into_BT)
            return size_BT / jnp.where(alive_BT, row.keep, 1), size_BT, x_BTD

        gate_BT, size_BT, x_BTD = on_each_device(local, (BY_ROW, BY_ROW), (BY_ROW,) * 3)(seen.key, row)
        return Decision(gate=gate_BT, priority=size_BT, x=x_BTD)


def _best(rank_BT: Array, number: Array) -> Float[Array, "B T"]:
    """1 for the first ⌈number⌉; the product of a share and a size may round up past a whole number."""
    return (rank_BT < jnp.ceil(number - 1e-3)).astype(jnp.float32)
