"""Layers that compute on chosen tokens: the paper's equation, the two ways to execute it, its limits, its leak."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import cut, on_rows, parted, results
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.ratios import selection_ratios
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.selection import MixtureOfDepths, RandomTokens
from sparsejax.blocks.sequence import StrideAndSkip
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.ops.selection import best_tokens, put
from sparsejax.routers import presets
from sparsejax.routers.balance import LoadBalance
from sparsejax.train.metrics import layer_metrics

from reference.depths import best, mixture_of_depths
from support import (
    ONE_DEVICE,
    OneLayer,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

WIDTH, LENGTH, ROWS = 8, 12, 2
ARRAYS = host_batch(ROWS, LENGTH, padded=2)
GATES = ("none", "raw", "sigmoid", "softmax", "straight_through")


BACKBONE = OneLayer(d_model=WIDTH, num_heads=2)
X = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
DEPTHS = MixtureOfDepths(capacity=0.4)


def build(settings):
    return lambda key: settings.around(DenseSpec(d_ff=16).build(key, BACKBONE), key, BACKBONE, (0,))


PARAMS = host_params(build(DEPTHS))


def params_of(settings):
    """Those of all settings are the same where they have them."""
    wanted = {path for path, _ in nnx.to_flat_state(host_params(build(settings)))}
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(PARAMS) if path in wanted])


@functools.cache
def compiled(settings, mode):
    """`(variables, x, batch, key) -> ((y, report), gradients)` of a layer."""

    def call(params, x, batch, key):
        def loss(params, x):
            out = nnx.merge(graph_of(build(settings)), params)(x, Context(batch=batch, mode=mode, key=key))
            return jnp.sum(out.x * jnp.cos(jnp.arange(out.x.size).reshape(out.x.shape))), (out.x, out.report.selection)

        grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return found, grads

    return jax.jit(call)


def run(settings, x=X, mode="train", arrays=ARRAYS):
    with on_mesh(ONE_DEVICE) as mesh:
        given = put_params(params_of(settings), mesh), put_rows(x, mesh), put_batch(arrays, mesh)
        return to_numpy(compiled(settings, mode)(*given, jax.random.key(0)))


def scores(x=X):
    weight = dict(nnx.to_flat_state(PARAMS))[("chooser", "weight", "weight")][...]
    return (x @ weight)[..., 0]


@functools.cache
def plain():
    """The block by itself: `(x, fields of a batch) -> y`."""
    with on_mesh(ONE_DEVICE):
        graph = graph_of(build(DEPTHS))
    call = jax.jit(lambda params, x, batch: nnx.merge(graph, params).block(x, Context(batch=batch, mode="eval")).x)

    def block(x, arrays):
        with on_mesh(ONE_DEVICE) as mesh:
            return to_numpy(call(put_params(PARAMS, mesh), put_rows(x, mesh), put_batch(arrays, mesh)))

    return block


@pytest.mark.parametrize("gate", GATES)
def test_the_chosen_go_through_the_block_as_the_equation_says(gate):
    """Packed documents and padding; the block's value on the chosen tokens is that of the block on them alone."""
    settings = dataclasses.replace(DEPTHS, gate=gate, serving="top_k")
    (y, report), _ = run(settings)
    k, valid = settings.slots(LENGTH), ARRAYS["segments"] > 0
    for row in range(ROWS):

        def block(x, places, row=row):
            taken = {n: a[row : row + 1, places] if a.ndim == 2 else a[row : row + 1] for n, a in ARRAYS.items()}
            return plain()(x[None], taken)[0]

        expected = mixture_of_depths(X[row], block, scores()[row], valid[row], k, gate)
        assert_close(y[row], expected.astype(np.float32))
    assert report.chosen == ROWS * k and report.tokens == valid.sum() and report.agreed <= report.tokens


@pytest.mark.parametrize("gate", GATES)
def test_compact_and_masked_have_equal_values_and_gradients(gate):
    settings = dataclasses.replace(DEPTHS, gate=gate, serving="top_k")
    assert_close(run(dataclasses.replace(settings, execution="masked")), run(settings), 2e-5)


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("gate", ["none", "straight_through"])
def test_at_full_capacity_a_gate_of_one_is_the_plain_block(gate, execution):
    (y, _), _ = run(MixtureOfDepths(capacity=1.0, gate=gate, execution=execution, serving="top_k"))
    valid = ARRAYS["segments"] > 0
    assert np.array_equal(y[valid], plain()(X, ARRAYS)[valid])


def test_the_gate_teaches_the_router_and_none_does_not():
    of_router = lambda gate: [  # noqa: E731
        np.abs(leaf[...]).max()
        for path, leaf in nnx.to_flat_state(run(dataclasses.replace(DEPTHS, gate=gate, serving="top_k"))[1][0])
        if path[0] == "chooser"
    ]
    assert all(max(of_router(gate)) > 0 for gate in GATES if gate != "none") and max(of_router("none")) == 0


def test_top_k_sees_the_future_and_the_predictor_does_not():
    later = X.copy()
    later[:, 8:] = -X[:, 8:]
    changed = lambda settings, mode: (run(settings, X, mode)[0][0] != run(settings, later, mode)[0][0])[:, :8].any()  # noqa: E731
    ahead = dataclasses.replace(DEPTHS, serving="top_k")
    assert changed(ahead, "eval") and changed(DEPTHS, "train"), "the leak should be seen"
    for serving in ("predictor", "router"):
        assert not changed(dataclasses.replace(DEPTHS, serving=serving), "eval")
    assert not changed(RandomTokens(capacity=0.4), "eval")


def test_padding_and_ties():
    tied = np.zeros((2, 6), np.float32)
    valid = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0]], bool)
    found = np.asarray(best_tokens(jnp.asarray(tied), jnp.asarray(valid), 3))
    assert found.tolist() == [[0, 1, 2], [0, 3, 6]] == [best(tied[0], valid[0], 3), [*best(tied[1], valid[1], 3), 6]]
    x = np.zeros((2, 6, 1), np.float32)
    assert np.asarray(put(jnp.asarray(x), jnp.ones((2, 3, 1)), found))[..., 0].sum(-1).tolist() == [3, 2]


def test_lots_are_as_many_and_differ_from_layer_to_layer_and_step_to_step():
    lot, arrays = RandomTokens(capacity=0.25), host_batch(4, 400, documents=1, padded=0)
    x = np.ones((4, 400, WIDTH), np.float32)

    def chosen(mode, key, layer):
        with on_mesh(ONE_DEVICE) as mesh:
            context = Context(batch=put_batch(arrays, mesh), mode=mode, key=jax.random.key(key), layer=layer)
            return np.asarray(lot.chooser(jax.random.key(0), BACKBONE, (0,)).scores(put_rows(x, mesh), context)) < 0.25

    first = chosen("eval", 0, 0)
    assert np.array_equal(first, chosen("eval", 1, 0)) and abs(first.mean() - 0.25) < 0.05
    assert 0.1 < (first & chosen("eval", 0, 1)).mean() / first.mean() < 0.4
    assert not np.array_equal(chosen("train", 0, 0), chosen("train", 1, 0))
    assert selection_ratios(run(lot)[0][1])["select/keep_fraction"] == ROWS * 3 / (ARRAYS["segments"] > 0).sum()


ROWS_OF_STEP = 8
ROUTER = dataclasses.replace(presets.switch(), balance=LoadBalance(scope="global"))
MOE = MoESpec(num_experts=4, d_ff=16, router=ROUTER, group_size=6)
BASE = ModelConfig(
    d_model=16,
    num_heads=2,
    vocab_size=32,
    pattern=("dense", "deep"),
    repeats=2,
    blocks={"dense": DenseSpec(d_ff=16), "deep": MOE},
    select=MixtureOfDepths(capacity=0.5, blocks=("deep",)),
    streams=AltUp(streams=2),
)


@pytest.fixture(scope="module")
def scanned():
    params = parted(BASE)
    return params, results(BASE, params, LENGTH)


@pytest.mark.parametrize(
    ("fields", "mesh", "accumulation"),
    [
        pytest.param({"scan": False, "remat": "full"}, (1, 1, 1), 2, id="unrolled, recomputed, accumulated"),
        pytest.param({}, (2, 2, 2), 1, id="2x2x2"),
        pytest.param({}, (2, 4, 1), 1, id="2x4x1", marks=pytest.mark.slow),
    ],
)
def test_with_experts_and_streams_on_meshes_and_in_parts(scanned, fields, mesh, accumulation):
    params, expected = scanned
    found = results(dataclasses.replace(BASE, **fields), params, LENGTH, mesh, accumulation)
    assert_close(found[0], expected[0], 2e-5)
    assert_close(found[2], expected[2], 5e-5)
    of = lambda reports: [(r.selection, r.moe and (r.moe.assigned, r.moe.dropped)) for r in reports.values()]  # noqa: E731
    assert_close(of(found[1]), of(expected[1]), 2e-5)


def test_reports_of_a_model(scanned):
    _, (_, reports, _) = scanned
    row = layer_metrics(BASE, reports, "train")
    tokens = ROWS_OF_STEP * LENGTH - 3
    assert row["select/keep_fraction"] == ROWS_OF_STEP * 6 / tokens and 0 <= row["select/agreement"] <= 1
    assert reports["pattern_1"].moe.tokens.tolist() == [ROWS_OF_STEP * 6] * 2


@pytest.mark.parametrize("serving", ["predictor", "router"])
def test_decoding_gives_the_logits_of_the_whole_row(serving):
    """A chunk, then token by token, rows that need a layer beside rows that do not."""
    length = 8
    model = dataclasses.replace(BASE, select=dataclasses.replace(BASE.select, serving=serving))
    arrays = host_batch(2, length, 32, documents=1, padded=0)
    with on_mesh(ONE_DEVICE):
        forward = on_rows(model, parted(model))
        whole = to_numpy(forward(arrays))
        chosen = whole.reports["pattern_1"].selection.chosen
        assert 0 < chosen.sum() < 2 * 2 * length, "the test should see both"
        caches = init_caches(model, 2, length)
        for start, stop in ((0, 2), *((at, at + 1) for at in range(2, length))):
            out = forward(cut(arrays, start, stop), caches)
            caches = out.caches
            assert_close(to_numpy(out.logits), whole.logits[:, start:stop])
        assert np.array_equal(np.asarray(caches["pattern_1"].written).sum(-1), chosen)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "key", "message"),
        [
            (lambda: MixtureOfDepths(capacity=0.0), "capacity", "0.0 is no part of a row"),
            (lambda: MixtureOfDepths(serving_loss=0.0), "serving_loss", "teaches serving=predictor nothing"),
            (lambda: MixtureOfDepths(gate="softmax"), "gate", "not there yet.*serving=top_k"),
            (lambda: dataclasses.replace(BASE, select=MixtureOfDepths(blocks=("dep",))), "select.blocks", "'deep'"),
            (
                lambda: dataclasses.replace(BASE, sequence=StrideAndSkip(blocks=("deep",))),
                "select.blocks",
                "deep computes on every k-th token",
            ),
            (
                lambda: dataclasses.replace(BASE, blocks=BASE.blocks | {"deep": MoESpec(router=presets.rl_r())}),
                "select.blocks",
                "deep: its policy is rewarded.*named: dense",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings, key, message):
        with pytest.raises(ConfigError, match=message) as error:
            settings()
        assert error.value.key == key

    def test_a_choice_among_the_whole_row_cannot_generate(self):
        with pytest.raises(ConfigError, match="predictor, router") as error:
            init_caches(dataclasses.replace(BASE, select=MixtureOfDepths(serving="top_k", blocks=("deep",))), 1, 8)
        assert error.value.key == "model.select.serving"
