"""Exits: output heads after some of the layers, and what a step asks of each of them.

Numbers of exits are depths: how many layers have run. The last exit is the model's own head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry, choice
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import RMSNorm
from sparsejax.ops.head_loss import Weighting


@dataclass(frozen=True, kw_only=True)
class Always:
    """Every exit in every step."""

    def factors(self, step: Int[Array, ""], steps: int, exits: int) -> Float[Array, " E+1"]:
        """What the weights of the exits, and of the last, are multiplied with in the step after `step` others."""
        return jnp.ones(exits + 1)

    def freezes(self, step: Int[Array, ""], steps: int) -> Optional[Bool[Array, ""]]:
        """Whether that step leaves everything but the exits' own parameters alone; None: no step does."""
        return None


@dataclass(frozen=True, kw_only=True)
class Rotational(Always):
    """One in `every` of the exits in each step, in turn, and always the last (LayerSkip, arXiv:2404.16710)."""

    every: int = 4

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError("every", f"{self.every} is less than 1")

    def factors(self, step, steps, exits):
        turn = (jnp.arange(exits) + step) % self.every == 0
        return jnp.append(turn, True).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Gradual(Always):
    """At first the last alone; then exit after exit, the deepest first, until after this part of the run all of them
    (LayerSkip)."""

    until: float = 0.5

    def __post_init__(self):
        _share("until", self.until)

    def factors(self, step, steps, exits):
        begun = exits if self.until == 0 else jnp.floor(step * (exits / (self.until * steps)))
        return (jnp.arange(exits + 1) >= exits - begun).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Alternating(Always):
    """Steps number 1, 3, 5, … train the last alone, the others all of them (BERxiT, Xin et al. 2021)."""

    def factors(self, step, steps, exits):
        return jnp.append(jnp.full(exits, step % 2 == 1), True).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Always):
    """Up to this part of the run the last alone; then the exits' own parameters alone, and nothing else moves
    (DeeBERT, arXiv:2004.12993). From 0, exits are fitted to a model that `--init-from` brings."""

    start: float = 0.5

    def __post_init__(self):
        _share("start", self.start)

    def factors(self, step, steps, exits):
        second = self.freezes(step, steps)
        return jnp.append(jnp.full(exits, second), ~second).astype(jnp.float32)

    def freezes(self, step, steps):
        return step >= round(self.start * steps)


CURRICULA = Registry(
    "curriculum",
    {
        "none": Always,
        "rotational": Rotational,
        "gradual": Gradual,
        "alternating": Alternating,
        "two_stage": TwoStage,
    },
)

OwnWeight = Callable[[PRNGKeyArray], nnx.Param]

Weights = Literal["uniform", "linear", "sum_l", "geometric"]


@dataclass(frozen=True, kw_only=True)
class Exits:
    """A config's description of a model's exits: the base of the frozen dataclasses in `EXITS`."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers run before each exit but the last, ascending."""
        return ()

    def check(self, num_layers: int) -> None:
        """Raises `ConfigError` unless a model of so many layers can have them."""

    def build(self, key: PRNGKeyArray, backbone: Backbone, norm_width: int, weight: OwnWeight) -> "ExitParts":
        """Their parameters: norms of this width, and heads with such a `weight`."""
        return ExitParts(norms=None, heads=None)

    def costs(self, head: Cost, norm_width: int) -> dict[str, Cost]:
        """Component → cost of all exits but the last, in a pass that asks each of them; `head` is that of one with
        parameters of its own."""
        return {}

    @property
    def rescaled(self) -> dict[int, tuple[float, float]]:
        """Depth of an exit → factors on the gradients of its head and of the layers that follow."""
        return {}

    @property
    def distills(self) -> bool:
        """Whether exits learn from the last one."""
        return False

    def weighting(self, step: Int[Array, ""], steps: int, num_layers: int) -> Optional[Weighting]:
        """Of the losses of the exits and of the last, in the step after `step` of `steps` others."""
        return None

    def freezes(self, step: Int[Array, ""], steps: int) -> Optional[Bool[Array, ""]]:
        """Whether that step changes the exits' own parameters alone; None: no step does."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoExits(Exits):
    """The head after the last layer alone."""


@dataclass(frozen=True, kw_only=True)
class ExitHeads(Exits):
    """A head after each of these numbers of layers; the loss is Σ w_e L_e / Σ w_e over them and the last.

    With ℓ the depth of an exit, L that of the model and s the `scale`: uniform w = s, linear w = s ℓ (PABEE,
    arXiv:2006.04152), geometric w = s 2ⁱ for exit number i from 0; the last has s = 1. `sum_l` (LayerSkip): w =
    s Σ_{i<ℓ} i, and L − 1 + s Σ_{i<L−1} i for the last."""

    layers: tuple[int, ...] = ()
    head: Literal["shared", "own"] = "shared"  # the model's own head, or one for each exit
    norm: Literal["shared", "own"] = "own"
    weights: Weights = "linear"
    scale: float = 1.0  # of the exits' weights beside the last's; 0 trains the model without them
    curriculum: Always = choice(CURRICULA, "none")
    distill: float = 0.0  # share of an exit's loss that is KL(p_last ‖ p_exit), whose gradient the exit alone gets
    equilibrium: bool = False  # scale gradients so that every layer gets about as much as with one head

    def __post_init__(self):
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ConfigError("layers", f"{self.layers}; allowed: one or more ascending numbers of layers, from 1")
        if not 0 <= self.scale < float("inf"):
            raise ConfigError("scale", f"{self.scale}; allowed: 0 or more")
        _share("distill", self.distill)
        exits_lose = loss_weights(self.weights, self.layers, self.layers[-1] + 1, self.scale)[:-1].any()
        if isinstance(self.curriculum, TwoStage) and not exits_lose:
            raise ConfigError("curriculum", "two_stage: the second stage trains exits alone, and they have no weight")
        if isinstance(self.curriculum, TwoStage) and self.head == self.norm == "shared":
            message = "two_stage with head=shared and norm=shared: the second stage would train nothing"
            raise ConfigError("curriculum", f"{message}; allowed: norm=own or head=own")

    @property
    def depths(self):
        return self.layers

    def check(self, num_layers):
        if self.layers[-1] >= num_layers:
            message = f"{self.layers[-1]} is not less than the model's {num_layers} layers, after which its own head is"
            raise ConfigError("layers", message)

    def build(self, key, backbone, norm_width, weight):
        norms = [RMSNorm(norm_width, backbone.norm_epsilon) for _ in self.layers] if self.norm == "own" else None
        heads = None
        if self.head == "own":
            heads = nnx.List([ExitHead(weight(each)) for each in jax.random.split(key, len(self.layers))])
        return ExitParts(norms=None if norms is None else nnx.List(norms), heads=heads)

    def costs(self, head, norm_width):
        number = len(self.layers)
        own = (head.parameters if self.head == "own" else 0) + (norm_width if self.norm == "own" else 0)
        work = {"per_token": number * head.per_token, "per_row": number * head.per_row}
        return {"exit_heads": Cost(parameters=number * own, active=number * own, **work)}

    def unused(self) -> dict[str, str]:
        return {} if self.scale else dict.fromkeys(("weights", "distill"), "scale=0: exits have no loss")

    @property
    def distills(self):
        return self.distill > 0

    def freezes(self, step, steps):
        return self.curriculum.freezes(step, steps)

    def weighting(self, step, steps, num_layers):
        number = len(self.layers)
        base = jnp.asarray(loss_weights(self.weights, self.layers, num_layers, self.scale), jnp.float32)
        weights = base * self.curriculum.factors(step, steps, number)
        weights = weights / weights.sum()
        soft = jnp.append(jnp.full(number, self.distill), 0.0)
        return Weighting(hard=weights * (1 - soft), soft=weights * soft)

    @property
    def rescaled(self):
        # 1/(K − k + 1) and its complement for number k = 1, … of K with the last (Li et al., arXiv:1908.06294).
        if not self.equilibrium:
            return {}
        of_head = {depth: 1 / (len(self.layers) + 1 - k) for k, depth in enumerate(self.layers)}
        return {depth: (share, 1 - share) for depth, share in of_head.items()}


EXITS = Registry("kind of exits", {"none": NoExits, "heads": ExitHeads})


class ExitHead(nnx.Module):
    """An output projection of an exit's own."""

    def __init__(self, weight: nnx.Param):
        self.weight = weight


class ExitParts(nnx.Module):
    """What exits have of their own; None: they use what the model's own head has."""

    def __init__(self, norms: Optional[nnx.List], heads: Optional[nnx.List]):
        self.norms, self.heads = norms, heads


def loss_weights(rule: Weights, depths: tuple[int, ...], num_layers: int, scale: float) -> Float[np.ndarray, " E+1"]:
    """The weights of the exits and of the last, as `ExitHeads` has them, before they are divided by their sum."""
    every = np.array([*depths, num_layers], np.float64)
    if rule == "sum_l":
        sums = scale * every * (every - 1) / 2
        sums[-1] = num_layers - 1 + scale * (num_layers - 1) * (num_layers - 2) / 2
        return sums
    found = {"uniform": np.ones(len(every)), "linear": every, "geometric": 2.0 ** np.arange(len(every))}[rule]
    return found * np.append(np.full(len(depths), scale), 1.0)


def kept(exits: Exits, tree: nnx.State, frozen: Bool[Array, ""]) -> nnx.State:
    """`tree`, gradients or updates of a model's parameters, with zeros for all but the exits' own when `frozen`."""
    flat = dict(nnx.to_flat_state(tree))
    stopped = {path: v.replace(jnp.where(frozen, 0, v[...])) for path, v in flat.items() if path[0] != "exits"}
    return nnx.from_flat_state({**flat, **stopped})


@jax.custom_vjp
def rescaled(x: Float[Array, "..."], factor: float | Float[Array, ""]) -> Float[Array, "..."]:
    """x, with its gradient times `factor`."""
    return x


rescaled.defvjp(lambda x, factor: (x, factor), lambda factor, dx: ((dx * factor).astype(dx.dtype), None))


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(key, f"{value} is outside 0 … 1")
