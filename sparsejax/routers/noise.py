"""Axis 1, noise: what is added to the router's logits in training, before the score and not before the z-loss."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.routers.candidates import Noise


class LogitNoise(Protocol):
    @property
    def silent(self) -> bool: ...

    def __call__(self, logits_GSE: Float[Array, "G S E"], noise: Noise) -> Float[Array, "G S E"]: ...


@dataclass(frozen=True, kw_only=True)
class NoNoise:
    """Nothing."""

    silent = True

    def __call__(self, logits_GSE, noise):
        return logits_GSE


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """N(0, (scale / E)²) (V-MoE, arXiv:2106.05974, with scale = 1)."""

    scale: float = 1.0

    silent = False

    def __post_init__(self):
        _check(self.scale)

    def __call__(self, logits_GSE, noise):
        num_experts = logits_GSE.shape[-1]
        normal_GSE = jax.scipy.special.ndtri(_open_uniform(noise, num_experts))
        return logits_GSE + self.scale / num_experts * normal_GSE


@dataclass(frozen=True, kw_only=True)
class Gumbel:
    """Gumbel noise times scale: with top-1 and scale 1, an expert drawn from the softmax of the logits."""

    scale: float = 1.0

    silent = False

    def __post_init__(self):
        _check(self.scale)

    def __call__(self, logits_GSE, noise):
        return logits_GSE - self.scale * jnp.log(-jnp.log(_open_uniform(noise, logits_GSE.shape[-1])))


def _open_uniform(noise: Noise, num_experts: int) -> Float[Array, "G S E"]:
    """Half a step off 0 and 1, where the inverse of a distribution is infinite."""
    return jnp.clip(noise.uniform(3, num_experts), 2**-24, 1 - 2**-24)


def _check(scale: float) -> None:
    if scale <= 0:
        raise ConfigError("scale", f"{scale} is not positive; for no noise choose noise = 'none'")


NOISES = Registry("noise", {"none": NoNoise, "gaussian": Gaussian, "gumbel": Gumbel})
