"""Axis 1, noise: what is added to the router's logits in training, before the score and not before the z-loss."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.routers.candidates import Noise
from sparsejax.routers.projections import Parameters, project, router_param


class LogitNoise(Protocol):
    """A random number for every token and expert, times a spread."""

    @property
    def silent(self) -> bool: ...

    @property
    def normal(self) -> bool:
        """Whether the numbers are N(0, 1), so that the spread is a standard deviation."""
        ...

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        """Its parameters by name; they lie beside those of the logits."""
        ...

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        ...

    def spread(
        self, x_GSD: Float[Array, "G S D"], parameters: Parameters, num_experts: int
    ) -> Float[Array, "G S E"]: ...

    def draw(self, noise: Noise, num_experts: int) -> Float[Array, "G S E"]: ...


class _Fixed:
    """Noise of one spread, which needs no parameters."""

    silent = False
    normal = False

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        return {}

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True, kw_only=True)
class NoNoise(_Fixed):
    """Nothing."""

    silent = True

    def spread(self, x_GSD, parameters, num_experts):
        return jnp.zeros((*x_GSD.shape[:2], num_experts), jnp.float32)

    def draw(self, noise, num_experts):
        return jnp.zeros((*noise.groups, num_experts), jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Gaussian(_Fixed):
    """N(0, (scale / E)²) (V-MoE, arXiv:2106.05974, with scale = 1)."""

    scale: float = 1.0

    normal = True

    def __post_init__(self):
        _check(self.scale)

    def spread(self, x_GSD, parameters, num_experts):
        return jnp.full((*x_GSD.shape[:2], num_experts), self.scale / num_experts, jnp.float32)

    def draw(self, noise, num_experts):
        return _normal(noise, num_experts)


@dataclass(frozen=True, kw_only=True)
class Gumbel(_Fixed):
    """Gumbel noise times scale: with top-1 and scale 1, an expert drawn from the softmax of the logits."""

    scale: float = 1.0

    def __post_init__(self):
        _check(self.scale)

    def spread(self, x_GSD, parameters, num_experts):
        return jnp.full((*x_GSD.shape[:2], num_experts), self.scale, jnp.float32)

    def draw(self, noise, num_experts):
        return noise.gumbel(3, num_experts)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """N(0, σ²) with σ = softplus(x W) + `floor` for each token and expert, W being learned from 0 (Shazeer et al.,
    arXiv:1701.06538; the floor is that of the authors' code)."""

    floor: float = 0.01

    silent = False
    normal = True

    def __post_init__(self):
        if self.floor <= 0:
            raise ConfigError("floor", f"{self.floor} is not positive; a spread of 0 has no load that can be estimated")

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        return {"noise": router_param(key, (d_model, num_experts), 0.0)}

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        return d_model * num_experts, d_model * num_experts

    def spread(self, x_GSD, parameters, num_experts):
        return jax.nn.softplus(project(x_GSD, parameters["noise"])) + self.floor

    def draw(self, noise, num_experts):
        return _normal(noise, num_experts)


def _normal(noise: Noise, num_experts: int) -> Float[Array, "G S E"]:
    return jax.scipy.special.ndtri(_open_uniform(noise, num_experts))


def _open_uniform(noise: Noise, num_experts: int) -> Float[Array, "G S E"]:
    """Half a step off 0 and 1, where the inverse of a distribution is infinite."""
    return jnp.clip(noise.uniform(3, num_experts), 2**-24, 1 - 2**-24)


def _check(scale: float) -> None:
    if scale <= 0:
        raise ConfigError("scale", f"{scale} is not positive; for no noise choose noise = 'none'")


NOISES = Registry("noise", {"none": NoNoise, "gaussian": Gaussian, "gumbel": Gumbel, "learned": Learned})
