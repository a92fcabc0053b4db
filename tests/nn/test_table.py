"""Lookup tables: the same rows however they are stored and on every mesh, and gradients of what was read alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.nn.table import Reader, Table, storage_of
from sparsejax.ops.rows import kept_rows, placed

from support import MESHES, ONE_DEVICE, host_params, mesh_name, on_mesh, put_params, put_rows, to_numpy

STORAGES = ("replicated", "rows", "features")
LAYERS, ROWS, B, T, K = 2, 300, 8, 6, 3
PARTS = ((5, 1.0), (3, 0.0))


@functools.cache
def host_table(storage) -> nnx.State:
    return host_params(lambda key: Table(key, LAYERS, ROWS, PARTS, storage))


def ids() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.where(rng.random((B, T, K)) < 0.3, 7, rng.integers(-1, ROWS, (B, T, K))).astype(np.int32)


def row(storage, layer: int, number: int) -> np.ndarray:
    """A row of the table on the host, which is where the table itself says."""
    values = host_table(storage)["rows"][...]
    return values[layer, int(placed(jnp.int32(number), values.shape[1]))]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", MESHES, ids=mesh_name)
def test_rows_that_were_asked_for(storage, shape):
    asked = ids()
    with on_mesh(shape) as mesh:
        table = put_params(host_table(storage), mesh)["rows"][...]
        read = jax.jit(lambda table, ids: Reader(rows_LWE=table, layer=jnp.int32(1))(ids, "float32").rows)
        found = to_numpy(read(table, put_rows(asked, mesh)))
        if shape == (8, 1, 1):
            assert jax.jit(lambda table: storage_of(table) == storage)(table)
    expected = [np.zeros(8) if i < 0 else row(storage, 1, i) for i in asked.reshape(-1)]
    assert np.array_equal(found, np.reshape(expected, (B, T, K, 8)).astype(np.float32))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_gradient_is_one_of_the_rows_that_were_read(storage):
    weights = np.random.default_rng(2).normal(size=(B, T, K, 8)).astype(np.float32)
    with on_mesh((4, 2, 1)) as mesh:
        table = put_params(host_table(storage), mesh)["rows"][...]

        def loss(into, table, ids, weights):
            return (Reader(rows_LWE=table, layer=jnp.int32(0), into=into)(ids, "float32").rows * weights).sum()

        gradient = jax.jit(jax.grad(loss))
        placed_weights = put_rows(weights, mesh)
        got = gradient(jnp.zeros_like(placed_weights), table, put_rows(ids(), mesh), placed_weights)
    assert np.array_equal(got, weights)


def test_what_is_read_is_computed_with_in_the_dtype_asked_for():
    with on_mesh(ONE_DEVICE) as mesh:
        table = put_params(host_table("rows"), mesh)["rows"][...]
        assert Reader(rows_LWE=table, layer=jnp.int32(0))(put_rows(ids(), mesh), "bfloat16").rows.dtype == jnp.bfloat16


def test_a_row_consists_of_its_parts():
    values = host_table("rows")["rows"][...]
    assert values.shape == (LAYERS, kept_rows(ROWS), 8)
    assert 0.8 < values[..., :5].std() < 1 and not values[..., 5:].any()


@pytest.mark.parametrize("storage", ("rows", "features"))
def test_no_device_holds_a_whole_table(storage):
    with on_mesh((4, 2, 1)) as mesh:
        values = put_params(host_table(storage), mesh)["rows"][...]
        read = jax.jit(lambda table, ids: Reader(rows_LWE=table, layer=jnp.int32(1))(ids, "float32").rows)
        arguments = values, put_rows(ids(), mesh)
        text = read.lower(*arguments).compile().as_text()
    assert values.addressable_shards[0].data.size == values.size // 8
    whole = [f"{LAYERS},{kept_rows(ROWS)},8", f"{LAYERS * kept_rows(ROWS)},8"]
    assert not [line for line in text.splitlines() if any(f"[{shape}]" in line for shape in whole)]
    assert storage == "features" or "all-gather" not in text
    assert values.sharding.spec in (P(None, ("data", "expert"), None), P(None, None, ("data", "expert")))
