"""What every lookup layer owes, with an array as its table. Entries of the memory's registries are found by name: a new
one is under contract as soon as it can be configured."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch
from sparsejax.memory.layer import MemoryCache, MemoryLayer, empty_cache

from lookups import (
    BACKBONE,
    GRID,
    VOCAB,
    WIDTH,
    Outcome,
    first_table,
    random_table,
    runner,
    start,
    trained,
)
from support import (
    MESHES,
    ONE_DEVICE,
    assert_close,
    host_batch,
    mesh_name,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
)

ROWS, LENGTH = 8, 10
BATCH = host_batch(ROWS, LENGTH, VOCAB, documents=2, padded=3)
REAL = BATCH["segments"] > 0
STATES = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def run(name, *, batch=BATCH, x=STATES, variables=None, table=None, mesh=ONE_DEVICE, places=None):
    spec = GRID[name]
    variables = trained(spec) if variables is None else variables
    table = random_table(spec) if table is None else table
    with on_mesh(mesh) as devices:
        placed = put_params(variables, devices)
        return runner(spec)(placed, table, put_rows(x, devices), put_batch(batch, devices), places)


@functools.cache
def plain(name):
    """(output, gradients) of the trained layer on `BATCH`."""
    return run(name)


@pytest.mark.parametrize("name", GRID)
def test_a_row_gets_the_gradients_of_its_lookups(name):
    """As the product with one-hot vectors that a lookup is: their sum, and nothing where nobody looks."""
    out, gradients = plain(name)
    one_hot = np.eye(GRID[name].rows(VOCAB) + 1)[out.ids][..., :-1]  # −1 is the last
    assert_close(np.einsum("btkn,btke->ne", one_hot, gradients.rows).astype(np.float32), gradients.table)
    assert gradients.table.any()


@pytest.mark.parametrize("name", GRID)
def test_a_row_is_known_by_nothing_but_its_content(name):
    """Rows in another order, found where they are now, change nothing."""
    table, order = random_table(GRID[name]), np.random.default_rng(5).permutation(GRID[name].rows(VOCAB))
    assert_close(run(name, table=table[order], places=np.argsort(order))[0], plain(name)[0])


@pytest.mark.parametrize("name", [name for name, spec in GRID.items() if spec.address.known_at == "input"])
def test_equal_rows_make_addresses_idle(name):
    """Where nothing but the id says where to look, other ids change nothing if all rows are equal, and much if not."""
    spec = GRID[name]
    table = np.tile(random_table(spec)[:1], (spec.rows(VOCAB), 1))
    others = BATCH | {"tokens": np.where(REAL, (BATCH["tokens"] * 7 + 3) % VOCAB, 0)}
    assert_close(run(name, batch=others, table=table)[0].delta, run(name, table=table)[0].delta)
    assert np.abs(run(name, batch=others)[0].delta - plain(name)[0].delta).max() > 1e-3


@pytest.mark.parametrize("name", GRID)
def test_it_adds_nothing_at_first(name):
    """Neither as it begins nor with a table of zeros; and it can learn: something has a gradient."""
    spec, fresh = GRID[name], start(GRID[name])
    table = first_table(spec)
    out, gradients = run(name, variables=fresh, table=table)
    assert not out.delta.any() and not run(name, variables=fresh, table=np.zeros_like(table))[0].delta.any()
    learned = jax.tree.leaves((gradients.table, nnx.filter_state(gradients.variables, nnx.Param)))
    assert max(np.abs(leaf).max() for leaf in learned) > 1e-3


@pytest.mark.parametrize("name", GRID)
def test_padding_gets_nothing_and_gives_nothing(name):
    out, gradients = plain(name)
    assert not out.delta[~REAL].any() and not gradients.x[~REAL].any() and (out.ids[~REAL] == -1).all()
    noise = np.where(REAL[..., None], STATES, 9.0).astype(np.float32)
    other, others = run(name, batch=BATCH | {"tokens": np.where(REAL, BATCH["tokens"], 5)}, x=noise)
    assert_close((other, others.table), (out, gradients.table))


@pytest.mark.parametrize("name", GRID)
def test_lookups_are_counted(name):
    out = plain(name)[0]
    report, ids = out.report, out.ids
    assert report.lookups == report.loads.sum() == (ids >= 0).sum()
    assert report.tokens == REAL.sum() and report.masked == (~REAL).sum()
    assert np.array_equal(report.loads, np.bincount(ids[ids >= 0], minlength=len(report.loads)))
    assert ids.shape[-1] == GRID[name].address.lookups and ids.max() < GRID[name].rows(VOCAB)
    assert (report.gate_sum is not None) == GRID[name].consume.gated
    assert report.gate_sum is None or 0 < report.gate_sum < report.tokens


@pytest.mark.parametrize("name", [name for name in GRID if GRID[name].address.known_at == "input"])
def test_what_is_learned_is_read(name):
    """Such as a norm, of which there is none where no state is asked for."""
    learned = nnx.to_flat_state(nnx.filter_state(plain(name)[1].variables, nnx.Param))
    assert all(np.abs(gradient[...]).max() > 0 for _, gradient in learned)
    assert GRID[name].own_norm == any(path[0] == "norm" for path, _ in learned)


@pytest.mark.parametrize("name", GRID)
def test_in_bfloat16_what_is_added_is_bfloat16(name):
    """Addresses, weights and sums stay in 32 bits, and gradients have the dtypes of what they are of."""
    spec, narrow = GRID[name], dataclasses.replace(BACKBONE, dtype="bfloat16")

    def run(layer, x, rows, batch):
        h, embedded = None if spec.own_norm else x, x if spec.consume.reads_embedding else None
        out = layer(x, batch, lambda ids: rows, h_BTD=h, embedded_BTD=embedded)
        return out.delta.sum(), (out, layer.look_up(batch, x)[0])

    with on_mesh(ONE_DEVICE) as mesh:
        layer = jax.eval_shape(lambda: MemoryLayer(jax.random.key(0), narrow, VOCAB, spec))
        by_row = NamedSharding(mesh, P(BATCH_AXES))
        shape = (ROWS, LENGTH, spec.address.lookups, spec.row_width(narrow))
        x, rows = (jax.ShapeDtypeStruct(s, "bfloat16", sharding=by_row) for s in (STATES.shape, shape))
        batch = jax.eval_shape(lambda: Batch(**BATCH))
        gradients, (out, found) = jax.eval_shape(jax.grad(run, argnums=(1, 2), has_aux=True), layer, x, rows, batch)
    assert out.delta.dtype == "bfloat16" and found.ids.dtype == "int32"
    assert [leaf.dtype for leaf in gradients] == ["bfloat16", "bfloat16"]
    kept = (found.weights, out.report.measured, out.report.gate_sum)
    assert all(leaf is None or leaf.dtype == "float32" for leaf in kept)


@pytest.mark.parametrize("name", GRID)
def test_it_is_causal(name):
    """What comes later, token and state, changes nothing before it, and something at its own place."""
    at = 3
    tokens, x = BATCH["tokens"].copy(), STATES.copy()
    tokens[:, at] = (tokens[:, at] + 1) % VOCAB
    x[:, at] = -x[:, at]
    out, moved = plain(name)[0], run(name, batch=BATCH | {"tokens": tokens}, x=x)[0]
    assert_close((moved.delta[:, :at], moved.ids[:, :at]), (out.delta[:, :at], out.ids[:, :at]))
    assert np.abs(moved.delta[:, at] - out.delta[:, at]).max() > 1e-6
    later = slice(LENGTH // 2, None)  # another document
    assert_close((moved.delta[:, later], moved.ids[:, later]), (out.delta[:, later], out.ids[:, later]))


@pytest.mark.parametrize("name", GRID)
def test_a_packed_document_is_as_if_it_were_alone(name):
    half = LENGTH // 2
    alone = {field: np.zeros_like(array) for field, array in BATCH.items()} | {"rows": BATCH["rows"]}
    for field in ("tokens", "targets", "positions", "loss_mask"):
        alone[field][:, :half] = BATCH[field][:, half:]
    alone["segments"][:, :half] = REAL[:, half:]
    x = np.concatenate([STATES[:, half:], STATES[:, :half]], axis=1)
    out, by_itself = plain(name)[0], run(name, batch=alone, x=x)[0]
    assert np.array_equal(by_itself.ids[:, :half], out.ids[:, half:])
    assert_close(by_itself.delta[:, :half], out.delta[:, half:])


def names(quick):
    """All of the grid, of which a quick run takes these alone."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in GRID]


@pytest.mark.parametrize("mesh", MESHES[1:], ids=mesh_name)
@pytest.mark.parametrize("name", names({"n_grams", "product_keys", "latent_bigrams", "unweighted-concat"}))
def test_it_is_the_same_on_every_mesh(name, mesh):
    """Looked-up ids exactly. (The slope of Engram's gate has no bound at s = 0: hence its tolerance.)"""
    (out, gradients), (here, gradients_here) = plain(name), run(name, mesh=mesh)
    assert_close(here, out)
    assert_close(dataclasses.astuple(gradients_here), dataclasses.astuple(gradients), 1e-5, 1e-5)


@pytest.mark.parametrize("name", names({"hyperplanes", "n_grams", "latent_bigrams", "vector-gated_add"}))
def test_token_by_token_it_is_the_same(name):
    """From a cache: the prompt at once and the rest one by one."""
    spec, prompt, rows = GRID[name], 4, 2
    batch = host_batch(rows, LENGTH, VOCAB, documents=1, padded=3)
    x, table = STATES[:rows], random_table(spec)
    with on_mesh(ONE_DEVICE) as mesh:
        apply, placed = runner(spec), put_params(trained(spec), mesh)

        def outputs(begin: int, end: int, cache: MemoryCache | None) -> Outcome:
            part = {name: array if name == "rows" else array[:, begin:end] for name, array in batch.items()}
            return apply(placed, table, put_rows(x[:, begin:end], mesh), put_batch(part, mesh), cache=cache)[0]

        whole = outputs(0, LENGTH, None)
        cache, parts = empty_cache(spec, BACKBONE, rows), []
        for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, LENGTH))]:
            parts.append(outputs(begin, end, cache))
            cache = parts[-1].cache
    assert np.array_equal(np.concatenate([out.ids for out in parts], axis=1), whole.ids)
    assert_close(np.concatenate([out.delta for out in parts], axis=1), whole.delta)


@pytest.mark.parametrize("name", ["latent_bigrams", "n_grams", "vector-gated_add"])
def test_padding_after_a_prompt_is_not_taken_for_its_past(name):
    """A prompt shorter than another is filled up at its end; the next token is as after the prompt alone."""
    spec, short, long = GRID[name], 2, 4
    batch = host_batch(2, long + 1, VOCAB, documents=1, padded=0)
    x, table = STATES[:2, : long + 1], random_table(spec)
    filled = np.delete(np.arange(long + 1), slice(short, long))  # the short prompt and the token after both
    with on_mesh(ONE_DEVICE) as mesh:
        apply, placed = runner(spec), put_params(trained(spec), mesh)

        def outputs(places, cache=None, length=None) -> Outcome:
            part = {name: array if name == "rows" else array[:, places] for name, array in batch.items()}
            if length is not None:
                part["segments"] = np.where(np.arange(len(places)) < length, part["segments"], 0)
            return apply(placed, table, put_rows(x[:, places], mesh), put_batch(part, mesh), cache=cache)[0]

        cache = outputs(np.arange(long), empty_cache(spec, BACKBONE, 2), short).cache
        after, whole = outputs([long], cache), outputs(filled)
    assert np.array_equal(after.ids[:, 0], whole.ids[:, -1])
    assert_close(after.delta[:, 0], whole.delta[:, -1])
