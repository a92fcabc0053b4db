"""When a token has had enough steps: the halting weights of ACT and A-ViT, and PonderNet's distribution over steps.

A step is one pass through a layer. Everything is per token: leading axes `*N` are tokens, the last axis S of an array
over steps is their order. The last step is always forced, so the weights of a token add up to 1 whatever it is given.
Float32."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.structs import struct


@struct
class Halting:
    """How far each token has got."""

    spent: Float[Array, "*N"]  # Σ of its weights so far, 1 once it has halted
    halted: Bool[Array, "*N"]
    steps: Int[Array, "*N"]  # taken so far
    remainder: Float[Array, "*N"]  # the weight of its last step, 0 before that

    @property
    def ponder(self) -> Float[Array, "*N"]:
        """Steps + remainder, ACT's cost: its gradient is that of the remainder, which pulls earlier weights up."""
        return self.steps + self.remainder


def begin(tokens: Bool[Array, "*N"]) -> Halting:
    """Before the first step; what is not a token has halted and takes none."""
    none = jnp.zeros_like(tokens, jnp.float32)
    return Halting(spent=none, halted=~tokens, steps=none.astype(jnp.int32), remainder=none)


@struct
class Halted:
    """A row on its way through layers that its tokens stop at. A token that has halted keeps its state; its output is
    Σ over its steps of weight · state."""

    x: Float[Array, "B T D"]
    output: Float[Array, "B T D"]  # float32
    weight: Float[Array, "B T"]  # of the last step
    progress: Halting


@struct
class Step:
    """What training reads of one step."""

    x: Float[Array, "B T D"]
    weight: Float[Array, "B T"]


def take_step(
    state: Halting, probability: Float[Array, "*N"], last: bool | Bool[Array, ""], epsilon: float = 0.01
) -> tuple[Float[Array, "*N"], Halting]:
    """(weight of this step's output, state after it), by adaptive computation time (Graves, arXiv:1603.08983).

    A running token halts where its weights would exceed 1 − ε, or at the `last` step; its weight is then what is left
    to 1, before that its halting probability, and 0 once it has halted. Which step halts has no gradient."""
    halts = ~state.halted & ((state.spent + probability > 1 - epsilon) | last)
    weight = jnp.where(state.halted, 0, jnp.where(halts, 1 - state.spent, probability.astype(jnp.float32)))
    return weight, Halting(
        spent=jnp.where(halts, 1, state.spent + weight),
        halted=state.halted | halts,
        steps=state.steps + ~state.halted,
        remainder=jnp.where(halts, weight, state.remainder),
    )


def act(probability: Float[Array, "*N S"], epsilon: float = 0.01) -> tuple[Float[Array, "*N S"], Halting]:
    """(weights of all steps, state at the end) of tokens whose halting probability at every step is known."""
    state, weights = begin(jnp.ones(probability.shape[:-1], bool)), []
    for step in range(probability.shape[-1]):
        weight, state = take_step(state, probability[..., step], step == probability.shape[-1] - 1, epsilon)
        weights.append(weight)
    return jnp.stack(weights, axis=-1), state


def take_ponder_step(
    state: Halting, probability: Float[Array, "*N"], last: bool | Bool[Array, ""], quantile: Optional[float] = None
) -> tuple[Float[Array, "*N"], Halting]:
    """(weight of this step's output, state after it), by PonderNet (arXiv:2107.05407). `spent` is the probability of
    having halted so far.

    Without a quantile every token goes on to the last step, and the weight is p_n, the probability that it halts here.
    With one it halts, as in evaluation, at the first step by which more than that has halted (PALBERT,
    arXiv:2204.03276), and the weight is 1 there and 0 elsewhere."""
    goes_on = jnp.where(state.halted, 0, 1 - state.spent)
    p = goes_on * jnp.where(last, 1, probability.astype(jnp.float32))
    spent = jnp.where(last & ~state.halted, 1, state.spent + p)
    halts = ~state.halted & (last if quantile is None else ((spent > quantile) | last))
    weight = p if quantile is None else halts.astype(jnp.float32)
    taken = state.steps + ~state.halted
    return weight, Halting(spent=spent, halted=state.halted | halts, steps=taken, remainder=state.remainder)


def by_first_feature(x_ND: Float[Array, "*N D"], scale: float, shift: float) -> Float[Array, "*N"]:
    """The halting probability σ(scale · x₀ + shift): no parameters, one feature of the state is given to it (A-ViT,
    arXiv:2112.07658)."""
    return jax.nn.sigmoid(scale * x_ND[..., 0].astype(jnp.float32) + shift)


def ponder_distribution(logits: Float[Array, "*N S"]) -> Float[Array, "*N S"]:
    """p_n = λ_n Π_{j < n} (1 − λ_j) for λ = σ(logits): the probability of halting at each step, the last one having all
    that is left whatever its logit (PonderNet, arXiv:2107.05407). The loss is Σ_n p_n L_n, its prior
    `budgets.geometric_prior`."""
    logits = logits.astype(jnp.float32)
    going_on = jnp.cumsum(jax.nn.log_sigmoid(-logits[..., :-1]), axis=-1)
    reaches = jnp.concatenate([jnp.zeros_like(logits[..., :1]), going_on], axis=-1)
    halts = jnp.concatenate([jax.nn.log_sigmoid(logits[..., :-1]), jnp.zeros_like(logits[..., :1])], axis=-1)
    return jnp.exp(reaches + halts)


def mean_steps(p: Float[Array, "*N S"]) -> Float[Array, "*N"]:
    """E n of a distribution over steps 1, 2, …, S."""
    return p @ jnp.arange(1, p.shape[-1] + 1, dtype=jnp.float32)


def quantile_step(p: Float[Array, "*N S"], quantile: float) -> Int[Array, "*N"]:
    """The index of the first step by which more than `quantile` of the distribution has halted, the last step where
    rounding leaves none: nothing is drawn in evaluation (PALBERT, arXiv:2204.03276)."""
    passed = jnp.cumsum(p, axis=-1) > quantile
    return jnp.argmax(passed.at[..., -1].set(True), axis=-1)
