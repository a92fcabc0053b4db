"""Layers that own parameters, by value, where `model/test_lm.py` does not tell them apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.model.config import ModelConfig
from sparsejax.nn.attention import Attention, KVCache
from sparsejax.nn.embed import Embedding, Head
from sparsejax.nn.linear import RMSNorm, normal
from sparsejax.nn.mlp import MLP, Experts
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.ffn import expert_ffn

from reference import moe as slow
from reference.transformer import rms_norm
from support import assert_close, host_batch, put_batch

BACKBONE = ModelConfig(d_model=8, num_heads=2)
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("one_device")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(array):
    return jax.sharding.reshard(jnp.asarray(array), P(("data", "expert"), *[None] * (np.ndim(array) - 1)))


def weights_of(mlp):
    parts = {"w_in": mlp.w_in, "w_out": mlp.w_out} | ({} if mlp.w_gate is None else {"w_gate": mlp.w_gate})
    return {name: np.asarray(part.weight[...], np.float64) for name, part in parts.items()}


class TestRMSNorm:
    def test_value(self):
        norm, x = RMSNorm(8, 1e-6), random(2, 3, 8)
        scale = random(8, seed=1)
        norm.scale = norm.scale.replace(jnp.asarray(scale))
        assert_close(norm(rows(x)), rms_norm(x.astype(np.float64), scale, 1e-6).astype(np.float32), 1e-6)

    def test_bfloat16_is_normed_in_float32(self):
        norm, x = RMSNorm(64, 1e-6), rows(random(1, 1, 64)).astype(jnp.bfloat16)
        assert norm(x).dtype == jnp.bfloat16
        assert np.array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))

    def test_zeros_stay_zero_with_a_finite_gradient(self):
        norm, x = RMSNorm(8, 1e-6), jnp.zeros((1, 1, 8))
        assert (norm(x) == 0).all()
        assert np.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all()


class TestFeedForward:
    @pytest.mark.parametrize("gated", [False, True])
    def test_against_the_equation(self, gated):
        mlp, x = MLP(KEY, BACKBONE, 12, gated=gated, activation="gelu"), random(2, 3, 8)
        expected = slow.feed_forward(x.astype(np.float64), **weights_of(mlp))
        assert_close(mlp(rows(x)), expected.astype(np.float32))

    @pytest.mark.parametrize("gated", [False, True])
    def test_experts_are_as_many_networks(self, gated):
        experts, z = Experts(KEY, BACKBONE, 3, 12, gated=gated, activation="gelu"), random(3, 5, 8)
        out = expert_ffn(jnp.asarray(z), experts.weights(), "gelu")
        for e in range(3):
            gate = np.asarray(experts.w_gate[e], np.float64) if gated else None
            w_in, w_out = np.asarray(experts.w_in[e], np.float64), np.asarray(experts.w_out[e], np.float64)
            assert_close(out[e], slow.feed_forward(z[e].astype(np.float64), w_in, w_out, gate).astype(np.float32))

    def test_activations(self):
        x = random(1, 2, 8)
        outputs = [MLP(KEY, BACKBONE, 12, gated=False, activation=name)(rows(x)) for name in ("gelu", "silu", "relu")]
        assert len({float(out.sum()) for out in outputs}) == 3


class TestInitialisation:
    def test_normal_is_cut_at_two_deviations(self):
        values = np.asarray(normal(KEY, (100, 100), 0.5))
        assert values.dtype == np.float32 and np.abs(values).max() <= 1.0
        np.testing.assert_allclose(values.std(), 0.5 * 0.8796, rtol=0.02)

    def test_branches_shrink_with_the_depth_of_the_model(self):
        deep = dataclasses.replace(BACKBONE, repeats=8)
        shallow_out, deep_out = (
            np.asarray(MLP(KEY, config, 12, gated=False, activation="gelu").w_out.weight[...])
            for config in (BACKBONE, deep)
        )
        np.testing.assert_allclose(deep_out / shallow_out, 0.5, rtol=1e-5)


class TestEmbedding:
    def test_rows_by_number_times_the_root_of_the_width(self):
        embedding = Embedding(KEY, 500, 8, "float32")
        tokens = np.array([[3, 499, 0]], np.int32)
        table = np.asarray(embedding.table[...])
        assert_close(embedding(rows(tokens)), np.float32(8**0.5) * table[tokens], 1e-6)

    def test_tied_logits_are_products_with_the_rows(self):
        embedding, x = Embedding(KEY, 5, 8, "float32"), random(1, 3, 8)
        assert_close(embedding.logits(rows(x)), x @ np.asarray(embedding.table[...]).T)

    def test_a_head_of_its_own(self):
        head, x = Head(KEY, 5, 8, "float32"), random(1, 3, 8)
        assert_close(head.logits(rows(x)), x @ np.asarray(head.weight[...]))

    def test_bfloat16_products_are_summed_in_float32(self):
        assert Head(KEY, 5, 8, "bfloat16").logits(rows(random(1, 3, 8))).dtype == jnp.float32

    def test_soft_capped(self):
        x = jnp.array([-100.0, 0.0, 0.1, 100.0])
        assert soft_capped(x, None) is x
        np.testing.assert_allclose(soft_capped(x, 5.0), 5 * np.tanh(np.asarray(x) / 5), rtol=1e-6)


class TestAttention:
    def attend(self, backbone, x, arrays, mesh, change=1.0):
        attention = Attention(KEY, backbone)
        attention.q.weight = attention.q.weight.replace(change * attention.q.weight[...])
        batch = put_batch(arrays, mesh)
        return jax.jit(attention)(rows(x), batch.positions, batch.segments, None)[0]

    def test_normed_queries_forget_their_length(self, one_device):
        x, arrays = random(2, 6, 8), host_batch(2, 6)
        normed = dataclasses.replace(BACKBONE, qk_norm=True)
        assert_close(self.attend(normed, x, arrays, one_device, 7.0), self.attend(normed, x, arrays, one_device), 1e-4)
        plain = [np.asarray(self.attend(BACKBONE, x, arrays, one_device, times)) for times in (7.0, 1.0)]
        assert np.abs(plain[0] - plain[1]).max() > 1e-2

    def test_one_token_at_a_time_over_a_cache_is_the_whole_row(self, one_device):
        length, backbone = 6, dataclasses.replace(BACKBONE, num_kv_heads=1, qk_norm=True, attention_soft_cap=2.0)
        attention, x = jax.jit(Attention(KEY, backbone)), random(2, length, 8)
        ones = np.ones((2, length), np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
        whole, _ = attention(rows(x), rows(positions), rows(ones), None)
        empty = jnp.zeros((2, length, 1, 4), out_sharding=P(("data", "expert"), None, "tensor", None))
        cache = KVCache(k=empty, v=empty, segments=rows(0 * ones))
        for t in range(length):
            at = slice(t, t + 1)
            one, cache = attention(rows(x[:, at]), rows(positions[:, at]), rows(ones[:, at]), cache)
            assert_close(one, np.asarray(whole)[:, at])
