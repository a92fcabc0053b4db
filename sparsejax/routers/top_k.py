"""Selectors in which each token takes its best experts."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs, choice_major_pairs
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits, chosen_scores


def take_best(candidates: Candidates, k: int) -> tuple[Int[Array, "G S K"], Float[Array, "G S K"]]:
    """(experts, their scores) of each token, best first. Ties go to the lower expert."""
    _, experts_GSK = jax.lax.top_k(candidates.ranking, k)
    return experts_GSK, jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)


@dataclass(frozen=True, kw_only=True)
class TopK(ChoosesK):
    """Each token takes its k best experts. Ties go to the lower expert, so a router of zeros sends every token to
    experts 0 … k − 1. Switch Transformers (arXiv:2101.03961) is k = 1, GShard (arXiv:2006.16668) k = 2."""

    k: int = 2

    traits = Traits()

    def __call__(self, candidates: Candidates) -> Pairs:
        return choice_major_pairs(*take_best(candidates, self.k), candidates.inputs.mask)


Policy = Literal["all", "none", "threshold", "random", "sampling"]


@dataclass(frozen=True, kw_only=True)
class SecondExpert:
    """Top-2 whose second expert is optional (GShard, arXiv:2006.16668, §2.2, and the policies of Mesh-TensorFlow).

    With g₂ the second score over the sum of both: `all` takes it, `none` never does, `threshold` if g₂ ≥ threshold,
    `random` with probability min(1, g₂ / threshold), and `sampling` draws the second expert from the scores of the
    others. Outside training `random` is `threshold` and `sampling` is `all`."""

    policy: Policy = "random"
    threshold: float = 0.2

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ConfigError("threshold", f"{self.threshold} is outside (0, 1]")

    def unused(self) -> dict[str, str]:
        reads = self.policy in ("threshold", "random")
        return {} if reads else {"threshold": f"policy={self.policy}; it counts with threshold and random"}

    @property
    def traits(self) -> Traits:
        draws = self.policy in ("random", "sampling")
        return Traits(needs=frozenset({"noise"} if draws else ()), scores_of=_with_runner_up)

    @property
    def experts_per_token(self) -> int:
        return 2

    def __call__(self, candidates: Candidates) -> Pairs:
        noise, policy = candidates.inputs.noise, self.policy
        experts_GS2, scores_GS2 = take_best(candidates, 2)
        if policy == "sampling" and noise is not None:
            first_GSE = jax.nn.one_hot(experts_GS2[..., 0], candidates.ranking.shape[-1], dtype=bool)
            excluded_GSE = first_GSE | jnp.isneginf(candidates.ranking)
            of_others_GSE = jax.lax.stop_gradient(jnp.maximum(candidates.scores, 1e-30))
            log_GSE = jnp.where(excluded_GSE, -jnp.inf, jnp.log(of_others_GSE))
            drawn_GSE = log_GSE + noise.gumbel(1, log_GSE.shape[-1])
            second_GS = jnp.argmax(drawn_GSE, axis=-1).astype(experts_GS2.dtype)
            experts_GS2 = experts_GS2.at[..., 1].set(second_GS)
            scores_GS2 = jnp.take_along_axis(candidates.scores, experts_GS2, axis=-1)
        second_GS = jax.lax.stop_gradient(scores_GS2[..., 1] / jnp.maximum(scores_GS2.sum(-1), 1e-9))
        if policy in ("all", "sampling"):
            taken_GS = jnp.ones_like(second_GS, bool)
        elif policy == "none":
            taken_GS = jnp.zeros_like(second_GS, bool)
        elif policy == "random" and noise is not None:
            taken_GS = noise.uniform(1, 1)[..., 0] < second_GS / self.threshold
        else:
            taken_GS = second_GS >= self.threshold
        chosen_GS2 = jnp.stack([jnp.ones_like(taken_GS), taken_GS], axis=-1)
        return choice_major_pairs(experts_GS2, scores_GS2, candidates.inputs.mask, chosen_GS2)


def _with_runner_up(candidates: Candidates, experts_GSK: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The second score counts whether that expert was taken or not: then it is the runner-up's."""
    scores_GSK, first_GS1 = chosen_scores(candidates, experts_GSK), experts_GSK[..., :1]
    if experts_GSK.shape[-1] == 1:  # decisions of a layer that takes one
        return scores_GSK
    others_GSE = jnp.where(first_GS1 == jnp.arange(candidates.ranking.shape[-1]), -jnp.inf, candidates.ranking)
    runner_up_GS1 = jnp.argmax(others_GSE, axis=-1, keepdims=True)
    second_GS1 = jnp.where(experts_GSK[..., 1:2] < 0, runner_up_GS1, experts_GSK[..., 1:2])
    return scores_GSK.at[..., 1:2].set(chosen_scores(candidates, second_GS1))


@dataclass(frozen=True, kw_only=True)
class Prototypes(ChoosesK):
    """k groups of E/k experts; each token takes the best of every group (M6-T, arXiv:2105.15082). A pair's score is its
    part of the scores of its group, which makes a softmax over all experts one over the group. A balance loss is the
    mean of those of the groups."""

    k: int = 2

    @property
    def traits(self) -> Traits:
        return Traits(scores_of=self._shares, parts=self.k)

    def __call__(self, candidates: Candidates) -> Pairs:
        groups, size, num_experts = candidates.ranking.shape
        if num_experts % self.k:
            raise ConfigError("selection.k", f"{self.k} groups do not divide num_experts={num_experts}")
        each = num_experts // self.k
        best_GSK = jnp.argmax(candidates.ranking.reshape(groups, size, self.k, each), axis=-1)
        experts_GSK = best_GSK + each * jnp.arange(self.k)
        return choice_major_pairs(experts_GSK, self._shares(candidates, experts_GSK), candidates.inputs.mask)

    def _shares(self, candidates: Candidates, experts_GSK: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
        groups, size, num_experts = candidates.scores.shape
        of_groups_GSK = candidates.scores.reshape(groups, size, self.k, -1).sum(-1)
        group_GSK = jnp.maximum(experts_GSK, 0) // (num_experts // self.k)
        whole_GSK = jnp.take_along_axis(of_groups_GSK, group_GSK, axis=-1)
        return chosen_scores(candidates, experts_GSK) / jnp.maximum(whole_GSK, 1e-9)


@dataclass(frozen=True, kw_only=True)
class TopP(ChoosesK):
    """The fewest experts, best first, whose probabilities add up to p, at most `k` (Huang et al., arXiv:2403.07652)."""

    p: float = 0.6
    k: int = 4

    traits = Traits()

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ConfigError("p", f"{self.p} is outside (0, 1]")

    def __call__(self, candidates: Candidates) -> Pairs:
        experts_GSK, scores_GSK = take_best(candidates, self.k)
        whole_GS1 = jnp.maximum(candidates.scores.sum(-1, keepdims=True), 1e-9)
        before_GSK = (jnp.cumsum(scores_GSK, axis=-1) - scores_GSK) / whole_GS1
        chosen_GSK = _first_always(before_GSK < self.p)
        return choice_major_pairs(experts_GSK, jnp.where(chosen_GSK, scores_GSK, 0), candidates.inputs.mask, chosen_GSK)


@dataclass(frozen=True, kw_only=True)
class Positive(ChoosesK):
    """Every expert whose score is more than `above`, for scores that can be 0 (ReMoE, arXiv:2412.14711), or for
    enough of a softmax (DTS-Gate, arXiv:2112.14397).

    Nothing here makes them `k` on average, which capacity counts on: controller=sparsity does. `most` bounds those of a
    token, and with them the length of the list of pairs; only then does it matter how they rank."""

    k: int = 4
    most: Optional[int] = None  # the highest of the positive; None: all of them
    above: float = 0.0

    @property
    def traits(self) -> Traits:
        return Traits(beyond_k=self.most != self.k, sparse=True)

    def __post_init__(self):
        super().__post_init__()
        if self.most is not None and self.most < self.k:
            raise ConfigError("most", f"{self.most} is less than k={self.k}")
        if self.above < 0:
            raise ConfigError("above", f"{self.above} is negative")

    def __call__(self, candidates: Candidates) -> Pairs:
        num_experts = candidates.ranking.shape[-1]
        if self.most is None:
            excluded_GSE, scores_GSE = jnp.isneginf(candidates.ranking), jax.lax.stop_gradient(candidates.scores)
            candidates = dataclasses.replace(candidates, ranking=jnp.where(excluded_GSE, -jnp.inf, scores_GSE))
        experts_GSK, scores_GSK = take_best(candidates, min(self.most or num_experts, num_experts))
        allowed_GSK = jnp.isfinite(jnp.take_along_axis(candidates.ranking, experts_GSK, axis=-1))
        chosen_GSK = allowed_GSK & (scores_GSK > self.above)
        return choice_major_pairs(experts_GSK, jnp.where(chosen_GSK, scores_GSK, 0), candidates.inputs.mask, chosen_GSK)


@dataclass(frozen=True, kw_only=True)
class Threshold(ChoosesK):
    """Every expert that ranks above its threshold, `k` in the mean and at most `most`, perhaps none (expert threshold
    routing, arXiv:2603.11535). The thresholds are those of controller=expert_threshold; a token's experts depend on no
    other token, in training as in generation."""

    k: int = 2
    most: int = 8

    @property
    def traits(self) -> Traits:
        return Traits(beyond_k=self.most != self.k, thresholds=True)

    def __post_init__(self):
        super().__post_init__()
        if self.most < self.k:
            raise ConfigError("most", f"{self.most} is less than k={self.k}")

    def __call__(self, candidates: Candidates) -> Pairs:
        columns = min(self.most, candidates.ranking.shape[-1])
        experts_GSK, scores_GSK = take_best(candidates, columns)
        chosen_GSK = jnp.take_along_axis(candidates.ranking, experts_GSK, axis=-1) > 0
        return choice_major_pairs(experts_GSK, jnp.where(chosen_GSK, scores_GSK, 0), candidates.inputs.mask, chosen_GSK)


def _first_always(chosen_GSK: Bool[Array, "G S K"]) -> Bool[Array, "G S K"]:
    return chosen_GSK.at[..., 0].set(True)
