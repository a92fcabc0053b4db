"""Mixture-of-Recursions: the paper's recursions token by token, the ways to execute them, decoding, its control."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import cut, on_rows, parted, results
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.recursion import MixtureOfRecursions, RandomRecursions
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs
from sparsejax.model.lm import LanguageModel, init_caches
from sparsejax.ops.selection import Recursing, among_best, best_tokens, members
from sparsejax.train.metrics import layer_metrics

from reference.depths import mixture_of_recursions
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
LAYERS = (1, 2, 3)  # a layer that is no recursion comes before
ARRAYS = host_batch(ROWS, LENGTH, padded=2)
VALID = ARRAYS["segments"] > 0
GATES = ("none", "raw", "sigmoid", "softmax", "straight_through")
BACKBONE = OneLayer(d_model=WIDTH, num_heads=2)
X = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
AHEAD = MixtureOfRecursions(serving="top_k")


def build(settings):
    return lambda key: settings.around(DenseSpec(d_ff=16).build(key, BACKBONE), key, BACKBONE, LAYERS)


PARAMS = host_params(build(MixtureOfRecursions()))


def params_of(settings):
    wanted = {path for path, _ in nnx.to_flat_state(host_params(build(settings)))}
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(PARAMS) if path in wanted])


@functools.cache
def compiled(settings, mode, traced):
    """`(variables, x, batch, key) -> ((y, reports), gradients)` of all recursions; `traced`: their numbers, too."""

    def call(params, x, batch, key, layers):
        def loss(params, x):
            row, reports = settings.entered(x, batch), []
            for place, layer in enumerate(LAYERS):
                block = nnx.merge(graph_of(build(settings)), params)
                number = layers[place] if traced else layer
                context = Context(batch=batch, mode=mode, key=key, step_key=key, record=True, layer=number)
                out = block(row, context)
                row, reports = out.x, [*reports, (out.report.selection, out.report.kept)]
            return jnp.sum(row.x * jnp.cos(jnp.arange(row.x.size).reshape(row.x.shape))), (row.x, reports)

        grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return found, grads

    return jax.jit(call)


def run(settings, x=X, mode="train", traced=False, key=0):
    with on_mesh(ONE_DEVICE) as mesh:
        given = put_params(params_of(settings), mesh), put_rows(x, mesh), put_batch(ARRAYS, mesh)
        return to_numpy(compiled(settings, mode, traced)(*given, jax.random.key(key), jnp.asarray(LAYERS)))


@functools.cache
def plain():
    with on_mesh(ONE_DEVICE):
        graph = graph_of(build(MixtureOfRecursions()))
    call = jax.jit(lambda params, x, batch: nnx.merge(graph, params).block(x, Context(batch=batch, mode="eval")).x)

    def block(x, arrays):
        with on_mesh(ONE_DEVICE) as mesh:
            return to_numpy(call(put_params(PARAMS, mesh), put_rows(x, mesh), put_batch(arrays, mesh)))

    return block


@pytest.mark.parametrize("gate", GATES)
def test_recursions_compute_what_the_equations_say(gate):
    settings = dataclasses.replace(AHEAD, gate=gate)
    (y, reports), _ = run(settings)
    slots = settings.slots_of(LENGTH, 3)
    assert slots == (12, 8, 4)
    weight = dict(nnx.to_flat_state(PARAMS))[("chooser", "weight", "weight")][...]
    surprise = np.zeros(3)
    for row in range(ROWS):
        logits = []

        def block(x, places, row=row):
            taken = {n: a[row : row + 1, places] if a.ndim == 2 else a[row : row + 1] for n, a in ARRAYS.items()}
            return plain()(x[None], taken)[0]

        def scores(x, r, logits=logits):
            logits.append(x @ weight[:, r])
            return logits[-1]

        expected, chosen = mixture_of_recursions(X[row], block, scores, VALID[row], slots, gate)
        assert_close(y[row], expected.astype(np.float32), 2e-5)
        assert np.array_equal(np.stack([kept[row] for _, kept in reports]), chosen)
        alive = np.stack([VALID[row], *chosen[:-1]])
        surprise += np.sum(np.logaddexp(0, np.where(chosen, -np.array(logits), logits)), axis=1, where=alive)
    real = VALID.sum(1)
    assert [report.chosen for report, _ in reports] == [np.minimum(real, k).sum() for k in slots]
    assert all(report.tokens == VALID.sum() for report, _ in reports)
    assert [report.surprise_sum for report, _ in reports] == pytest.approx(surprise, rel=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_compact_and_masked_have_equal_values_and_gradients_also_with_one_shape_for_all(gate):
    settings = dataclasses.replace(AHEAD, gate=gate)
    masked, compact = dataclasses.replace(settings, execution="masked"), run(settings)
    assert_close(run(masked), compact, 2e-5)
    assert_close(run(masked, traced=True), compact, 2e-5)


def test_a_k_that_is_known_later_chooses_the_same():
    """With ties and padding."""
    rng = np.random.default_rng(2)
    scores, valid = rng.integers(0, 4, (6, 10)).astype(np.float32), rng.random((6, 10)) < 0.7
    for k in (1, 4, 10):
        expected = members(best_tokens(jnp.asarray(scores), jnp.asarray(valid), k), 10)
        assert np.array_equal(among_best(jnp.asarray(scores), jnp.asarray(valid), jnp.int32(k)), expected)


def test_choosing_from_the_whole_row_sees_the_future_and_the_predictors_do_not():
    later = X.copy()
    later[:, 8:] = -X[:, 8:]

    def changed(settings, mode):
        before, after = run(settings, X, mode)[0][0], run(settings, later, mode)[0][0]
        return (before != after)[:, :8].any()

    assert changed(AHEAD, "eval") and changed(MixtureOfRecursions(), "train"), "the leak should be seen"
    for serving in ("predictor", "router"):
        assert not changed(MixtureOfRecursions(serving=serving), "eval")
    assert not changed(RandomRecursions(), "eval")


def test_evaluation_keeps_rows_and_documents_apart_and_draws_nothing():
    other, length = X.copy(), ARRAYS["segments"][0]
    other[1] = -X[1]
    first_document = length == length[0]
    other[0, first_document] = -X[0, first_document]
    settings = MixtureOfRecursions()
    before, after = run(settings, X, "eval")[0][0], run(settings, other, "eval")[0][0]
    assert np.array_equal(before[0, ~first_document], after[0, ~first_document])
    assert not np.array_equal(before[0, first_document], after[0, first_document])
    assert np.array_equal(before, run(settings, X, "eval", key=1)[0][0])


def test_predictors_learn_what_their_recursion_chooses_and_teach_the_model_nothing():
    """Of tokens that are still there; a token that an earlier recursion left is no lesson."""
    (_, reports), _ = run(MixtureOfRecursions())
    alive = VALID
    for report, kept in reports:
        assert 0 < report.surprise_sum < 3 * alive.sum() and report.agreed <= report.tokens
        assert not (kept & ~alive).any()
        alive = kept


def test_lots_are_nested_as_many_as_asked_for_and_differ_by_step():
    lots = RandomRecursions(capacity=0.25)
    (_, reports), _ = run(lots)
    kept = np.stack([kept for _, kept in reports])
    assert np.all(kept[1:] <= kept[:-1]) and kept.sum((1, 2)).tolist() == [VALID.sum(), 2 * 8, 2 * 3]
    assert not np.array_equal(kept, np.stack([kept for _, kept in run(lots, key=1)[0][1]]))
    arrays = host_batch(4, 400, documents=1, padded=0)
    with on_mesh(ONE_DEVICE) as mesh:
        batch, chooser = put_batch(arrays, mesh), lots.chooser(jax.random.key(0), BACKBONE, LAYERS)
        contexts = [Context(batch=batch, mode="eval", layer=layer) for layer in LAYERS]
        scores = [chooser.scores(None, context) for context in contexts]
        assert np.array_equal(scores[0], scores[2]), "a lot is the token's, not the layer's"
        trained = [
            chooser.scores(
                None, Context(batch=batch, mode="train", layer=n, key=jax.random.key(n), step_key=jax.random.key(9))
            )
            for n in LAYERS
        ]
        assert np.array_equal(trained[0], trained[2]) and not np.array_equal(trained[0], scores[0])
        shares = [float((chooser.causal(None, s, c) > 0).mean()) for s, c in zip(scores, contexts)]
    assert shares == pytest.approx([1, 0.625, 0.25], abs=0.05)


BASE = ModelConfig(
    d_model=16,
    num_heads=2,
    vocab_size=32,
    prefix=("dense",),
    pattern=("deep",),
    suffix=("dense",),
    repeats=3,
    tied_repeats=True,
    scan=False,
    blocks={"dense": DenseSpec(d_ff=16), "deep": DenseSpec(d_ff=24)},
    select=MixtureOfRecursions(capacity=0.4, blocks=("deep",)),
)
MASKED = dataclasses.replace(BASE.select, execution="masked")


@pytest.fixture(scope="module")
def unrolled():
    params = parted(BASE)
    return params, results(BASE, params, LENGTH)


@pytest.mark.parametrize(
    ("fields", "mesh", "accumulation"),
    [
        pytest.param({"scan": True, "remat": "full", "select": MASKED}, (1, 1, 1), 2, id="scanned, in parts"),
        pytest.param({"remat": "dots", "select": MASKED}, (2, 2, 2), 1, id="2x2x2, recomputed"),
        pytest.param({}, (2, 2, 2), 1, id="2x2x2"),
        pytest.param({}, (2, 4, 1), 1, id="2x4x1", marks=pytest.mark.slow),
    ],
)
def test_on_meshes_and_in_parts(unrolled, fields, mesh, accumulation):
    params, expected = unrolled
    found = results(dataclasses.replace(BASE, **fields), params, LENGTH, mesh, accumulation)
    assert_close(found[0], expected[0], 2e-5)
    assert_close(found[2], expected[2], 5e-5)
    of = lambda reports: reports["pattern_0"].selection  # noqa: E731
    assert_close(of(found[1]), of(expected[1]), 2e-5)


def test_reports_and_the_ledger_tell_the_mean_recursion(unrolled):
    _, (_, reports, _) = unrolled
    row = layer_metrics(BASE, reports, "train")
    slots = BASE.select.slots_of(LENGTH, 3)
    assert reports["pattern_0"].selection.chosen.tolist() == [8 * LENGTH - 3, *(8 * k for k in slots[1:])]
    assert row["select/keep_fraction"] == pytest.approx(
        (8 * LENGTH - 3 + 8 * sum(slots[1:])) / 3 / (8 * LENGTH - 3), rel=1e-6
    )
    some, all_of_them = component_costs(BASE), component_costs(dataclasses.replace(BASE, select=RandomRecursions(
        capacity=1.0, blocks=("deep",)
    )))  # fmt: skip
    dense = 2 * 2 * 16 * 16  # of the layers before and after
    tokens, pairs = (1 + 0.7 + 0.4) / 3, (1 + 0.49 + 0.16) / 3
    whole = all_of_them["mlp"].per_token
    assert some["mlp"].per_token == pytest.approx(2 * dense + (whole - 2 * dense) * tokens)
    keys = all_of_them["attention_scores"].per_key
    assert some["attention_scores"].per_key == pytest.approx(keys * (2 + 3 * pairs) / 5)
    assert some["mlp"].parameters == all_of_them["mlp"].parameters
    assert some["selection"].parameters == 3 * 16 + 4 * (16 + 3)


@pytest.mark.parametrize("gate", ["none", "straight_through"])
def test_at_full_capacity_a_gate_of_one_is_the_tied_model(gate):
    full = dataclasses.replace(BASE.select, capacity=1.0, gate=gate, serving="top_k")
    with on_mesh(ONE_DEVICE):
        tied, params = dataclasses.replace(BASE, select=ModelConfig().select), parted(BASE)
        own = {path for path, _ in nnx.to_flat_state(parted(tied))}
        skip = lambda path: tuple(part for part in path if part != "block")  # noqa: E731
        given = nnx.from_flat_state([(skip(p), v) for p, v in nnx.to_flat_state(params) if skip(p) in own])
        arrays = host_batch(2, LENGTH, 32)
        found = on_rows(dataclasses.replace(BASE, select=full), params_like(full, params))(arrays)
        valid = arrays["segments"] > 0
        logits, expected = to_numpy((found.logits, on_rows(tied, given)(arrays).logits))
        assert np.array_equal(logits[valid], expected[valid])


def params_like(settings, params):
    """Those that the model with these settings has."""
    wanted = {path for path, _ in nnx.to_flat_state(parted(dataclasses.replace(BASE, select=settings)))}
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(params) if path in wanted])


@pytest.mark.parametrize("select", [BASE.select, dataclasses.replace(BASE.select, serving="router"),
                                    RandomRecursions(capacity=0.4, blocks=("deep",))])  # fmt: skip
def test_decoding_gives_the_logits_of_the_whole_row(select):
    """A chunk, then token by token; a token that a recursion leaves writes nothing into the caches of those after."""
    length, model = 8, dataclasses.replace(BASE, select=select)
    arrays = host_batch(2, length, 32, documents=1, padded=0)
    with on_mesh(ONE_DEVICE):
        # Predictors that have not learned choose all tokens or none: these tell them apart.
        apart = lambda path, v: 8 * v * (-1) ** np.indices(v.shape)[-1] if "hidden" in str(path) else v  # noqa: E731
        forward = on_rows(model, jax.tree_util.tree_map_with_path(apart, parted(model)))
        whole = to_numpy(forward(arrays))
        chosen = whole.reports["pattern_0"].selection.chosen
        assert 0 < chosen.sum() < 3 * 2 * length and np.all(np.diff(chosen) <= 0), "the test should see both"
        caches = init_caches(model, 2, length)
        for start, stop in ((0, 2), *((at, at + 1) for at in range(2, length))):
            out = forward(cut(arrays, start, stop), caches)
            caches = out.caches
            assert_close(to_numpy(out.logits), whole.logits[:, start:stop])
        assert np.array_equal(np.asarray(caches["pattern_0"].written).sum(-1), chosen)


def test_what_comes_after_recursions_is_given_all_tokens():
    """States of tokens that were left are those of their last recursion, and the layer after moves them on."""
    with on_mesh(ONE_DEVICE) as mesh:
        model = LanguageModel(jax.random.key(0), BASE)
        batch = put_batch(host_batch(2, LENGTH, 32), mesh)
        x = model.stack(jnp.zeros((2, LENGTH, 16)) + 1.0, Context(batch=batch, mode="eval")).x
        assert not isinstance(x, Recursing) and x.shape == (2, LENGTH, 16)


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "key", "message"),
        [
            ({"tied_repeats": False}, "select", "tied_repeats=true and a pattern of that block"),
            ({"pattern": ("deep", "dense")}, "select", "a pattern of that block alone"),
            ({"prefix": ("deep",)}, "select", "no layer of prefix or suffix"),
            ({"select": MixtureOfRecursions()}, "select", r"\(select.blocks names it\)"),
            ({"streams": AltUp(streams=2)}, "select", "streams=none, exits=none and layer_dropout=0"),
            ({"layer_dropout": 0.1}, "select", "layer_dropout=0"),
            ({"scan": True}, "select.execution", "scan=false and remat=none, execution=masked with all"),
            ({"remat": "full"}, "select.execution", "scan=false and remat=none"),
            ({"blocks": {"dense": DenseSpec(), "deep": MoESpec()}}, "tied_repeats", "has a router"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields, key, message):
        with pytest.raises(ConfigError, match=message) as error:
            dataclasses.replace(BASE, **fields)
        assert error.value.key == key

    def test_a_choice_among_the_whole_row_cannot_generate(self):
        ahead = dataclasses.replace(BASE.select, serving="top_k")
        with pytest.raises(ConfigError, match="predictor, router"):
            init_caches(dataclasses.replace(BASE, select=ahead), 1, 8)
