"""Row-wise optimizers against loops over rows, on every storage and several meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.nn.table import RowGradients, Table
from sparsejax.ops.rows import kept_rows, placed
from sparsejax.plan.collectives import read_collectives
from sparsejax.train.row_optimizer import RowAdagrad, RowAdam, RowSGD
from sparsejax.train.table_step import apply_rows, collect

from support import ONE_DEVICE, host_params, on_mesh, put_params, to_numpy

LAYERS, ROWS, WIDTH, Z, B, T, K = 2, 300, 8, 4, 8, 6, 3
STORAGES = ("replicated", "rows", "features")
OPTIMIZERS = {
    "adam": RowAdam(learning_rate=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, initial=0.01),
    "sgd": RowSGD(learning_rate=0.1),
}
SCALE = 0.5


@functools.cache
def readings():
    """(table, ids, layers, gradients) on the host. Half of the ids are few rows; one reading is of a single row."""
    rng = np.random.default_rng(0)
    ids = np.where(
        rng.random((Z, B, T, K)) < 0.5, rng.integers(0, 9, (Z, B, T, K)), rng.integers(-1, ROWS, (Z, B, T, K))
    )
    ids[0] = 7
    gradients = rng.normal(size=(Z, B, T, K, WIDTH)).astype(np.float32)
    table = host_params(lambda key: Table(key, LAYERS, ROWS, ((WIDTH, 1.0),), "replicated"))["rows"][...]
    return table, ids.astype(np.int32), np.array([0, 1, 1, 0], np.int32), gradients


@functools.cache
def stepped(optimizer: str, storage: str, shape, steps: int = 2, do: bool = True):
    table, ids, layers, gradients = readings()
    rule = OPTIMIZERS[optimizer]

    def step(carry, _, ids, gradients):
        table, state = carry
        read = RowGradients(ids=ids, layer=jnp.asarray(layers), rows=gradients)
        found = collect(table, read)
        done = apply_rows(rule, table, state, read, found, jnp.float32(SCALE), jnp.bool_(do))
        return done, (found.square_sum, found.touched, found.rounds)

    with on_mesh(shape) as mesh:
        state = host_params(lambda key: Table(key, LAYERS, ROWS, ((WIDTH, 1.0),), storage))
        table = put_params(state, mesh)["rows"][...]
        split = lambda array: jax.device_put(array, jax.NamedSharding(mesh, P(None, BATCH_AXES)))  # noqa: E731

        def run(table, ids, gradients):
            begin = table, rule.init(table)
            return jax.lax.scan(functools.partial(step, ids=ids, gradients=gradients), begin, length=steps)

        return to_numpy(jax.jit(run)(table, split(ids), split(gradients)))


def summed() -> dict[tuple[int, int], np.ndarray]:
    """(layer, id) → gradient, added one reading after the other."""
    _, ids, layers, gradients = readings()
    sums: dict[tuple[int, int], np.ndarray] = {}
    for (z, b, t, k), number in np.ndenumerate(ids):
        if number >= 0:
            sums.setdefault((layers[z], number), np.zeros(WIDTH))
            sums[layers[z], number] += gradients[z, b, t, k].astype(np.float64)
    return sums


def reference(optimizer: str, steps: int) -> np.ndarray:
    """The table after steps on each row by itself."""
    table = readings()[0].astype(np.float64)
    for (layer, number), gradient in summed().items():
        g, place = SCALE * gradient, int(placed(jnp.int32(number), kept_rows(ROWS)))
        mean, square, total = np.zeros(WIDTH), np.zeros(WIDTH), 0.01
        for n in range(1, steps + 1):
            if optimizer == "adam":
                mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
                move = mean / (1 - 0.9**n) / (np.sqrt(square / (1 - 0.99**n)) + 1e-8)
            elif optimizer == "adagrad":
                total += (g**2).mean()
                move = g / (np.sqrt(total) + 1e-8)
            else:
                move = g
            table[layer, place] -= 0.1 * move
    return table


@pytest.mark.parametrize(
    "optimizer, storage, shape",
    [("adam", "replicated", ONE_DEVICE), ("adagrad", "replicated", ONE_DEVICE), ("sgd", "replicated", ONE_DEVICE)]
    + [("adam", storage, shape) for storage in STORAGES for shape in ((4, 2, 1), (2, 2, 2))]
    + [("adagrad", storage, (4, 2, 1)) for storage in ("rows", "features")],
)
def test_rows_move_as_one_by_one(optimizer, storage, shape):
    (table, _), (squares, touched, rounds) = stepped(optimizer, storage, shape)
    np.testing.assert_allclose(table, reference(optimizer, 2), atol=1e-5)
    expected = sum((gradient**2).sum() for gradient in summed().values())
    np.testing.assert_allclose(squares, expected, rtol=1e-5)
    assert (touched == len(summed())).all() and (rounds >= 1).all()
    assert storage == "rows" or (rounds == 1).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_that_nobody_read_are_as_they_were(optimizer):
    (table, state), _ = stepped(optimizer, "replicated", ONE_DEVICE)
    read = np.zeros(table.shape[:2], bool)
    for layer, number in summed():
        read[layer, int(placed(jnp.int32(number), kept_rows(ROWS)))] = True
    assert np.array_equal(table[~read], readings()[0][~read]) and (table[read] != readings()[0][read]).any()
    fresh = 0.01 if optimizer == "adagrad" else 0
    assert all((leaf[~read] == np.float32(fresh)).all() for leaf in state.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_that_is_skipped_changes_nothing(storage):
    (table, state), _ = stepped("adam", storage, (4, 2, 1), do=False)
    assert np.array_equal(
        table, host_params(lambda key: Table(key, LAYERS, ROWS, ((WIDTH, 1.0),), storage))["rows"][...]
    )
    assert not any(leaf.any() for leaf in state.values())


@pytest.mark.parametrize("rows", (16, ROWS))
def test_tables_that_every_device_has_get_all_sums_by_the_shorter_way(rows):
    """Everyone's rows side by side; but of a table that is smaller than those, one sum for each of its rows."""
    shape, keys = (4, 2, 1), Z * B * T * K // 8
    _, ids, layers, gradients = readings()
    ids = np.where(ids >= 0, ids % (rows - 3), -1)  # the last three are read by nobody
    table = np.zeros((LAYERS, kept_rows(rows), WIDTH), np.float32)

    def sums(table, ids, gradients):
        found = collect(table, RowGradients(ids=ids, layer=jnp.asarray(layers), rows=gradients))
        return found.delivery.slot_M, found.delivery.sums_ME, found.touched

    with on_mesh(shape) as mesh:
        split = lambda array: jax.device_put(array, jax.NamedSharding(mesh, P(None, BATCH_AXES)))  # noqa: E731
        given = jax.device_put(table, jax.NamedSharding(mesh, P(None, None, None))), split(ids), split(gradients)
        compiled = jax.jit(sums).lower(*given).compile()
        slots, found, touched = to_numpy(compiled(*given))
    kept = kept_rows(rows)
    width = LAYERS * kept
    expected = np.zeros((width, WIDTH))
    for (z, b, t, k), number in np.ndenumerate(ids):
        if number >= 0:
            expected[layers[z] * kept + int(placed(jnp.int32(number), kept))] += gradients[z, b, t, k]
    got = np.zeros_like(expected)
    got[slots[slots < width]] = found[slots < width]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert touched == (slots < width).sum() == np.abs(expected).any(-1).sum() and (np.diff(slots) > 0).all()
    moved = read_collectives(compiled.as_text(), shape)
    assert {each.kind for each in moved} == {"all-reduce" if rows == 16 else "all-gather"}
    row_bytes = (WIDTH + 1) * 4  # and its number
    assert sum(each.bytes for each in moved) <= min(2 * width, 8 * keys) * row_bytes


def test_where_all_rows_are_read_row_wise_adam_is_adam():
    rng, steps = np.random.default_rng(3), 3
    table, gradient = (rng.normal(size=(16, 4)).astype(np.float32) for _ in range(2))
    adam, rule = optax.adam(0.1, b1=0.9, b2=0.99), RowAdam(learning_rate=0.1)
    with on_mesh(ONE_DEVICE):
        ours, rows = jnp.asarray(table)[None], rule.init(jnp.asarray(table)[None])
        theirs, dense = jnp.asarray(table), adam.init(jnp.asarray(table))
        place = np.asarray(placed(jnp.arange(16), 16))
        read = RowGradients(
            ids=jnp.arange(16, dtype=jnp.int32).reshape(1, 2, 4, 2),
            layer=jnp.zeros(1, jnp.int32),
            rows=jnp.asarray(gradient[place]).reshape(1, 2, 4, 2, 4),
        )
        for _ in range(steps):
            ours, rows = apply_rows(rule, ours, rows, read, collect(ours, read), jnp.float32(1), jnp.bool_(True))
            updates, dense = adam.update(jnp.asarray(gradient), dense)
            theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(ours[0], theirs, atol=1e-6)


def test_nothing_is_as_long_as_the_table():
    rows = 1 << 18
    _, _, layers, _ = readings()
    shapes = jax.ShapeDtypeStruct((Z, B, T, K), jnp.int32), jax.ShapeDtypeStruct((Z, B, T, K, WIDTH), jnp.float32)

    def step(table, state, ids, gradients):
        read = RowGradients(ids=ids, layer=jnp.asarray(layers), rows=gradients)
        return apply_rows(OPTIMIZERS["adam"], table, state, read, collect(table, read), jnp.float32(1), jnp.bool_(True))

    with on_mesh(ONE_DEVICE):
        table = jax.ShapeDtypeStruct((LAYERS, rows, WIDTH), jnp.float32)
        state = jax.eval_shape(lambda: OPTIMIZERS["adam"].init(jnp.zeros((LAYERS, rows, WIDTH))))
        memory = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.size * 4 / 50
    assert memory.alias_size_in_bytes >= 3 * table.size * 4


@pytest.mark.parametrize("bad", ({"learning_rate": 0.0}, {"eps": 0.0}, {"b1": 1.0}))
def test_bad_settings(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RowAdam(**bad)
