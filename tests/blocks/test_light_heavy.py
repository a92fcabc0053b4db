"""Light and heavy branches: the papers' equations, both executions, the dense limit, the leak, controls, the ledger."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import parted, results
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.conditional_adapters import ConditionalAdapters
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.light_heavy import LightHeavySpec
from sparsejax.blocks.tokens import EveryToken
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs
from sparsejax.model.lm import init_caches
from sparsejax.train.metrics import layer_metrics

from reference import light_heavy as slow
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

WIDTH, LENGTH, ROWS = 8, 14, 2
ARRAYS = host_batch(ROWS, LENGTH, padded=2)
VALID = ARRAYS["segments"] > 0
X = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


BACKBONE = OneLayer(d_model=WIDTH, num_heads=4, num_kv_heads=2, causal=False)
CONVERGED = {"iterations": 400}
SPEC = LightHeavySpec(
    capacity=0.3, query_capacity=0.3, key_capacity=0.4, light_heads=2, radius=2, light_d_ff=4, d_ff=12, **CONVERGED
)
CODA = ConditionalAdapters(capacity=0.3, adapter=6, **CONVERGED)


def build(settings, backbone=BACKBONE):
    if isinstance(settings, LightHeavySpec):
        return lambda key: settings.build(key, backbone)
    return lambda key: settings.around(DenseSpec(d_ff=12).build(key, backbone), key, backbone, (0,))


@functools.cache
def params(kind):
    """With scores that tell tokens apart, and adapters that do something."""
    rng = np.random.default_rng(3)
    draw = lambda leaf: (rng.normal(size=leaf.shape) * 0.4).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, host_params(build(SPEC if kind == "light_heavy" else CODA)))


def params_of(settings, backbone=BACKBONE):
    """Controls have those of what learns, but for the scores."""
    all_of = params("light_heavy" if isinstance(settings, LightHeavySpec) else "coda")
    wanted = {path for path, _ in nnx.to_flat_state(host_params(build(settings, backbone)))}
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(all_of) if path in wanted])


@functools.cache
def compiled(settings, mode, backbone):
    """`(variables, x, batch, key, layer) -> ((y, report), gradients)`; of evaluation there are none."""

    def call(params, x, batch, key, layer):
        def loss(params, x):
            context = Context(batch=batch, mode=mode, key=key if mode == "train" else None, layer=layer)
            out = nnx.merge(graph_of(build(settings, backbone)), params)(x, context)
            return jnp.sum(out.x * jnp.cos(jnp.arange(out.x.size).reshape(out.x.shape))), (out.x, out.report.heavy)

        if mode == "eval":
            return loss(params, x)[1], None
        grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return found, grads

    return jax.jit(call)


def run(settings, x=X, mode="train", arrays=ARRAYS, backbone=BACKBONE, step=0, layer=0):
    with on_mesh(ONE_DEVICE) as mesh:
        given = put_params(params_of(settings, backbone), mesh), put_rows(x, mesh), put_batch(arrays, mesh)
        return to_numpy(compiled(settings, mode, backbone)(*given, jax.random.key(step), layer))


def weights_of(state):
    """Nested dicts of float64 arrays."""
    nested = {}
    for path, leaf in nnx.to_flat_state(state):
        *above, name = path
        functools.reduce(lambda inner, part: inner.setdefault(part, {}), above, nested)[name] = leaf[...].astype(float)
    return nested


@functools.cache
def plain(backbone=BACKBONE):
    """CoDA's block by itself: `(x, fields of a batch) -> y`."""
    with on_mesh(ONE_DEVICE):
        graph = graph_of(build(CODA, backbone))
    call = jax.jit(lambda params, x, batch: nnx.merge(graph, params).block(x, Context(batch=batch, mode="eval")).x)

    def block(x, arrays):
        with on_mesh(ONE_DEVICE) as mesh:
            return to_numpy(call(put_params(params("coda"), mesh), put_rows(x, mesh), put_batch(arrays, mesh)))

    return block


@pytest.mark.parametrize("causal", [False, True])
def test_the_block_is_that_of_the_equation(causal):
    """Two documents a row and padding; fewer key heads than heads; causal attention, too."""
    backbone = dataclasses.replace(BACKBONE, causal=causal)
    (y, _), _ = run(SPEC, mode="eval", backbone=backbone)
    weights = weights_of(params("light_heavy"))
    for row in range(ROWS):
        where = ARRAYS["segments"][row], ARRAYS["positions"][row]
        expected = slow.light_heavy(X[row], *where, weights, SPEC, causal).astype(np.float32)
        assert_close(y[row][VALID[row]], expected[VALID[row]], 2e-5)


def test_coda_is_that_of_the_equation():
    (y, report), _ = run(CODA)
    weights = weights_of(params("coda"))
    for row in range(ROWS):

        def block(x, places, row=row):
            taken = {n: a[row : row + 1, places] if a.ndim == 2 else a[row : row + 1] for n, a in ARRAYS.items()}
            return plain()(x[None].astype(np.float32), taken)[0]

        expected = slow.conditional_adapter(X[row], block, VALID[row], weights, CODA).astype(np.float32)
        assert_close(y[row], expected, 2e-5)
    assert report.chosen.tolist() == report.slots.tolist() == [ROWS * 5] and report.residual_sum < 1e-3


@pytest.mark.parametrize("gate", ["weight", "straight_through"])
@pytest.mark.parametrize("settings", [SPEC, CODA], ids=["light_heavy", "coda"])
def test_compact_and_masked_have_equal_values_and_gradients(settings, gate):
    settings = dataclasses.replace(settings, gate=gate)
    compact, masked = run(settings), run(dataclasses.replace(settings, execution="masked"))
    without = lambda found: (found[0][0], found[1])  # noqa: E731
    assert_close(without(masked), without(compact), 2e-5)
    assert np.array_equal(masked[0][1].chosen, compact[0][1].chosen)
    learned = [leaf for path, leaf in nnx.to_flat_state(compact[1][0]) if "chooser" in str(path)]
    assert all(np.abs(leaf[...]).max() > 0 for leaf in learned), "choices learn"


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_where_all_are_chosen_it_is_a_dense_block_of_both_widths(execution):
    """Radius and capacities as large as the row: heads and hidden units of both branches side by side."""
    whole = {"capacity": 1.0, "query_capacity": 1.0, "key_capacity": 1.0, "radius": LENGTH}
    settings = dataclasses.replace(SPEC, **whole, execution=execution)
    backbone = dataclasses.replace(BACKBONE, num_kv_heads=4)
    mine = host_params(build(settings, backbone))
    dense = DenseSpec(d_ff=16)
    values = dict(nnx.to_flat_state(mine))

    def joined(path, leaf):
        if path[0] == "attention" and path[1] in ("q", "k", "v", "out"):
            parts = [values[(name, *path[1:])][...] for name in ("light_attention", "heavy_attention")]
            return np.concatenate(parts, axis=0 if path[1] == "out" else 1)
        if path[0] == "feed_forward":
            parts = [values[(name, *path[2:])][...] for name in ("light", "heavy")]
            return np.concatenate(parts, axis=1 if path[2] == "w_in" else 0)
        return values[path][...]

    empty = host_params(lambda key: dense.build(key, backbone))
    given = nnx.from_flat_state([(p, leaf.replace(joined(p, leaf))) for p, leaf in nnx.to_flat_state(empty)])

    def through(build, variables):
        with on_mesh(ONE_DEVICE) as mesh:
            module = nnx.merge(graph_of(build), put_params(variables, mesh))
            forward = jax.jit(lambda x, batch: module(x, Context(batch=batch, mode="eval")).x)
            return to_numpy(forward(put_rows(X, mesh), put_batch(ARRAYS, mesh)))

    expected = through(lambda key: dense.build(key, backbone), given)
    assert_close(through(build(settings, backbone), mine)[VALID], expected[VALID])


def test_an_adapter_begins_as_nothing_and_at_full_capacity_coda_is_the_plain_block():
    settings = dataclasses.replace(CODA, capacity=1.0)
    fresh = host_params(build(settings))
    assert not np.any(dict(nnx.to_flat_state(fresh))[("adapter", "up", "weight")][...])
    with on_mesh(ONE_DEVICE) as mesh:
        module = nnx.merge(graph_of(build(settings)), put_params(fresh, mesh))
        context = Context(batch=put_batch(ARRAYS, mesh), mode="eval")
        forward = jax.jit(lambda x: (module(x, context).x, module.block(x, context).x))
        mine, alone = to_numpy(forward(put_rows(X, mesh)))
    assert np.array_equal(mine[VALID], alone[VALID])


@pytest.mark.parametrize("settings", [SPEC, CODA], ids=["light_heavy", "coda"])
def test_what_is_learned_sees_the_future_and_a_blind_choice_does_not(settings):
    """In a causal model attention looks back alone: what leaks is the choice."""
    later, backbone = X.copy(), dataclasses.replace(BACKBONE, causal=True)
    later[:, 9:] = 3 - X[:, 9:]

    def changed(by):
        same = dataclasses.replace(settings, by=by)
        first, second = (run(same, x, "eval", backbone=backbone)[0][0] for x in (X, later))
        return (first != second)[:, :9].any()

    assert changed("learned"), "the leak should be seen"
    assert not changed("random") and not changed("place")


@pytest.mark.parametrize("settings", [SPEC, CODA], ids=["light_heavy", "coda"])
def test_controls_choose_as_many_with_weights_of_one(settings):
    learned = run(settings, mode="eval")[0][1]
    for by in ("random", "place"):
        blind = dataclasses.replace(settings, by=by)
        (y, report), _ = run(blind, mode="eval")
        assert np.array_equal(report.chosen, learned.chosen) and np.array_equal(report.slots, learned.slots)
        assert np.array_equal(report.weight_sum, report.chosen) and not report.residual_sum.any()
        assert np.array_equal(run(blind, mode="eval", step=1)[0][0], y), "evaluation is not random"
        other = run(blind, mode="eval", layer=1)[0][0]
        assert np.array_equal(other, y) == (by == "place"), "lots differ from layer to layer"
    lots = dataclasses.replace(settings, by="random")
    assert not np.array_equal(run(lots, step=0)[0][0], run(lots, step=1)[0][0])


ENCODER = ModelConfig(
    d_model=16,
    num_heads=4,
    vocab_size=32,
    prefix=("first",),  # equal tokens would have equal scores, and rounding the choice
    pattern=("dense", "deep"),
    repeats=2,
    causal=False,
    blocks={
        "first": DenseSpec(d_ff=16),
        "dense": DenseSpec(d_ff=16),
        "deep": dataclasses.replace(SPEC, iterations=30, d_ff=16),
    },
    select=dataclasses.replace(CODA, iterations=30, blocks=("dense",)),
    streams=AltUp(streams=2),
)
BRANCHES = dataclasses.replace(ENCODER, select=EveryToken())
ADAPTED = dataclasses.replace(ENCODER, pattern=("dense",))


@pytest.fixture(scope="module")
def scanned():
    params = parted(ENCODER)
    return params, results(ENCODER, params, LENGTH)


@pytest.mark.parametrize(
    ("fields", "mesh", "accumulation"),
    [
        pytest.param({}, (2, 2, 2), 1, id="2x2x2"),
        pytest.param({"scan": False, "remat": "full"}, (1, 1, 1), 2, id="unrolled, recomputed, accumulated"),
        pytest.param({}, (2, 4, 1), 1, id="2x4x1", marks=pytest.mark.slow),
    ],
)
def test_on_meshes_and_in_parts(scanned, fields, mesh, accumulation):
    params, expected = scanned
    found = results(dataclasses.replace(ENCODER, **fields), params, LENGTH, mesh, accumulation)
    assert_close(found[0], expected[0], 2e-5)
    assert_close(found[2], expected[2], 5e-5)
    counts = lambda reports: [(r.heavy.rows, r.heavy.chosen) for r in reports.values() if r.heavy]  # noqa: E731
    assert_close(counts(found[1]), counts(expected[1]))


def test_the_metrics_of_a_model(scanned):
    """Means over layers of means over a layer's choices: 5 of 14 tokens for the adapted layers; 5, 6 and 5."""
    _, (_, reports, _) = scanned
    row, tokens = layer_metrics(ENCODER, reports, "train"), reports["pattern_1"].heavy.tokens[0]
    assert reports["pattern_1"].heavy.chosen.tolist() == [[8 * 5, 8 * 6, 8 * 5]] * 2
    assert row["select/keep_fraction"] == pytest.approx(8 * (5 + 16 / 3) / 2 / tokens)
    assert 0 < row["select/gate"] <= 1 and 0 <= row["select/residual"] < 0.5


def test_flops_counted_by_hand():
    """D = 16, four heads of 4, of which two light; radius 2; F = 4 light, 16 heavy; shares 0.3, 0.3, 0.4."""
    model = dataclasses.replace(BRANCHES, prefix=(), pattern=("deep",), repeats=1)
    costs = component_costs(model)
    assert costs["selection"].per_token == 2 * 3 * 16
    assert costs["mlp"].per_token == pytest.approx(2 * 2 * 16 * (4 + 0.3 * 16))
    light, query, key = 4 * 16 * 4 * 2, 2 * 16 * 4 * 2, 2 * 16 * 4 * 2
    assert costs["attention_projections"].per_token == pytest.approx(2 * (light + 0.3 * query + 0.4 * key))
    assert costs["attention_scores"].per_token == 4 * 4 * 2 * 5
    assert costs["attention_scores"].per_key == pytest.approx(4 * 4 * 2 * 0.3 * 0.4)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "key", "message"),
        [
            (lambda: LightHeavySpec(capacity=0.0), "capacity", "0.0 is no part of a row"),
            (lambda: LightHeavySpec(key_capacity=1.5), "key_capacity", "1.5 is no part of a row"),
            (lambda: LightHeavySpec(radius=0), "radius", "0 is not positive"),
            (lambda: LightHeavySpec(epsilon=0.0), "epsilon", "0.0 is not positive"),
            (lambda: LightHeavySpec(iterations=5), "iterations", "above epsilon=0.3; allowed: 9 or more"),
            (lambda: ConditionalAdapters(iterations=3), "iterations", "allowed: 9 or more"),
            (lambda: ConditionalAdapters(adapter=0), "adapter", "0 is not positive"),
            (lambda: ConditionalAdapters(capacity=2.0), "capacity", "2.0 is no part of a row"),
            (lambda: dataclasses.replace(BRANCHES, num_heads=1), "blocks.deep.light_heads", "leave none for heavy"),
            (lambda: dataclasses.replace(BRANCHES, attention="splash"), "blocks.deep.name", "allowed: auto, xla"),
            (lambda: dataclasses.replace(BRANCHES, causal=True), "blocks.deep.allow_leak", "allow_leak=true accepts"),
            (lambda: dataclasses.replace(ADAPTED, causal=True), "select.allow_leak", "allow_leak=true accepts"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings, key, message):
        with pytest.raises(ConfigError, match=message) as error:
            settings()
        assert error.value.key == key

    def test_a_choice_among_whole_rows_cannot_generate(self):
        leaking = dataclasses.replace(ENCODER.blocks["deep"], allow_leak=True)
        models = {
            "model.blocks.deep.name": dataclasses.replace(
                BRANCHES, causal=True, blocks=ENCODER.blocks | {"deep": leaking}
            ),
            "model.select.name": dataclasses.replace(
                ADAPTED, causal=True, select=dataclasses.replace(ADAPTED.select, allow_leak=True)
            ),
        }
        for key, model in models.items():
            with pytest.raises(ConfigError) as error:
                init_caches(model, 1, 8)
            assert error.value.key == key
