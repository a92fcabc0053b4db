"""Lookup tables as parameters: stored whole, split over devices, or in host memory; read row by row.

A table is no operand of what is differentiated. The gradient is one with respect to the rows that were read: a reader
passes zeros in their shape (`into`), which are added to nothing, and whose cotangent is that of the rows."""

from collections.abc import Mapping, Sequence
from typing import Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import struct
from sparsejax.nn.linear import param
from sparsejax.ops.rows import fetch_rows, kept_rows, placed, rows_at

Storage = Literal["replicated", "rows", "features", "host"]
"""Every device has all of a table; or the devices that split the batch share it out, by rows, by features, or by rows
in the memory of their hosts, which read and write them there."""

STORED_AXES: dict[Storage, tuple[Optional[str], ...]] = {
    "replicated": (None, None, None),
    "rows": (None, "rows", None),
    "features": (None, None, "features"),
    "host": (None, "rows", None),
}
IDS_SPEC = P(BATCH_AXES, None, None)
ROWS_SPEC = P(BATCH_AXES, None, None, None)
STACKED_ROWS_SPEC = P(None, *ROWS_SPEC)


class Table(nnx.Module):
    """The tables of `layers` layers, `rows` rows each. `parts` are (width, standard deviation) of what a row consists
    of."""

    def __init__(
        self, key: PRNGKeyArray, layers: int, rows: int, parts: Sequence[tuple[int, float]], storage: Storage = "rows"
    ):
        keys, kept = jax.random.split(key, len(parts)), kept_rows(rows)
        # No device draws rows that it does not keep. Features are cut later: parts need not be multiples of the cut.
        spec = P(None, BATCH_AXES, None) if STORED_AXES[storage][1] else P()

        def part(key: PRNGKeyArray, width: int, stddev: float) -> Array:
            shape = (layers, kept, width)
            if not stddev:
                return jnp.zeros(shape, out_sharding=spec)
            return stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32, out_sharding=spec)

        drawn = [part(k, width, stddev) for k, (width, stddev) in zip(keys, parts, strict=True)]
        self.rows = param(jnp.concatenate(drawn, axis=-1), STORED_AXES[storage], "table")


@struct
class Found:
    """What a layer is given of its table."""

    rows: Float[Array, "B T K E"]
    rounds: Int[Array, ""]  # of exchange between devices, until all of them had arrived


@struct
class Reader:
    """A layer's way to its table, one of the L in `rows_LWE`; the gradient of what it reads goes `into`."""

    rows_LWE: Float[Array, "L W E"]
    layer: Int[Array, ""]
    into: Optional[Float[Array, "B T K E"]] = None

    def __call__(self, ids_BTK: Int[Array, "B T K"], dtype: str) -> Found:
        """The rows of these numbers; zeros for −1."""
        rows_1BTKE, rounds = read_tables(self.rows_LWE, self.layer[None], ids_BTK, dtype)
        return Found(rows=_with_gradient(self.into, rows_1BTKE[0]), rounds=rounds)


@struct
class Given:
    """Rows that were read before the layer ran, in the place of a `Reader`."""

    rows: Float[Array, "B T K E"]
    rounds: Int[Array, ""]
    into: Optional[Float[Array, "B T K E"]] = None

    def __call__(self, ids_BTK: Int[Array, "B T K"], dtype: str) -> Found:
        """Those rows, `ids_BTK` being the numbers they were read by."""
        return Found(rows=_with_gradient(self.into, self.rows), rounds=self.rounds)


@struct
class RowGradients:
    """Of one memory in one step, after Z readings (of a layer, in a microbatch and a pass).

    Readings stand side by side until what belongs to one row is summed, once a step: their size is that of what the
    step's tokens read, whatever the table's."""

    ids: Int[Array, "Z B T K"]  # −1: none
    layer: Int[Array, " Z"]  # which of the stacked tables was read
    rows: Float[Array, "Z B T K E"]


def joined(parts: Sequence[Mapping[str, RowGradients]]) -> dict[str, RowGradients]:
    """All readings of several passes, by memory."""
    return {name: jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *(p[name] for p in parts)) for name in parts[0]}


def summed_rows(gradients: RowGradients) -> np.ndarray:
    """float32 `[U, E]` on the host: the gradients of the U rows that were read, ordered by table and number."""
    ids, rows = np.asarray(gradients.ids), np.asarray(gradients.rows)
    layer = np.broadcast_to(np.asarray(gradients.layer)[:, None, None, None], ids.shape)
    _, row_N = np.unique(np.stack([layer[ids >= 0], ids[ids >= 0]]), axis=1, return_inverse=True)
    total_UE = np.zeros((row_N.max(initial=-1) + 1, rows.shape[-1]), np.float32)
    np.add.at(total_UE, row_N.reshape(-1), rows[ids >= 0])
    return total_UE


def storage_of(rows_LWE: Array) -> Storage | Literal["alone"]:
    """How a table is stored on the mesh that is set; alone: on its only device."""
    if jax.sharding.get_abstract_mesh().size == 1:
        return "alone"
    _, rows, features = jax.typeof(rows_LWE).sharding.spec
    return "rows" if rows is not None else "features" if features is not None else "replicated"


def read_tables(
    rows_LWE: Float[Array, "L W E"], layer_Z: Int[Array, " Z"], ids_BTK: Int[Array, "B T K"], dtype: str
) -> tuple[Float[Array, "Z B T K E"], Int[Array, ""]]:
    """(the rows of these numbers in Z of the tables, zeros for −1; rounds of exchange). What is asked of several tables
    travels together."""
    kept, storage = rows_LWE.shape[1], storage_of(rows_LWE)

    def local(rows_LWE: Array, layer_Z: Array, ids_BTK: Array) -> tuple[Array, Array]:
        layers, each, width = rows_LWE.shape
        table = rows_LWE.reshape(layers * each, width)
        key_N = keys_of(ids_BTK, 0, kept, each, 1).reshape(-1)

        def in_each(slot_N: Int[Array, "*N"]) -> Float[Array, "*N Z E"]:
            slot_NZ = jnp.where(slot_N[..., None] < each, layer_Z * each + slot_N[..., None], layers * each)
            return rows_at(table, slot_NZ).astype(dtype)

        rounds = jnp.int32(1)
        if storage in ("alone", "replicated"):
            rows_NZE = in_each(key_N)
        elif storage == "rows":
            rows_NZE, rounds = fetch_rows(in_each, each, key_N, BATCH_AXES)
        else:
            everyones = jax.lax.all_gather(key_N, BATCH_AXES, tiled=True)
            rows_NZE = jax.lax.all_to_all(in_each(everyones), BATCH_AXES, split_axis=0, concat_axis=2, tiled=True)
        return jnp.moveaxis(rows_NZE, 1, 0).reshape(len(layer_Z), *ids_BTK.shape, -1), rounds

    specs = (jax.typeof(rows_LWE).sharding.spec, P(), IDS_SPEC)
    return on_each_device(local, specs, (STACKED_ROWS_SPEC, P()), check_vma=False)(rows_LWE, layer_Z, ids_BTK)


def _with_gradient(into: Optional[Float[Array, "B T K E"]], rows: Float[Array, "B T K E"]) -> Float[Array, "B T K E"]:
    """`rows`, whose gradient goes `into`, if that is given."""
    return rows if into is None else _led(into, rows)


@jax.custom_vjp
def _led(into: Array, rows: Array) -> Array:
    return rows


_led.defvjp(lambda into, rows: (rows, None), lambda _, drows: (drows, None))


def keys_of(
    ids: Int[Array, "*N"], layer: Int[Array, "..."] | int, kept: int, each: int, layers: int
) -> Int[Array, "*N"]:
    """device · L · `each` + layer · `each` + place, of tables whose `kept` rows are shared out, `each` to a device. For
    −1: beyond all devices."""
    place = placed(jnp.maximum(ids, 0), kept)
    key = (place // each) * (layers * each) + layer * each + place % each
    return jnp.where(ids < 0, layers * kept, key)
