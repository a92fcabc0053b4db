"""Axis 1, score: router logits → one non-negative float32 number per token and expert."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.registry import Registry


class Score(Protocol):
    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]: ...


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Probabilities over experts (Shazeer et al. 2017; Switch, GShard, Mixtral)."""

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jax.nn.softmax(logits_GSE, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Each expert judged alone; combine weights are usually renormalised over the selected (DeepSeek-V3,
    arXiv:2412.19437)."""

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jax.nn.sigmoid(logits_GSE)


SCORES = Registry("score", {"softmax": Softmax, "sigmoid": Sigmoid})


def as_probabilities(scores_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
    """Scores divided by their sum over experts: what balance losses and entropies are taken of, whatever the score."""
    return scores_GSE / jnp.maximum(scores_GSE.sum(-1, keepdims=True), 1e-9)
