"""What else is random in training. The draws are the tokens' own; without noise, that is outside training, nothing
happens."""

from typing import Optional

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.routers.candidates import Noise


def jitter(x_GSD: Float[Array, "G S D"], noise: Optional[Noise], amount: float) -> Float[Array, "G S D"]:
    """x ⊙ U[1 − amount, 1 + amount] in training (Switch, arXiv:2101.03961, appendix C)."""
    if noise is None or amount == 0:
        return x_GSD
    return x_GSD * (1 + amount * (2 * noise.uniform(0, x_GSD.shape[-1]) - 1))


def drop_inputs(x_GSD: Float[Array, "G S D"], noise: Optional[Noise], rate: float) -> Float[Array, "G S D"]:
    """`rate` of the numbers are 0, the others 1 / (1 − rate) times what they were (the exploration of Switch,
    arXiv:2101.03961, by dropout of the router's input)."""
    if noise is None or rate == 0:
        return x_GSD
    return jnp.where(noise.uniform(10, x_GSD.shape[-1]) < rate, 0, x_GSD / (1 - rate))


def explore(ranking_GSE: Float[Array, "G S E"], noise: Optional[Noise], share: float) -> Float[Array, "G S E"]:
    """With probability `share` a token's ranking is shuffled: any expert may be its best, while how it compares with
    other tokens stays what it was."""
    if noise is None or share == 0:
        return ranking_GSE
    num_experts = ranking_GSE.shape[-1]
    draws_GSX = noise.uniform(11, 1 + num_experts)
    shuffled_GSE = jnp.take_along_axis(ranking_GSE, jnp.argsort(draws_GSX[..., 1:], axis=-1), axis=-1)
    return jnp.where(draws_GSX[..., :1] < share, shuffled_GSE, ranking_GSE)


def mask_outputs(y_GSD: Float[Array, "G S D"], noise: Optional[Noise], rate: float) -> Float[Array, "G S D"]:
    """Expert output masking (NLLB, arXiv:2207.04672): `rate` of the tokens get 0 from the experts, the others
    1 / (1 − rate) times as much, so that the mean is that of evaluation."""
    if noise is None or rate == 0:
        return y_GSD
    return jnp.where(noise.uniform(12, 1) < rate, 0, y_GSD / (1 - rate)).astype(y_GSD.dtype)
