"""Consumptions that let the state decide how much of a value it takes."""

from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.memory.address import positive
from sparsejax.memory.consume import Consume, Consumed, Surroundings
from sparsejax.memory.projections import into_model, out_of_model
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import RMSNorm, param
from sparsejax.ops.convolution import causal_depthwise


@dataclass(frozen=True, kw_only=True)
class GatedAdd(Consume):
    """x + v + silu(conv(norm(v))), v = α · value W_v (Engram, arXiv:2601.07372).

    The gate α = sigmoid(sign(s) √|s|), s = ⟨h, norm(value W_k)⟩ / √D, is one number a token. The convolution is
    causal, a kernel a feature, and starts at zero."""

    kernel: int = 4
    dilation: int = 3  # the order of the longest n-gram

    gated = True
    reads_state = True

    def __post_init__(self):
        positive(self, "kernel", "dilation")

    def unused(self) -> dict[str, str]:
        return {"dilation": "a kernel of 1 reaches no other token"} if self.kernel == 1 else {}

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        return ScalarGate(key, backbone, value_width, self)

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        weights = 2 * value_width * backbone.d_model
        return weights + (2 + self.kernel) * backbone.d_model, weights

    def window(self, backbone: Backbone) -> Optional[tuple[int, ...]]:
        reach = (self.kernel - 1) * self.dilation
        return (reach, backbone.d_model) if reach else None


class ScalarGate(nnx.Module):
    """The module of `GatedAdd`."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, value_width: int, spec: GatedAdd):
        key_key, value_key = jax.random.split(key)
        d_model, epsilon = backbone.d_model, backbone.norm_epsilon
        self.w_key = into_model(key_key, backbone, value_width, value_width**-0.5)
        self.w_value = into_model(value_key, backbone, value_width, value_width**-0.5)
        self.key_norm, self.value_norm = RMSNorm(d_model, epsilon), RMSNorm(d_model, epsilon)
        self.kernel = param(jnp.zeros((spec.kernel, d_model), jnp.float32), (None, None), "dense")
        self.dilation = spec.dilation

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed:
        key_BTD = self.key_norm(self.w_key(value_BTV)).astype(jnp.float32)
        s_BT = (around.h.astype(jnp.float32) * key_BTD).sum(-1) * key_BTD.shape[-1] ** -0.5
        gate_BT = jax.nn.sigmoid(jnp.sign(s_BT) * jnp.sqrt(jnp.maximum(jnp.abs(s_BT), 1e-6)))
        value_BTD = self.w_value(value_BTV)
        v_BTD = (gate_BT[..., None] * value_BTD).astype(value_BTD.dtype)
        recent_BTD = self.value_norm(v_BTD)
        by_row: Any = P(BATCH_AXES)
        operands = (recent_BTD, self.kernel[...].astype(v_BTD.dtype), around.segments, around.window)

        def local(recent, kernel, segments, window):
            return (causal_depthwise(recent, kernel, self.dilation, segments, window),)

        convolved = on_each_device(local, (by_row, P(), by_row, by_row), (P(BATCH_AXES, None, None),))
        return Consumed(delta=v_BTD + jax.nn.silu(convolved(*operands)[0]), gate=gate_BT, recent=recent_BTD)


@dataclass(frozen=True, kw_only=True)
class PerLayer(Consume):
    """x + norm((gelu(h W_g) ⊙ u) W_u), u = (norm(x_0 W_c) + √p · value) / √2, x_0 being the embedded token and p the
    width of the value (per-layer embeddings of Gemma 3n).

    The last norm's scale starts at zero, not W_u: a norm makes any W_u but zero as large as any other."""

    starts_at_zero = True
    reads_embedding = True
    reads_state = True

    def build(self, key: PRNGKeyArray, backbone: Backbone, value_width: int) -> nnx.Module:
        return FeatureGate(key, backbone, value_width)

    def size(self, backbone: Backbone, value_width: int) -> tuple[int, int]:
        weights = 3 * value_width * backbone.d_model
        return weights + value_width + backbone.d_model, weights


class FeatureGate(nnx.Module):
    """The module of `PerLayer`."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, value_width: int):
        context_key, gate_key, out_key = jax.random.split(key, 3)
        self.w_context = out_of_model(context_key, backbone, value_width)
        self.context_norm = RMSNorm(value_width, backbone.norm_epsilon)
        self.w_gate = out_of_model(gate_key, backbone, value_width)
        self.w_out = into_model(out_key, backbone, value_width, value_width**-0.5)
        self.out_norm = RMSNorm(backbone.d_model, backbone.norm_epsilon, start=0.0)

    def __call__(self, value_BTV: Float[Array, "B T V"], around: Surroundings) -> Consumed:
        assert around.embedded is not None  # the model passes it on to what reads it
        context_BTV = self.context_norm(self.w_context(around.embedded))
        u_BTV = (context_BTV + value_BTV.shape[-1] ** 0.5 * value_BTV) * 0.5**0.5
        return Consumed(delta=self.out_norm(self.w_out(jax.nn.gelu(self.w_gate(around.h)) * u_BTV)))
