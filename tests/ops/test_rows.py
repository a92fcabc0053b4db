"""Where rows are kept, and rounds of exchange between devices against one list on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.ops.rows import deliver_sums, distinct, fetch_rows, kept_rows, lanes_of, placed, sum_equal

from support import on_mesh, to_numpy

DEVICES, WIDTH, FEATURES, KEYS = 8, 16, 3, 20
LOADS = ("even", "skewed", "one row", "nothing")


@pytest.mark.parametrize("rows", (1, 5, 256, 300, 8191, 32_000, 1 << 18))
def test_every_place_holds_one_row(rows):
    kept = kept_rows(rows)
    assert rows <= kept <= 1.125 * rows + 1 and kept % lanes_of(kept) == 0
    assert np.array_equal(np.sort(np.asarray(placed(jnp.arange(kept), kept))), np.arange(kept))


def test_any_run_of_ids_is_shared_out_evenly():
    kept, devices = kept_rows(1 << 16), 64
    owner = np.asarray(placed(jnp.arange(kept), kept)) // (kept // devices)
    runs = owner.reshape(-1, lanes_of(kept))
    assert all((np.bincount(run, minlength=devices) == len(run) // devices).all() for run in runs)
    strided = owner[:: lanes_of(kept)]  # ids with the same remainder, which a fixed order would leave on one device
    assert np.bincount(strided, minlength=devices).max() <= 4


def test_distinct_keys_and_their_sums():
    keys, rows = jnp.array([5, 2, 9, 5, 2, 9]), jnp.arange(12.0).reshape(6, 2)
    found = distinct(keys, 9)
    assert list(found.key_N[:3]) == [2, 5, 9] and (np.diff(found.key_N) > 0).all()
    assert np.array_equal(found.key_N[found.place_N()], keys)
    _, sums = sum_equal(keys, rows, 9)
    assert np.array_equal(sums[:3], [[2 + 8, 3 + 9], [0 + 6, 1 + 7], [0, 0]])


@functools.cache
def exchanged():
    """`call(table, keys, rows)` on all devices: rows fetched, rounds, sums delivered, rounds."""

    def local(table_WE, key_N, rows_NE):
        read = lambda slot_XS: table_WE.at[slot_XS].get(mode="fill", fill_value=0)  # noqa: E731
        fetched, rounds = fetch_rows(read, WIDTH, key_N, BATCH_AXES)
        keys, sums = sum_equal(key_N, rows_NE, DEVICES * WIDTH)

        def deliver(carry):
            total_WE, met_W, from_X, number = carry
            found = deliver_sums(keys, sums, from_X, WIDTH, BATCH_AXES)
            total_WE = total_WE.at[found.slot_M].add(found.sums_ME, mode="drop")
            return total_WE, met_W.at[found.slot_M].add(1, mode="drop"), found.upto_X, number + 1

        start = jnp.zeros_like(table_WE), jnp.zeros(WIDTH, jnp.int32), jnp.zeros(DEVICES, jnp.int32), jnp.int32(0)
        total_WE, met_W, _, number = jax.lax.while_loop(lambda c: (c[2] < WIDTH).any(), deliver, start)
        return fetched, rounds[None], total_WE, met_W, number[None]

    split = P(BATCH_AXES)
    return jax.jit(jax.shard_map(local, in_specs=split, out_specs=split, check_vma=False))


@pytest.mark.parametrize("load", LOADS)
def test_rows_are_fetched_and_sums_delivered_whatever_the_load(load):
    rng = np.random.default_rng(0)
    rows, nothing = DEVICES * WIDTH, DEVICES * WIDTH
    table = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    keys = {
        "even": rng.permutation(np.arange(DEVICES * KEYS) % rows),
        "skewed": rng.integers(0, WIDTH, DEVICES * KEYS),
        "one row": np.full(DEVICES * KEYS, 5),
        "nothing": np.full(DEVICES * KEYS, nothing),
    }[load].astype(np.int32)
    keys[::7] = nothing
    gradient = rng.normal(size=(len(keys), FEATURES)).astype(np.float32)
    with on_mesh((4, 2, 1)) as mesh:
        put = lambda array: jax.device_put(array, jax.NamedSharding(mesh, P(BATCH_AXES)))  # noqa: E731
        fetched, asked, total, met, sent = to_numpy(exchanged()(put(table), put(keys), put(gradient)))
    assert np.array_equal(fetched, np.concatenate([table, np.zeros((1, FEATURES), np.float32)])[keys])
    expected = np.zeros((rows + 1, FEATURES), np.float32)
    np.add.at(expected, keys, gradient)
    np.testing.assert_allclose(total, expected[:-1], atol=1e-5)
    assert np.array_equal(met, np.isin(np.arange(rows), keys))  # each row in one round
    needed = {"even": 2, "skewed": 3, "one row": 1, "nothing": 1}[load]
    assert asked.min() == asked.max() and (asked[0] >= needed if load == "skewed" else asked[0] <= needed)
    assert sent.min() == sent.max() and sent[0] >= 1
