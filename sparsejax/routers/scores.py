"""Axis 1, score: router logits → one non-negative float32 number per token and expert."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry


class Score(Protocol):
    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]: ...


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Probabilities over experts, softmax(logits / temperature) (Shazeer et al. 2017; Switch, GShard, Mixtral)."""

    temperature: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ConfigError("temperature", f"{self.temperature} is not positive")

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jax.nn.softmax(logits_GSE / self.temperature, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Each expert judged alone; combine weights are usually renormalised over the selected (DeepSeek-V3,
    arXiv:2412.19437)."""

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jax.nn.sigmoid(logits_GSE)


@dataclass(frozen=True, kw_only=True)
class SqrtSoftplus:
    """√log(1 + exp(logit)): like a sigmoid each expert is judged alone, unlike it without a ceiling (DeepSeek-V4)."""

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jnp.sqrt(jax.nn.softplus(logits_GSE) + 1e-12)  # the root has no gradient at 0


@dataclass(frozen=True, kw_only=True)
class Relu:
    """max(logit, 0): a score that can be exactly 0 (ReMoE, arXiv:2412.14711). selection=positive leaves such experts
    out; with the others they are chosen for want of better, with a weight of 0."""

    def __call__(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return jax.nn.relu(logits_GSE)


SCORES = Registry("score", {"softmax": Softmax, "sigmoid": Sigmoid, "sqrt_softplus": SqrtSoftplus, "relu": Relu})


def as_probabilities(scores_GSE: Float[Array, "G S E"], parts: int = 1) -> Float[Array, "G S E"]:
    """Scores divided by their sum over experts: what balance losses and entropies are taken of, whatever the score. Of
    several equal parts of the experts each has the same share of the whole."""
    each = scores_GSE.reshape(*scores_GSE.shape[:-1], parts, -1)
    shares = each / (parts * jnp.maximum(each.sum(-1, keepdims=True), 1e-9))
    return shares.reshape(scores_GSE.shape)
