"""The feed-forward network, plain or gated, for one network and for a stack of experts."""

import functools
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear, normal, param
from sparsejax.ops.ffn import Activation, Weights, hidden, only_active


def residual_scale(backbone: Backbone) -> float:
    """Factor on the initial scale of a branch's last matrix: 2L branches add up to unit variance (GPT-2)."""
    return (2 * backbone.num_layers) ** -0.5


def ffn_width(backbone: Backbone, d_ff: Optional[int]) -> int:
    """F: what a config says, or 4 · d_model."""
    return 4 * backbone.d_model if d_ff is None else d_ff


def ffn_weights(backbone: Backbone, d_ff: int, gated: bool) -> int:
    """Weights of one feed-forward network."""
    return (3 if gated else 2) * backbone.d_model * d_ff


class MLP(nnx.Module):
    """act(x W_in) W_out, or (act(x W_gate) ⊙ x W_in) W_out when gated (Shazeer, arXiv:2002.05202). With `active`, act
    is of the `statistical_top_k` of its argument."""

    def __init__(
        self,
        key: PRNGKeyArray,
        backbone: Backbone,
        d_ff: int,
        *,
        gated: bool,
        activation: Activation,
        active: Optional[float] = None,
    ):
        d_model, dtype = backbone.d_model, backbone.dtype
        keys = jax.random.split(key, 3)
        up = {"stddev": d_model**-0.5, "out_spec": P(BATCH_AXES, None, "tensor"), "dtype": dtype}
        self.w_in = Linear(keys[0], "btd,df->btf", (d_model, d_ff), ("embed", "mlp"), **up)
        self.w_gate = Linear(keys[1], "btd,df->btf", (d_model, d_ff), ("embed", "mlp"), **up) if gated else None
        stddev = residual_scale(backbone) * d_ff**-0.5
        down = {"stddev": stddev, "out_spec": P(BATCH_AXES, None, None), "dtype": dtype}
        self.w_out = Linear(keys[2], "btf,fd->btd", (d_ff, d_model), ("mlp", "embed"), **down)
        self.activation: Activation = activation
        self.active = active

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(self.up(x_BTD))

    def up(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T F"], ...]:
        """The products with w_in and, when gated, w_gate."""
        linear = [self.w_in] + ([] if self.w_gate is None else [self.w_gate])
        return tuple(layer(x_BTD) for layer in linear)

    def down(self, up: tuple[Float[Array, "B T F"], ...]) -> Float[Array, "B T D"]:
        """The output, from these."""

        # The backward pass applies the activation again, as that of experts does (`expert_ffn`).
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def down(up: tuple[Float[Array, "B T F"], ...]) -> Float[Array, "B T D"]:
            return self.w_out(hidden(up if self.active is None else only_active(up, self.active), self.activation))

        return down(up)

    def active_share(self, up: tuple[Float[Array, "B T F"], ...]) -> Float[Array, "B T"]:
        """Of each token's neurons, float32, without gradient."""
        assert self.active is not None
        return (only_active(jax.lax.stop_gradient(up), self.active)[-1] > 0).mean(-1, dtype=jnp.float32)


class Experts(nnx.Module):
    """E feed-forward networks, each with its own initial values, stacked along the first axis. If `replicated`, every
    device of the mesh axis `expert` has all of them."""

    def __init__(
        self,
        key: PRNGKeyArray,
        backbone: Backbone,
        num_experts: int,
        d_ff: int,
        *,
        gated: bool,
        activation: Activation,
        replicated: bool = False,
    ):
        d_model = backbone.d_model
        keys = jax.random.split(key, 3)
        stack = None if replicated else "experts"
        up_axes = (stack, "embed", "mlp")
        self.w_in = param(normal(keys[0], (num_experts, d_model, d_ff), d_model**-0.5), up_axes, "expert")
        gate = normal(keys[1], (num_experts, d_model, d_ff), d_model**-0.5) if gated else None
        self.w_gate = None if gate is None else param(gate, up_axes, "expert")
        stddev = residual_scale(backbone) * d_ff**-0.5
        self.w_out = param(normal(keys[2], (num_experts, d_ff, d_model), stddev), (stack, "mlp", "embed"), "expert")
        self.activation: Activation = activation
        self.dtype = backbone.dtype

    def weights(self) -> Weights:
        """As they are stored."""
        stored = [self.w_in, self.w_out] + ([] if self.w_gate is None else [self.w_gate])
        return tuple(weight[...] for weight in stored)
