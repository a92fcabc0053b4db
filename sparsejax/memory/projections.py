"""Consumptions that bring a value to the model's width by learned matrices.

Rows start at zero and matrices at unit gain, so that the learning rate of a row means what it means where rows are
added as they are. Where a matrix has to start at zero, rows do not."""

from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.memory.consume import Consume, Consumed, Surroundings
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear
from sparsejax.ops.ffn import ACTIVATIONS, Activation

ROWS_SPEC = P(BATCH_AXES, None, None)


def into_model(key: PRNGKeyArray, backbone: Backbone, width: int, stddev: float) -> Linear:
    """From `width` numbers to the model's."""
    axes, sharding = (None, "embed"), {"out_spec": ROWS_SPEC, "dtype": backbone.dtype}
    return Linear(key, "btv,vd->btd", (width, backbone.d_model), axes, stddev=stddev, **sharding)


def out_of_model(key: PRNGKeyArray, backbone: Backbone, width: int) -> Linear:
    """From the model's width to `width` numbers."""
    axes, sharding = ("embed", None), {"out_spec": ROWS_SPEC, "dtype": backbone.dtype}
    shape, stddev = (backbone.d_model, width), backbone.d_model**-0.5
    return Linear(key, "btd,dv->btv", shape, axes, stddev=stddev, **sharding)


@dataclass(frozen=True, kw_only=True)
class Project(Consume):
    """x + value W, for rows narrower than the model (Over-Encoding, arXiv:2501.16975)."""

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        return Projected(into_model(key, backbone, value_width, value_width**-0.5))

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        return value_width * backbone.d_model, value_width * backbone.d_model


class Projected(nnx.Module):
    """value W."""

    def __init__(self, weight: Linear):
        self.weight = weight

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed:
        return Consumed(delta=self.weight(value_BTV))


@dataclass(frozen=True, kw_only=True)
class Concat(Consume):
    """[x; value] W with W = [I; 0] at first (arXiv:2302.00003), kept as what it adds to x: both parts of W − [I; 0]
    start at zero, and weight decay leads back there."""

    starts_at_zero = True

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        return Concatenated(key, backbone, value_width)

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        weights = (backbone.d_model + value_width) * backbone.d_model
        return weights, weights


class Concatenated(nnx.Module):
    """x (W_x − I) + value W_v."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, value_width: int):
        axes, sharding = ("embed", None), {"out_spec": ROWS_SPEC, "dtype": backbone.dtype}
        shape = (backbone.d_model, backbone.d_model)
        self.of_stream = Linear(key, "btd,de->bte", shape, axes, stddev=0.0, **sharding)
        self.of_value = into_model(key, backbone, value_width, 0.0)

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed:
        return Consumed(delta=self.of_stream(around.x) + self.of_value(value_BTV))


@dataclass(frozen=True, kw_only=True)
class GatedOutput(Consume):
    """x + (value ⊙ act(h W_1)) W_2 (Memory+, arXiv:2412.09764)."""

    activation: Activation = "silu"

    splits_value = True
    reads_state = True

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        return Gated(key, backbone, value_width, self.activation)

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        weights = 2 * backbone.d_model * value_width
        return weights, weights


@dataclass(frozen=True, kw_only=True)
class UpProjection(GatedOutput):
    """(act(h W_1) ⊙ row) W_2: a gated feed-forward network whose up-projection is looked up (STEM, arXiv:2601.10639).
    Its two matrices are its own: in a block of attention alone it is the network, in others one more."""

    accepts = ("gate",)


class Gated(nnx.Module):
    """(value ⊙ act(h W_1)) W_2, split along its hidden width as a feed-forward network is."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, width: int, activation: Activation):
        gate_key, out_key = jax.random.split(key)
        d_model, dtype, self.spec = backbone.d_model, backbone.dtype, P(BATCH_AXES, None, "tensor")
        up = {"stddev": d_model**-0.5, "out_spec": self.spec, "dtype": dtype}
        self.w_gate = Linear(gate_key, "btd,df->btf", (d_model, width), ("embed", "mlp"), **up)
        down = {"stddev": width**-0.5, "out_spec": ROWS_SPEC, "dtype": dtype}
        self.w_out = Linear(out_key, "btf,fd->btd", (width, d_model), ("mlp", "embed"), **down)
        self.activation: Activation = activation

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed:
        gate_BTV = ACTIVATIONS[self.activation](self.w_gate(around.h))
        return Consumed(delta=self.w_out(gate_BTV * jax.sharding.reshard(value_BTV, self.spec)))
