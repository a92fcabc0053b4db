"""What an optimizer step does to a lookup table: from the gradients of the rows that were read, wherever that was, to
updated rows. Nothing here is as long as a table but the table itself and its state, which change in place."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import BATCH_AXES, on_each_device, sum_over
from sparsejax.base.structs import struct
from sparsejax.nn.table import IDS_SPEC, STACKED_ROWS_SPEC, RowGradients, keys_of, storage_of
from sparsejax.ops.rows import Delivery, deliver_sums, sum_equal
from sparsejax.train.row_optimizer import RowOptimizer, RowState, updated

READ_SPECS = (P(None, *IDS_SPEC), P(), STACKED_ROWS_SPEC)


@struct
class Collected:
    """Gradients where their rows are kept. `delivery` is the first round. What skewed ids need beyond it is sent again
    when it is wanted, rather than kept."""

    delivery: Delivery
    square_sum: Float[Array, ""]  # over the whole gradient, a row that was read several times being one
    touched: Int[Array, ""]  # rows
    rounds: Int[Array, ""]


def collect(table_LWE: Float[Array, "L W E"], gradients: RowGradients) -> Collected:
    """Sums what belongs to one row, over readings and devices."""
    storage = storage_of(table_LWE)

    def local(table_LWE: Array, ids: Array, layer: Array, rows: Array) -> tuple[Array, ...]:
        deliver, devices = _deliveries(storage, table_LWE, ids, layer, rows)
        first = deliver(jnp.zeros(devices, jnp.int32))

        def measure(delivery: Delivery) -> tuple[Array, Array]:
            return jnp.square(delivery.sums_ME).sum(), (delivery.slot_M < _width(table_LWE)).sum(dtype=jnp.int32)

        def add(carry):
            upto_X, square, touched, rounds = carry
            delivery = deliver(upto_X)
            squares, rows = measure(delivery)
            return delivery.upto_X, square + squares, touched + rows, rounds + 1

        sums = (first.upto_X, *measure(first), jnp.int32(1))
        if storage == "rows":
            sums = jax.lax.while_loop(lambda carry: (carry[0] < _width(table_LWE)).any(), add, sums)
        _, square, touched, rounds = sums
        square = square if storage in ("alone", "replicated") else sum_over(square, BATCH_AXES)
        touched = sum_over(touched, BATCH_AXES) if storage == "rows" else touched
        return first.slot_M, first.sums_ME, first.upto_X, square, touched, rounds

    out = (*_delivery_specs(storage), P(), P(), P())
    slot_M, sums_ME, upto_X, square, touched, rounds = _on_devices(local, table_LWE, gradients, (), (), out)
    delivery = Delivery(slot_M=slot_M, sums_ME=sums_ME, upto_X=upto_X)
    return Collected(delivery=delivery, square_sum=square, touched=touched, rounds=rounds)


def apply_rows(
    optimizer: RowOptimizer,
    table_LWE: Float[Array, "L W E"],
    state: RowState,
    gradients: RowGradients,
    collected: Collected,
    scale: Float[Array, ""],
    do: Bool[Array, ""],
) -> tuple[Float[Array, "L W E"], RowState]:
    """(table, its state) after an update with `scale` · the gradient; as they were unless `do`."""
    storage, width = storage_of(table_LWE), table_LWE.shape[-1]
    names = tuple(state)
    specs = tuple(jax.typeof(state[name]).sharding.spec for name in names)

    def local(table_LWE: Array, ids: Array, layer: Array, rows: Array, slot_M, sums_ME, upto_X, scale, do, *state):
        deliver, _ = _deliveries(storage, table_LWE, ids, layer, rows)
        flat = lambda array: array.reshape(_width(table_LWE), *array.shape[2:])  # noqa: E731

        def update(tables, delivery: Delivery):
            table, state = tables
            gradient = scale * delivery.sums_ME
            squares_M = jnp.square(gradient).sum(-1)
            squares_M = sum_over(squares_M, BATCH_AXES) if storage == "features" else squares_M
            # Beyond the table nothing is written, and slots stay distinct.
            slot_M = jnp.where(do, delivery.slot_M, _width(table_LWE) + jnp.arange(len(delivery.slot_M)))
            return updated(optimizer, table, state, slot_M, gradient, squares_M / width)

        def more(carry):
            upto_X, tables = carry
            delivery = deliver(upto_X)
            return delivery.upto_X, update(tables, delivery)

        tables = flat(table_LWE), {name: flat(array) for name, array in zip(names, state, strict=True)}
        carry = upto_X, update(tables, Delivery(slot_M=slot_M, sums_ME=sums_ME, upto_X=upto_X))
        if storage == "rows":
            carry = jax.lax.while_loop(lambda carry: (carry[0] < _width(table_LWE)).any(), more, carry)
        table, new = carry[1]
        return table.reshape(table_LWE.shape), *(
            new[name].reshape(array.shape) for name, array in zip(names, state, strict=True)
        )

    d = collected.delivery
    operands = (d.slot_M, d.sums_ME, d.upto_X, scale, do, *state.values())
    operand_specs = (*_delivery_specs(storage), P(), P(), *specs)
    out = (jax.typeof(table_LWE).sharding.spec, *specs)
    table_LWE, *new = _on_devices(local, table_LWE, gradients, operands, operand_specs, out)
    return table_LWE, dict(zip(names, new, strict=True))


def _deliveries(
    storage: str, table_LWE: Array, ids: Array, layer: Array, rows: Array
) -> tuple[Callable[[Array], Delivery], int]:
    """(round of deliveries that begins at these slots, number of devices that share the table out)."""
    layers, each, _ = table_LWE.shape
    devices = jax.lax.axis_size(BATCH_AXES) if storage == "rows" else 1
    key_N = keys_of(ids, layer[:, None, None, None], devices * each, each, layers).reshape(-1)
    rows_NE, width = rows.reshape(key_N.size, -1), layers * each
    if storage == "features":
        key_N = jax.lax.all_gather(key_N, BATCH_AXES, tiled=True)
        rows_NE = jax.lax.all_to_all(rows_NE, BATCH_AXES, split_axis=1, concat_axis=0, tiled=True)
    key_N, sums_NE = sum_equal(key_N, rows_NE, devices * width)
    if storage == "rows":
        return functools.partial(deliver_sums, key_N, sums_NE, width=width, axes=BATCH_AXES), devices
    if storage == "replicated":
        key_N, sums_NE = _sums_of_all(key_N, sums_NE, width)
    return lambda from_X: Delivery(slot_M=key_N, sums_ME=sums_NE, upto_X=jnp.full_like(from_X, width)), devices


def _sums_of_all(key_N: Array, sums_NE: Array, width: int) -> tuple[Array, Array]:
    """The sums over all devices on each of them, from those of each. What travels is the smaller of two: everyone's
    rows, or, where they could be rows of the whole table and more, one number in the place of each of the table's."""
    if 2 * width > jax.lax.axis_size(BATCH_AXES) * len(key_N):  # a sum that all get goes there and back
        everyones = lambda values: jax.lax.all_gather(values, BATCH_AXES, tiled=True)  # noqa: E731
        return sum_equal(everyones(key_N), everyones(sums_NE), width)
    into = lambda shape, values: jnp.zeros(shape, values.dtype).at[key_N].set(values, mode="drop")  # noqa: E731
    met_W = sum_over(into(width, jnp.ones_like(key_N)), BATCH_AXES) > 0
    total_WE = sum_over(into((width, sums_NE.shape[1]), sums_NE), BATCH_AXES)
    order_W = jnp.argsort(~met_W)  # stable: those that were met first, ascending
    beyond_W = width + jnp.arange(width, dtype=key_N.dtype)
    return jnp.where(met_W[order_W], order_W.astype(key_N.dtype), beyond_W), total_WE[order_W]


def _width(table_LWE: Array) -> int:
    """Slots of a device."""
    return table_LWE.shape[0] * table_LWE.shape[1]


def _delivery_specs(storage: str) -> tuple[P, P, P]:
    """Of the fields of a `Delivery`."""
    slots = P(BATCH_AXES) if storage == "rows" else P()
    sums = {"rows": P(BATCH_AXES, None), "features": P(None, BATCH_AXES)}.get(storage, P())
    return slots, sums, P()


def _on_devices(local, table_LWE: Array, gradients: RowGradients, operands: tuple, specs: tuple, out_specs: tuple):
    """`local(table, ids, layer, rows, *operands)` on each device's part."""
    in_specs = (jax.typeof(table_LWE).sharding.spec, READ_SPECS[0], READ_SPECS[1], READ_SPECS[2], *specs)
    # Collectives in a loop whose length the data decide carry no varying-axes types.
    run = on_each_device(local, in_specs, out_specs, check_vma=False)
    with jax.named_scope("tables"):
        return run(table_LWE, gradients.ids, gradients.layer, gradients.rows, *operands)
