"""D-LLM's layers, which tokens run or skip: the slow model, its executions, its limits, its gradient, its decoding."""

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
from sparsejax.blocks.layer_routing import LayerRouting
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs
from sparsejax.model.lm import LanguageModel, auxiliary_losses, init_caches, scored
from sparsejax.ops.gates import Gumbel, HardConcrete, StraightThrough
from sparsejax.train.metrics import layer_metrics, spared_flops

from reference import layer_routing as slow
from reference import transformer
from support import ONE_DEVICE, assert_close, graph_of, host_batch, on_mesh, put_batch, put_params, put_rows, to_numpy

LENGTH, ROWS, HIDDEN = 12, 4, 6
ROUTING = LayerRouting(blocks=("routed",), hidden=HIDDEN, always=1, target=0.4)
BASE = ModelConfig(
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=32,
    prefix=("first",),
    pattern=("routed",),
    repeats=3,
    blocks={"first": DenseSpec(d_ff=24), "routed": DenseSpec(d_ff=24)},
    select=ROUTING,
)


def model(**settings):
    fields = {name: settings.pop(name) for name in list(settings) if name in ModelConfig.__dataclass_fields__}
    return dataclasses.replace(BASE, **({"select": dataclasses.replace(ROUTING, **settings)} | fields))


@functools.cache
def params(bias=-0.2):
    set_bias = lambda path, leaf: np.full_like(leaf, bias) if "bias" in jax.tree_util.keystr(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(set_bias, parted(BASE))


ARRAYS = host_batch(ROWS, LENGTH, 32, padded=3)
REAL = ARRAYS["segments"] > 0


@functools.cache
def program(config, mode):
    with on_mesh(ONE_DEVICE):
        graph = graph_of(lambda key: LanguageModel(key, config))

    def call(params, batch):
        out = nnx.merge(graph, params)(batch, mode=mode)
        return out.logits, scored(config, out.reports, jnp.zeros(batch.tokens.shape), batch)

    return jax.jit(call)


def outcome(config, given, arrays=ARRAYS, mode="eval"):
    """(logits, reports that are sums)."""
    with on_mesh(ONE_DEVICE) as mesh:
        return to_numpy(program(config, mode)(put_params(given, mesh), put_batch(arrays, mesh)))


def chosen(found):
    return found[1]["pattern_0"].selection.chosen.tolist()


@functools.cache
def expected():
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params()))
    routed = plain["stack"]["units"]["blocks"][0]
    of_layers = [jax.tree.map(lambda leaf, r=r: leaf[r], routed) for r in range(3)]
    table = plain["embedding"]["table"]
    x = np.sqrt(table.shape[1]) * table[ARRAYS["tokens"]]
    x = transformer.block(plain["stack"]["prefix"][0], x, ARRAYS, BASE, REAL, {})

    def block(of_layer):
        def run(x_KD, b, places):
            row = {name: array[b : b + 1, places] for name, array in ARRAYS.items() if array.ndim == 2}
            return transformer.block(of_layer["block"], x_KD[None], row, BASE, row["segments"] > 0, {})[0]

        return run

    def router(of_layer):
        own = of_layer["chooser"]
        given = own["hidden"]["weight"], own["norm"]["scale"], own["odds"]["weight"], own["bias"]
        return lambda x: slow.log_odds(x, *given, BASE.norm_epsilon)

    where = ARRAYS["segments"], ARRAYS["positions"]
    x, ran = slow.layers(x, [block(each) for each in of_layers], [router(each) for each in of_layers], *where, 1)
    return transformer.scores(plain, x, BASE), ran


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_against_the_slow_model(mode):
    """Training without a key draws nothing either."""
    logits, ran = expected()
    found = outcome(BASE, params(), mode=mode)
    assert_close(found[0][REAL], logits[REAL].astype(np.float32), 2e-5)
    assert chosen(found) == ran.sum((1, 2)).tolist()
    assert len({*ran.sum(0)[REAL]}) > 2, "tokens should run different numbers of layers"
    far = np.abs(ran.mean(0) - 0.4)[REAL].mean()
    totals = dataclasses.make_dataclass("Totals", ["tokens", "reports"])(int(REAL.sum()), None)
    assert float(auxiliary_losses(BASE, found[1], totals)["selection"]) == pytest.approx(far, rel=1e-5)


def test_compact_and_masked_are_equal():
    for causal in (True, False):
        compact, masked = (outcome(model(execution=how, causal=causal), params()) for how in ("compact", "masked"))
        assert_close((compact[0][REAL], compact[1]), (masked[0][REAL], masked[1]), 2e-5)


def test_who_runs_all_is_the_plain_model_and_who_skips_all_keeps_what_it_was():
    flat = nnx.to_flat_state(params(100.0))
    plain = [(tuple(p for p in path if p != "block"), leaf) for path, leaf in flat if "chooser" not in path]
    config = dataclasses.replace(BASE, select=model().sequence)
    everything = outcome(config, nnx.from_flat_state(plain))[0]
    assert_close(outcome(BASE, params(100.0))[0][REAL], everything[REAL])
    nothing = outcome(BASE, params(-100.0))
    starts = int((ARRAYS["positions"] == 0)[REAL].sum())
    assert chosen(nothing) == [starts] * 3
    first = dataclasses.replace(config, pattern=(), repeats=0)
    alone = nnx.from_flat_state([(path, leaf) for path, leaf in plain if "units" not in path])
    later = REAL & (ARRAYS["positions"] > 0)
    assert_close(nothing[0][later], outcome(first, alone)[0][later])


def test_gates_learn_what_the_layer_does_to_their_own_token():
    """x + z (y − x), with the gradient of σ(θ) for z, whether the token runs the layer or skips it."""
    settings, rng = dataclasses.replace(ROUTING, always=1), np.random.default_rng(0)
    x = rng.normal(size=(ROWS, LENGTH, 16)).astype(np.float32)
    with on_mesh(ONE_DEVICE) as mesh:
        block = settings.around(DenseSpec(d_ff=24).build(jax.random.key(0), BASE), jax.random.key(1), BASE, (0,))
        context = Context(batch=put_batch(ARRAYS, mesh), mode="train")
        block.chooser.bias[...] = jnp.float32(-0.1)
        graph, variables = nnx.split(block)
        slopes = jax.grad(lambda given: jnp.sum(jnp.sin(nnx.merge(graph, given)(jnp.asarray(x), context).x)))(variables)
        slope, odds = slopes["chooser"]["bias"][...], np.asarray(block.chooser(jnp.asarray(x)))
        first = ARRAYS["positions"] == 0
        runs = REAL & ((odds > 0) | first)
        assert runs.sum() < REAL.sum() and runs.sum() > first.sum()
        seen = put_batch(ARRAYS | {"segments": np.where(runs, ARRAYS["segments"], 0)}, mesh).segments
        y = np.asarray(block.block(jnp.asarray(x), dataclasses.replace(context, seen=seen)).x)
    new = np.where(runs[..., None], y, x)
    each = (np.cos(new) * (y - x)).sum(-1) * (1 / (1 + np.exp(-odds))) * (1 / (1 + np.exp(odds)))
    assert float(slope) == pytest.approx(float(each[REAL & ~first].sum()), rel=1e-4)


def test_what_is_skipped_is_not_seen():
    """Changing a token that skips a layer changes no other token."""
    settings, rng = model(always=1).select, np.random.default_rng(0)
    x = rng.normal(size=(ROWS, LENGTH, 16)).astype(np.float32)
    with on_mesh(ONE_DEVICE) as mesh:
        block = settings.around(DenseSpec(d_ff=24).build(jax.random.key(0), BASE), jax.random.key(1), BASE, (0,))
        block.chooser.bias[...] = jnp.float32(-0.1)
        context = Context(batch=put_batch(ARRAYS, mesh), mode="eval")
        skips = REAL & ~(np.asarray(block.chooser(jnp.asarray(x))) > 0) & (ARRAYS["positions"] > 0)
        assert skips.any()
        other = np.where(skips[..., None], x * 1.01, x)
        skips &= ~(np.asarray(block.chooser(jnp.asarray(other))) > 0)
        other = np.where(skips[..., None], other, x)
        for mode in ("eval", "train"):
            context = dataclasses.replace(context, mode=mode)
            left, right = (np.asarray(block(put_rows(each, mesh), context).x) for each in (x, other))
            assert np.array_equal(left[REAL & ~skips], right[REAL & ~skips])


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_decoding_gives_the_logits_of_the_whole_row(execution):
    config, arrays = model(execution=execution), host_batch(2, LENGTH, 32, documents=1, padded=0)
    whole = outcome(config, params(), arrays)
    assert 2 < sum(chosen(whole)) < 2 * 3 * LENGTH
    with on_mesh(ONE_DEVICE):
        forward = on_rows(config, params())
        caches = init_caches(config, 2, LENGTH)
        for start, stop in ((0, 4), *((at, at + 1) for at in range(4, LENGTH))):
            out = forward(cut(arrays, start, stop), caches)
            caches = out.caches
            assert_close(to_numpy(out.logits), whole[0][:, start:stop], 2e-5)
        assert np.asarray(caches["pattern_0"].written).sum(-1).tolist() == chosen(whole)


@pytest.mark.parametrize(
    ("fields", "mesh", "accumulation"),
    [({"scan": False, "remat": "full"}, (1, 1, 1), 2), ({"streams": AltUp(streams=2)}, (2, 2, 2), 2)],
    ids=("unrolled, recomputed, accumulated", "streams on 2x2x2, accumulated"),
)
def test_training_in_parts_and_on_meshes(fields, mesh, accumulation):
    """With noise: rows draw the same wherever they lie."""
    streams = {name: fields[name] for name in fields if name == "streams"}
    config = dataclasses.replace(BASE, **streams)
    given = parted(config)
    whole = results(config, given, LENGTH)
    found = results(dataclasses.replace(config, **fields), given, LENGTH, mesh, accumulation)
    assert_close(found[0], whole[0], 2e-5)
    assert_close(found[2], whole[2], 1e-4, atol=1e-6)
    of = lambda reports: reports["pattern_0"].selection  # noqa: E731
    assert_close(of(found[1]), of(whole[1]), 2e-5)
    tokens = float(of(whole[1]).tokens[0])
    assert 0.2 < of(whole[1]).chosen.sum() / (3 * tokens) < 0.8
    assert 0.2 < of(whole[1]).agreed.sum() / (3 * tokens) < 0.95, "noise should change some choices"
    own = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole[2]) if "chooser" in str(path)]
    assert len(own) == 4 and all(np.abs(leaf).max() > 0 for leaf in own)


def test_reports_and_costs():
    _, reports, _ = results(BASE, params(), LENGTH)
    found = reports["pattern_0"].selection
    row = layer_metrics(BASE, reports, "train")
    assert row["select/keep_fraction"] == pytest.approx(float(found.chosen.sum() / found.tokens.sum()))
    size = 3 * (16 * HIDDEN + HIDDEN)
    cost = component_costs(BASE)["selection"]
    assert (cost.parameters, cost.per_token) == (size + 3 * (HIDDEN + 1), 2 * size)
    pairs = 1e4
    of_token = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 24)
    saved = (found.tokens - found.chosen).sum() * of_token + ((pairs - found.keys) * 4 * 16).sum()
    assert spared_flops(BASE, reports, pairs) == pytest.approx(float(saved))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda: LayerRouting(target=1.5), "target"),
        (lambda: LayerRouting(coefficient=-1.0), "coefficient"),
        (lambda: LayerRouting(always=0), "always"),
        (lambda: LayerRouting(estimator=HardConcrete()), "estimator"),
        (lambda: LayerRouting(estimator=Gumbel(hard=False)), "estimator"),
        (lambda: model(blocks={"first": DenseSpec(), "routed": MoESpec()}), "select.blocks"),
    ],
)
def test_what_cannot_be_is_refused(change, key):
    with pytest.raises(ConfigError) as error:
        change()
    assert error.value.key == key
    assert LayerRouting(estimator=StraightThrough()).estimator.binary
