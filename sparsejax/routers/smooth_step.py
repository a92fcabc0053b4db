"""Logits that are weights already: experts in a binary code whose bits are learned."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.routers.candidates import Traits
from sparsejax.routers.projections import Parameters, project, router_param


@dataclass(frozen=True, kw_only=True)
class DSelectK:
    """Σ_j softmax(x B)_j · r(z_j), z = x A, for `selectors` j: weights ≥ 0 that add up to 1 (DSelect-k,
    arXiv:2106.03760, its per-example form). Goes with score=relu, which leaves them as they are, and
    selection=positive.

    r(z) has a number for every expert, the product over the bits of its code of S(z_b) or 1 − S(z_b). Once a z_b is
    `gamma` / 2 or more from 0 the smooth step S is exactly 0 or 1, and stays there, its gradient being 0: a token whose
    every bit is settled has one expert a selector. Where experts are no power of two, the codes left over stand for
    the first experts again, so that no weight is lost; the paper has a penalty on them. Its penalty on the entropy of
    selectors is balance=selector_entropy."""

    selectors: int = 2
    gamma: float = 1.0

    traits = Traits()

    def __post_init__(self):
        if self.selectors < 1:
            raise ConfigError("selectors", f"{self.selectors} is not positive")
        if self.gamma <= 0:
            raise ConfigError("gamma", f"{self.gamma} is not positive")

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        codes_key, mixture_key = jax.random.split(key)
        near_zero = 0.01 * self.gamma * d_model**-0.5  # no bit is settled yet
        return {
            "codes": router_param(codes_key, (d_model, self.selectors * _bits(num_experts)), near_zero),
            "mixture": router_param(mixture_key, (d_model, self.selectors), d_model**-0.5),
        }

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        products = d_model * self.selectors * (_bits(num_experts) + 1)
        return products, products

    def chosen(self, x_GSD: Float[Array, "G S D"], parameters: Parameters, num_experts: int) -> Float[Array, "G S N E"]:
        """r of every selector."""
        bits = project(x_GSD, parameters["codes"]).reshape(*x_GSD.shape[:-1], self.selectors, -1)
        of_codes = of_every_code(smooth_step(bits, self.gamma))
        over = of_codes[..., num_experts:]
        return of_codes[..., :num_experts].at[..., : over.shape[-1]].add(over)

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        mixture = jax.nn.softmax(project(x_GSD, parameters["mixture"]), axis=-1)
        return jnp.sum(mixture[..., None] * self.chosen(x_GSD, parameters, num_experts), axis=-2)


def smooth_step(t: Float[Array, "..."], gamma: float) -> Float[Array, "..."]:
    """0 up to −gamma / 2, 1 from gamma / 2 on, between them the cubic that joins them with a continuous slope."""
    t = jnp.clip(t / gamma, -0.5, 0.5)
    return 0.5 + t * (1.5 - 2 * t * t)


def of_every_code(on: Float[Array, "*B bits"]) -> Float[Array, "*B codes"]:
    """For every number of so many bits, the lowest first: Π_b on_b where bit b is set, 1 − on_b where it is not."""
    product = jnp.ones_like(on[..., :1])
    for b in range(on.shape[-1]):
        bit = on[..., b : b + 1]
        product = jnp.concatenate([product * (1 - bit), product * bit], axis=-1)
    return product


def _bits(num_experts: int) -> int:
    """Of a code with room for all; one expert alone has a bit, too."""
    return max(1, (num_experts - 1).bit_length())
