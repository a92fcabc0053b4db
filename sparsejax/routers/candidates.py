"""What a selector chooses from, and what it declares about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs
from sparsejax.ops.draws import gumbel
from sparsejax.routers.lots import Lots
from sparsejax.routers.reinforce import Reinforce


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random numbers for tokens, drawn from their rows' own keys: the same on any mesh, accumulation and grouping."""

    keys_B: Array
    row_length: int
    groups: tuple[int, int]  # (G, S)

    def uniform(self, stream: int, width: int) -> Float[Array, "G S width"]:
        """`width` numbers of U[0, 1) for every token; other streams are independent."""
        draw = lambda key: jax.random.uniform(jax.random.fold_in(key, stream), (self.row_length, width))  # noqa: E731
        return jax.vmap(draw)(self.keys_B).reshape(*self.groups, width)

    def bits(self, stream: int) -> UInt32[Array, "G S"]:
        """A number for every token, all of uint32 being as likely."""
        draw = lambda key: jax.random.bits(jax.random.fold_in(key, stream), (self.row_length,))  # noqa: E731
        return jax.vmap(draw)(self.keys_B).reshape(self.groups)

    def gumbel(self, stream: int, width: int) -> Float[Array, "G S width"]:
        """Standard Gumbel noise: the argmax of log p + noise is a draw from p."""
        return gumbel(self.uniform(stream, width))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known of the tokens of G groups beside the router's opinion of them."""

    mask: Bool[Array, "G S"]  # False for padding
    tokens: Int[Array, "G S"]  # vocabulary ids
    previous: Int[Array, "G S"]  # the id before each in its document, −1 for none
    domains: Int[Array, "G S"]
    positions: Int[Array, "G S"]  # within the document
    limit: Int[Array, " G"]  # slots of an expert in this group, at most `num_slots`
    num_slots: int
    training: bool
    generating: bool = False
    dropless: bool = False  # every pair is computed; slots are those of a selection that `fits`
    within: Optional[Bool[Array, " E"]] = None  # experts that there are for these tokens; None: all
    free: int = 0  # so many of the experts, the last ones, have no slots and process every pair
    noise: Optional[Noise] = None  # None outside training
    experts: Optional[Int[Array, "G S K"]] = None  # to be chosen, −1 for none; None: the selector chooses
    lots: Optional[Lots] = None  # `[G, S]`, for a selector that needs them
    logits: Optional[Float[Array, "G S E"]] = None  # of the router below; None: there is none


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`scores` make a pair's weight; who is selected goes by `ranking`, the scores after corrections, or by `logits`,
    both without gradient."""

    logits: Float[Array, "G S E"]
    scores: Float[Array, "G S E"]
    ranking: Float[Array, "G S E"]
    inputs: Inputs


def chosen_scores(candidates: Candidates, experts_GSK: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The scores of these experts; of none, which is −1, it is 0."""
    scores_GSK = jnp.take_along_axis(candidates.scores, jnp.maximum(experts_GSK, 0), axis=-1)
    return jnp.where(experts_GSK >= 0, scores_GSK, 0)


ScoresOf = Callable[[Candidates, Int[Array, "G S K"]], Float[Array, "G S K"]]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What logits, a selector, or an order of slots declare; the contract tests prove each claim both ways."""

    causal: bool = True  # a token's pairs do not depend on later tokens (but see `orders.ChoiceMajor` with k > 1)
    beyond_k: bool = False  # tokens may have more pairs than experts_per_token
    train_only: bool = False  # evaluation and generation take the k best by score instead
    needs: frozenset[str] = frozenset()  # of: noise, tokens, domains, lots
    fits: bool = False  # slots are its selection: no pair is dropped; generation takes the k best by score instead
    sparse: bool = False  # an expert whose score is 0 is not chosen
    fixed: bool = False  # the choice does not look at the scores, so that weights may be constant
    thresholds: bool = False  # takes what ranks above 0, which a controller makes the share of k/E
    blind: bool = False  # of logits: they do not look at the token's vector
    whole: bool = False  # of logits: they look at the vectors of the whole document, which a cache lacks
    together: bool = False  # sends whole groups to the same experts: every expert has a slot for everyone
    reinforce: Optional[Reinforce] = None  # how it learns from what it chose, if it does: weights may be constant then
    parts: int = 1  # equal groups of experts, in each of which a token has one: each is balanced for itself
    scores_of: ScoresOf = chosen_scores  # of pairs with experts that were chosen before, −1 for none


class Selector(Protocol):
    """Writes the list of pairs, each with its score. `experts_per_token` is the k of capacity, balance loss and active
    parameters."""

    @property
    def experts_per_token(self) -> int: ...

    @property
    def traits(self) -> Traits: ...

    def __call__(self, candidates: Candidates) -> Pairs: ...


class ChoosesK:
    """What selectors with a field `k` have in common."""

    k: int

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError("k", f"{self.k} is not positive")

    @property
    def experts_per_token(self) -> int:
        return self.k
