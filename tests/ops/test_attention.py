"""Rotary positions, and both forms of attention: against loops, against each other, and compiled for a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.attention import rope, splash_attention, xla_attention

from reference import attention as slow
from support import assert_close


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def heads(length, q_heads, kv_heads, width, rows=2):
    """(q, k, v)."""
    return (
        random(rows, length, q_heads, width, seed=1),
        random(rows, length, kv_heads, width, seed=2),
        random(rows, length, kv_heads, width, seed=3),
    )


@jax.jit(static_argnums=(4, 5))
def over_row(q, k, v, segments, soft_cap=None, causal=True):
    order = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segments.shape) if causal else None
    return xla_attention(q, k, v, segments, segments, order, soft_cap)


class TestRope:
    def test_against_a_loop_over_pairs_of_features(self):
        x, positions = random(2, 5, 3, 8), jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, 5)))
        assert_close(
            rope(x, positions, 100.0), slow.rope(np.asarray(x), np.asarray(positions), 100.0).astype(np.float32)
        )

    def test_position_zero_changes_nothing(self):
        x = random(1, 4, 2, 8)
        assert np.array_equal(rope(x, jnp.zeros((1, 4), jnp.int32), 10_000.0), x)

    def test_lengths_are_kept(self):
        x = random(1, 6, 2, 16)
        turned = rope(x, jnp.arange(6)[None] * 37, 10_000.0)
        np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)

    def test_products_depend_on_the_distance_only(self):
        q, k = random(1, 1, 1, 16, seed=1), random(1, 1, 1, 16, seed=2)
        at = lambda x, position: rope(x, jnp.array([[position]]), 1000.0)  # noqa: E731
        product = lambda i, j: float(jnp.vdot(at(q, i), at(k, j)))  # noqa: E731
        np.testing.assert_allclose(product(20, 13), product(107, 100), rtol=1e-4)
        np.testing.assert_allclose(product(7, 0), product(20, 13), rtol=1e-4)
        assert abs(product(20, 13) - product(20, 12)) > 1e-3

    def test_bfloat16_is_turned_in_float32(self):
        x, far = random(1, 1, 1, 8).astype(jnp.bfloat16), jnp.array([[1001]])
        turned = rope(x, far, 10_000.0)
        assert turned.dtype == jnp.bfloat16
        assert np.array_equal(turned, rope(x.astype(jnp.float32), far, 10_000.0).astype(jnp.bfloat16))


SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 3, 3, 0]], jnp.int32)


class TestXlaAttention:
    @pytest.mark.parametrize("soft_cap", [None, 1.5])
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("causal", [True, False])
    def test_against_a_loop_over_queries(self, kv_heads, soft_cap, causal):
        q, k, v = heads(8, 4, kv_heads, 6)
        real = np.asarray(SEGMENTS) > 0
        expected = slow.attention(*(np.asarray(a) for a in (q, k, v, SEGMENTS)), soft_cap, causal).astype(np.float32)
        assert_close(np.asarray(over_row(q, k, v, SEGMENTS, soft_cap, causal))[real], expected[real])

    def test_a_large_soft_cap_is_no_cap(self):
        q, k, v = heads(8, 4, 2, 6)
        assert_close(over_row(q, k, v, SEGMENTS, 1e4), over_row(q, k, v, SEGMENTS), 1e-5)

    def test_queries_may_stand_later_than_keys_are_listed(self):
        """The last two queries alone, over all keys: what a key/value cache asks for."""
        q, k, v = heads(8, 4, 2, 6)
        tail = xla_attention(q[:, 6:], k, v, SEGMENTS[:, 6:], SEGMENTS, jnp.array([[6, 7], [6, 7]]))
        assert_close(tail[0], over_row(q, k, v, SEGMENTS)[0, 6:])

    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    def test_padding_is_finite_in_value_and_gradient(self, soft_cap):
        q, k, v = heads(8, 2, 2, 4, rows=1)
        segments = jnp.zeros((1, 8), jnp.int32)
        value, grads = jax.value_and_grad(lambda *qkv: over_row(*qkv, segments, soft_cap).sum(), argnums=(0, 1, 2))(
            q, k, v
        )
        assert all(np.isfinite(a).all() for a in (value, *grads))


@pytest.fixture(scope="module", params=[(None, True), (3.0, True), (None, False)], ids=["no cap", "soft cap", "full"])
def both(request):
    """Value and gradients in q, k, v of (splash, XLA)."""
    q, k, v = heads(256, 2, 1, 128, rows=1)
    segments = jnp.asarray(np.repeat([1, 2, 3], [100, 28, 128])[None], jnp.int32)
    weights = random(1, 256, 2, 128, seed=9)

    def results(attend):
        def loss(q, k, v):
            out = attend(q, k, v)
            return (out * weights).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, grads

    splash = results(lambda q, k, v: splash_attention(q, k, v, segments, *request.param, interpret=True))
    return splash, results(lambda q, k, v: over_row(q, k, v, segments, *request.param))


class TestSplashAttention:
    """The TPU kernel, run by Pallas' interpreter."""

    def test_values_are_those_of_xla(self, both):
        assert_close(both[0][0], both[1][0])

    def test_gradients_are_those_of_xla(self, both):
        assert_close(both[0][1], both[1][1])


COMPILE_FOR_TPU = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sparsejax.nn.attention import HEADS_SPEC, ROWS_SPEC
from sparsejax.ops.attention import splash_attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
devices = np.array(topology.devices).reshape(2, 4, 2)
mesh = jax.sharding.Mesh(devices, ("data", "expert", "tensor"), axis_types=(AxisType.Explicit,) * 3)
rows, length, heads, kv_heads, width = 8, 4096, 8, 4, 128
shape = lambda *s, spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec))
q = shape(rows, length, heads, width, spec=HEADS_SPEC)
k = shape(rows, length, kv_heads, width, spec=HEADS_SPEC)
segments = shape(rows, length, spec=ROWS_SPEC, dtype=jnp.int32)

def loss(q, k, v, segments):
    local = lambda q, k, v, s: splash_attention(q, k, v, s, 30.0)
    specs = (HEADS_SPEC,) * 3 + (ROWS_SPEC,)
    out = jax.shard_map(local, in_specs=specs, out_specs=HEADS_SPEC, check_vma=False)(q, k, v, segments)
    return jnp.sum(out.astype(jnp.float32) ** 2)

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, segments).compile()
memory = compiled.memory_analysis()
print(json.dumps({"temporary": memory.temp_size_in_bytes, "kernels": compiled.as_text().count("tpu_custom_call")}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu (no TPU)"
)
def test_splash_compiles_for_a_tpu_pod_without_a_square_of_the_length():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    scores = 4 * 4096 * 4096 * 2  # one row's attention matrices of a device's four heads, bfloat16
    assert found["kernels"] >= 2, "forward and backward should both be Pallas kernels"
    assert found["temporary"] < scores
