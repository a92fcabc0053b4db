"""Rows of large tables: where each is kept, which of the rows asked for are the same, and the exchange of rows between
devices that share a table out. All but `placed` are called on one device's arrays.

Neighbouring ids, of which one often meets many together, are kept on different devices. Where a row is kept depends on
the table alone, so that a table is the same array on every mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jaxtyping import Array, Float, Int

from sparsejax.base.structs import struct
from sparsejax.ops.hashing import mix

Space = jax.memory.Space
MOST_LANES = 1024
"""No table can be shared out over more devices."""


def lanes_of(rows: int) -> int:
    """Into how many runs a table can be cut: a power of two, so small that padding to a multiple is next to nothing."""
    return min(MOST_LANES, 1 << max((rows // 8).bit_length() - 1, 0))


def kept_rows(rows: int) -> int:
    """`rows`, padded to a multiple of the lanes."""
    return -(-rows // lanes_of(rows)) * lanes_of(rows)


def placed(ids: Int[Array, "*N"], kept: int) -> Int[Array, "*N"]:
    """Where row number `ids` is kept among `kept` rows: a bijection. Of a run of ids as long as there are lanes, each
    lane keeps one; the run's hash says which."""
    lanes = lanes_of(kept)
    run = ids // lanes
    turned = mix(run.astype(jnp.uint32), jnp.uint32(lanes), 0).astype(jnp.int32) & (lanes - 1)
    return ((ids + turned) & (lanes - 1)) * (kept // lanes) + run


@struct
class Distinct:
    """The keys of a list, each once and ascending; then keys beyond all others, which stand for nothing."""

    key_N: Int[Array, " N"]
    order_N: Int[Array, " N"]  # sorts the list
    number_N: Int[Array, " N"]  # of the keys of the sorted list among `key_N`

    def place_N(self) -> Int[Array, " N"]:
        """Where each key of the list is in `key_N`."""
        return jnp.zeros_like(self.order_N).at[self.order_N].set(self.number_N, unique_indices=True)


def distinct(key_N: Int[Array, " N"], nothing: int) -> Distinct:
    """`nothing` is greater than any other key."""
    order_N = jnp.argsort(key_N)
    sorted_N = key_N[order_N]
    new_N = jnp.concatenate([jnp.zeros(1, bool), sorted_N[1:] != sorted_N[:-1]])
    number_N = jnp.cumsum(new_N, dtype=jnp.int32)
    beyond_N = nothing + 1 + jnp.arange(len(key_N), dtype=jnp.int32)
    return Distinct(
        key_N=beyond_N.at[number_N].set(sorted_N, indices_are_sorted=True), order_N=order_N, number_N=number_N
    )


def sum_equal(
    key_N: Int[Array, " N"], rows_NE: Float[Array, "N E"], nothing: int
) -> tuple[Int[Array, " N"], Float[Array, "N E"]]:
    """(`distinct` keys, the sum of the rows with each, float32); 0 for keys that stand for nothing."""
    found = distinct(key_N, nothing)
    real_N1 = (key_N < nothing)[:, None]
    rows_NE = jnp.where(real_N1, rows_NE.astype(jnp.float32), 0)[found.order_N]
    return found.key_N, jax.ops.segment_sum(rows_NE, found.number_N, len(key_N), indices_are_sorted=True)


def rows_at(table_W: Float[Array, "W *E"], slot_N: Int[Array, "*N"]) -> Float[Array, "..."]:
    """Rows of a table, which may lie in the host's memory; zeros for a slot that it does not have."""
    if not in_host_memory(table_W):
        return table_W.at[slot_N].get(mode="fill", fill_value=0)
    # Host computations know no constants but scalars: what fills is put in on the device.
    there_N = slot_N < len(table_W)
    rows_N = _host_rows(table_W, jax.device_put(jnp.where(there_N, slot_N, 0), Space.Host))
    found_N = jax.device_put(rows_N, Space.Device)
    return jnp.where(there_N.reshape(*slot_N.shape, *[1] * (table_W.ndim - 1)), found_N, 0)


def with_rows(
    table_W: Float[Array, "W *E"], slot_M: Int[Array, " M"], rows_M: Float[Array, "M *E"]
) -> Float[Array, "W *E"]:
    """A table with these rows in the place of others; slots ascend, each once, those beyond the table left out."""
    if not in_host_memory(table_W):
        return table_W.at[slot_M].set(rows_M, **_SORTED)
    return _host_with_rows(table_W, jax.device_put(slot_M, Space.Host), jax.device_put(rows_M, Space.Host))


_SORTED: Any = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}


def in_host_memory(array: Array) -> bool:
    return jax.typeof(array).memory_space == Space.Host


# jax 0.10 has it under another name.
_compute_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
_on_host = functools.partial(_compute_on, compute_type="device_host", out_memory_spaces=Space.Host)


@_on_host
def _host_rows(table_W: Array, slot_N: Array) -> Array:
    return table_W.at[slot_N].get(mode="promise_in_bounds")


@_on_host
def _host_with_rows(table_W: Array, slot_M: Array, rows_M: Array) -> Array:
    return table_W.at[slot_M].set(rows_M, **_SORTED)


def slots_per_round(keys: int, devices: int) -> int:
    """Rows that each device may ask of each other in one round: 1.1 times an even share of its keys."""
    return min(-(-11 * keys // (10 * devices)), keys)


def fetch_rows(
    read: Callable[[Int[Array, "X S"]], Float[Array, "X S *E"]],
    width: int,
    key_N: Int[Array, " N"],
    axes: tuple[str, ...],
) -> tuple[Float[Array, "N *E"], Int[Array, ""]]:
    """(row of every key, rounds it took), each device along `axes` keeping `width` rows: key = device · width + slot.
    `read` gives the rows that this device keeps at slots, zeros for slot `width`.

    Every device asks for a row once, in as many rounds of fixed slots as the busiest pair of devices needs."""
    devices, keys = jax.lax.axis_size(axes), len(key_N)
    slots, nothing = slots_per_round(keys, devices), devices * width
    wanted = distinct(key_N, nothing)
    owner_X = jnp.arange(devices, dtype=jnp.int32)
    end_X = jnp.searchsorted(wanted.key_N, (owner_X + 1) * width).astype(jnp.int32)
    first_X = jnp.concatenate([jnp.zeros(1, jnp.int32), end_X[:-1]])
    owner_N = jnp.minimum(wanted.key_N // width, devices - 1)
    turn_N = jnp.arange(keys, dtype=jnp.int32) - first_X[owner_N]  # among those asked of the same device
    rounds = jax.lax.pmax(-(-(end_X - first_X).max() // slots), axes)

    def one_round(number, rows_N):
        place_XS = first_X[:, None] + number * slots + jnp.arange(slots, dtype=jnp.int32)
        slot_XS = rows_of(wanted.key_N, place_XS) - owner_X[:, None] * width
        slot_XS = jnp.where(place_XS < end_X[:, None], slot_XS, width)
        asked_XS = _swap(slot_XS, axes)
        found_XS = _swap(read(asked_XS), axes)
        slot_N = turn_N - number * slots
        here_N = (slot_N >= 0) & (slot_N < slots) & (wanted.key_N < nothing)
        place_N = jnp.where(here_N, owner_N * slots + slot_N, 0)
        found_N = found_XS.reshape(-1, *found_XS.shape[2:])[place_N]
        return jnp.where(here_N.reshape(-1, *[1] * (found_N.ndim - 1)), found_N, rows_N)

    rows_N = one_round(0, 0)
    _, rows_N = jax.lax.while_loop(
        lambda carry: carry[0] < rounds,
        lambda carry: (carry[0] + 1, one_round(*carry)),
        (jnp.int32(1), rows_N),
    )
    return rows_N[wanted.place_N()], rounds


@struct
class Delivery:
    """Sums of one round, on the device that keeps the rows. Slot W stands for nothing."""

    slot_M: Int[Array, " M"]  # each once, ascending
    sums_ME: Float[Array, "M E"]
    upto_X: Int[Array, " X"]  # on each device, the first slot that has not been delivered; W where all have


def deliver_sums(
    key_N: Int[Array, " N"], rows_NE: Float[Array, "N E"], from_X: Int[Array, " X"], width: int, axes: tuple[str, ...]
) -> Delivery:
    """One round that brings rows to the devices that keep them: those of the slots from `from_X` on that fit.

    `key_N` ascends, each key once (`sum_equal`). A round goes so far that no device has more rows for another than
    there are slots, the same for all of them: so what belongs to one row arrives in one round."""
    devices, keys = jax.lax.axis_size(axes), len(key_N)
    slots = slots_per_round(keys, devices)
    base_X = jnp.arange(devices, dtype=jnp.int32) * width
    first_X = jnp.searchsorted(key_N, base_X + from_X).astype(jnp.int32)
    key_X = rows_of(key_N, first_X + slots, fill=devices * width)  # the first that does not fit
    upto_X = jax.lax.pmin(jnp.minimum(key_X - base_X, width), axes)
    place_XS = first_X[:, None] + jnp.arange(slots, dtype=jnp.int32)
    slot_XS = rows_of(key_N, place_XS, fill=devices * width) - base_X[:, None]
    slot_XS = jnp.where(slot_XS < upto_X[:, None], slot_XS, width)
    sent_XSE = jnp.where((slot_XS < width)[..., None], rows_of(rows_NE, place_XS), 0)
    slot_M, rows_ME = _swap(slot_XS, axes).reshape(-1), _swap(sent_XSE, axes).reshape(-1, rows_NE.shape[1])
    slot_M, sums_ME = sum_equal(slot_M, rows_ME, width)
    return Delivery(slot_M=slot_M, sums_ME=sums_ME, upto_X=upto_X)


def rows_of(values: Array, place: Int[Array, "*P"], fill: int = 0) -> Array:
    """Entries of a list; `fill` beyond its end."""
    return values.at[place].get(mode="fill", fill_value=fill)


def _swap(values_XS: Array, axes: tuple[str, ...]) -> Array:
    """What every device along `axes` has for this one, in the place of what this one has for them."""
    return jax.lax.all_to_all(values_XS, axes, split_axis=0, concat_axis=0, tiled=True)
