"""What every kind of halting owes: the paper's numbers, executions that agree, decoding that computes what the whole
row does, nothing random in evaluation, and documents that know nothing of their neighbours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import cut, on_rows, parted, results
from flax import nnx

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.ratios import halting_ratios
from sparsejax.blocks import HALTINGS
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.model.config import ModelConfig
from sparsejax.model.continued import continued
from sparsejax.model.cost import component_costs
from sparsejax.model.exits import ExitHeads
from sparsejax.model.heads import Classes
from sparsejax.model.lm import LanguageModel, init_caches, layer_reports
from sparsejax.train.metrics import layer_metrics, routing_arrays, spared_flops

from reference import halting as slow
from reference import transformer
from support import ONE_DEVICE, assert_close, graph_of, host_batch, on_mesh, put_batch, put_params, to_numpy

LAYERS, LENGTH, ROWS = 4, 12, 4
SETTINGS = {
    "act": {"coefficient": 0.3},
    "ponder_net": {"coefficient": 0.3, "rate": 0.3, "quantile": 0.6},
    "a_vit": {"scale": 2.0, "shift": -0.5, "coefficient": 0.3, "prior": 0.5, "depth": 1.5},
}
KINDS = [name for name in HALTINGS if name != "none"]
NEVER = {"a_vit": {"scale": 0.0, "shift": -100.0}}  # the others have a learned bias
AT_ONCE = {"a_vit": {"scale": 0.0, "shift": 100.0}}


def model(kind="none", execution="compact", **more):
    fields = {name: more.pop(name) for name in list(more) if name in ModelConfig.__dataclass_fields__}
    halting = HALTINGS["none"]() if kind == "none" else HALTINGS[kind](**SETTINGS[kind], execution=execution)
    shape = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 32, "pattern": ("dense",)}
    given = shape | {"repeats": LAYERS, "blocks": {"dense": DenseSpec(d_ff=24)}} | fields
    return ModelConfig(**given, halting=dataclasses.replace(halting, **more))


@functools.cache
def params(kind, tied=False, never=False):
    """Drawn at random, with scores that differ from token to token."""
    found = parted(model(kind, tied_repeats=tied))
    bias = {False: 0.2, True: -100.0}[never]

    def moved(path, leaf):
        name = jax.tree_util.keystr(path)
        if "chooser" not in name:
            return leaf
        return np.full_like(leaf, bias) if "bias" in name else leaf * (0 if never else 5)

    return jax.tree_util.tree_map_with_path(moved, found)


def arrays(documents=2):
    return host_batch(ROWS, LENGTH, 32, documents=documents, padded=3)


@functools.cache
def program(config, mode):
    with on_mesh(ONE_DEVICE):
        graph = graph_of(lambda key: LanguageModel(key, config))

    def call(params, batch):
        lm = nnx.merge(graph, params)
        out = lm(batch, mode=mode)
        return out.logits, layer_reports(config, out.reports)

    return jax.jit(call)


def outcome(config, given, batch=None, mode="eval", program=program):
    with on_mesh(ONE_DEVICE) as mesh:
        on_device = put_params(given, mesh), put_batch(arrays() if batch is None else batch, mesh)
        return to_numpy(program(config, mode)(*on_device))


def reports_of(found):
    return [report.halting for report in found[1].values()]


def real(logits, batch=None):
    return logits[(arrays() if batch is None else batch)["segments"] > 0]


def expected(config, kind, given):
    """The slow model."""
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(given))
    units = plain["stack"]["units"]["blocks"][0]
    stored = [0 if config.tied_repeats else r for r in range(LAYERS)]
    of_layers = [jax.tree.map(lambda leaf, r=r: leaf[r], units) for r in stored]
    batch = arrays()
    settings, table = config.halting, plain["embedding"]["table"]

    def block(of_layer):
        inside = of_layer["block"]
        return lambda x, segments: transformer.block(
            inside, x, batch | {"segments": segments}, config, segments > 0, {}
        )

    def probability(of_layer):
        if kind == "a_vit":
            return lambda x: float(1 / (1 + np.exp(-(settings.scale * x[0] + settings.shift))))
        chooser = of_layer["chooser"]
        return lambda x: float(1 / (1 + np.exp(-(x @ chooser["weight"] + chooser["bias"]))))

    by_quantile = kind == "ponder_net"
    rule = slow.quantile_rule(settings.quantile) if by_quantile else slow.act_rule(settings.epsilon)
    x = np.sqrt(table.shape[1]) * table[batch["tokens"]]
    choosers = [probability(each) for each in of_layers]
    output, *found = slow.layers(
        x, [block(each) for each in of_layers], choosers, batch["segments"], rule, visible=kind != "a_vit"
    )
    return transformer.scores(plain, output, config), *found


@pytest.mark.parametrize("tied", [False, True], ids=["own weights", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_slow_model(kind, tied):
    config = model(kind, tied_repeats=tied)
    logits, depth, seen, last = expected(config, kind, params(kind, tied))
    found = outcome(config, params(kind, tied))
    assert_close(real(found[0]), real(logits).astype(np.float32), 2e-5)
    reports, mask = reports_of(found), arrays()["segments"] > 0
    assert [int(report.halting) for report in reports] == [int((depth[mask] == n + 1).sum()) for n in range(LAYERS)]
    assert [int(report.running) for report in reports] == [int((depth > n).sum()) for n in range(LAYERS)]
    assert len({*depth[mask]}) > 2, "the test should see several depths"
    ratios = halting_ratios(reports)
    assert ratios["halting/mean_depth"] == pytest.approx(depth[mask].mean())
    assert sum(report.weight_sum for report in reports) == pytest.approx(mask.sum())
    if kind == "ponder_net":
        return
    assert ratios["halting/remainder"] == pytest.approx(last[mask].mean(), rel=1e-5)
    totals = dataclasses.make_dataclass("Totals", ["tokens", "microbatches"])(int(mask.sum()), 1)
    terms = config.halting.losses(list(found[1].values()), totals, None)
    assert float(terms["ponder"]) == pytest.approx(0.3 * (depth[mask] + last[mask]).mean(), rel=1e-5)
    if kind == "a_vit":
        p = slow.halting_distribution(seen, LAYERS)
        prior = np.exp(-0.5 * (np.arange(1, LAYERS + 1) - 1.5) ** 2)
        divergence = np.sum(p * np.log(p / (prior / prior.sum())))
        assert float(terms["halting_prior"]) == pytest.approx(0.5 * divergence, rel=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compact_is_masked(kind, causal):
    compact, masked = (outcome(model(kind, how, causal=causal), params(kind)) for how in ("compact", "masked"))
    assert_close((real(compact[0]), compact[1]), (real(masked[0]), masked[1]), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_who_never_halts_is_the_plain_model(kind):
    config = model(kind, **NEVER.get(kind, {}))
    found = outcome(config, params(kind, never=True))
    flat = dict(nnx.to_flat_state(params(kind, never=True)))
    plain = {tuple(p for p in path if p != "block"): leaf for path, leaf in flat.items() if "chooser" not in path}
    given = nnx.from_flat_state(list(plain.items()))
    assert_close(real(found[0]), real(outcome(model(), given)[0]))
    assert [int(report.halting) for report in reports_of(found)][:-1] == [0] * (LAYERS - 1)
    ratios = halting_ratios(reports_of(found))
    assert ratios["halting/weighted_depth"] == pytest.approx(LAYERS) and ratios["halting/last_fraction"] == 1


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_evaluation_is_the_same_every_time(self, kind):
        left, right = (outcome(model(kind), params(kind))[0] for _ in range(2))
        assert np.array_equal(left, right)

    def test_documents_of_a_row_do_not_meet(self, kind):
        given = arrays()
        other = {name: array.copy() for name, array in given.items()}
        other["tokens"][:, LENGTH // 2 :] = (other["tokens"][:, LENGTH // 2 :] + 7) % 32
        first, second = (outcome(model(kind), params(kind), each)[0] for each in (given, other))
        assert_close(second[:, : LENGTH // 2], first[:, : LENGTH // 2])
        assert not np.allclose(second, first)

    def test_rows_do_not_meet(self, kind):
        """The row alone, beside rows that all take another number of layers."""
        given = arrays()
        whole = outcome(model(kind), params(kind), given)[0]
        alone = outcome(model(kind), params(kind), {name: array[1:2] for name, array in given.items()})[0]
        assert_close(alone[0], whole[1], 2e-5)

    def test_no_token_sees_those_after_it(self, kind):
        given = arrays(documents=1)
        later = {name: array.copy() for name, array in given.items()}
        later["tokens"][:, 8:] = (later["tokens"][:, 8:] + 5) % 32
        first, second = (outcome(model(kind), params(kind), each)[0] for each in (given, later))
        assert_close(second[:, :8], first[:, :8])

    @pytest.mark.parametrize("execution", ["compact", "masked"])
    def test_decoding_gives_the_logits_of_the_whole_row(self, kind, execution):
        """A chunk, then token by token."""
        config, batch = model(kind, execution), host_batch(2, LENGTH, 32, documents=1, padded=0)
        whole = outcome(config, params(kind), batch)
        assert 2 * LENGTH > int(reports_of(whole)[-1].running) > 0, "some should run all layers, and some not"
        with on_mesh(ONE_DEVICE):
            forward = on_rows(config, params(kind))
            caches = init_caches(config, 2, LENGTH)
            for start, stop in ((0, 4), *((at, at + 1) for at in range(4, LENGTH))):
                out = forward(cut(batch, start, stop), caches)
                caches = out.caches
                assert_close(to_numpy(out.logits), whole[0][:, start:stop], 2e-5)

    def test_only_what_is_needed_is_computed(self, kind, monkeypatch):
        """Rooms that the layers really ran with."""
        ran, onwards = [], TransformerBlock.onwards

        def recorded(self, x_BSD, *given):
            jax.debug.callback(lambda size=x_BSD.shape[1]: ran.append(size))
            return onwards(self, x_BSD, *given)

        monkeypatch.setattr(TransformerBlock, "onwards", recorded)
        config = model(kind, **AT_ONCE.get(kind, {}))
        of = jax.tree_util.tree_map_with_path(
            lambda path, leaf: np.full_like(leaf, 100) if "chooser" in str(path) and "bias" in str(path) else leaf,
            params(kind, never=True),
        )
        found = outcome(config, of, program=program.__wrapped__)
        jax.effects_barrier()
        assert ran == [LENGTH], "the first layer on all, the others on none"
        assert [int(report.running) for report in reports_of(found)][1:] == [0] * (LAYERS - 1)

    @pytest.mark.parametrize(
        ("fields", "mesh", "accumulation"),
        [
            ({"scan": False, "remat": "full"}, ONE_DEVICE, 2),
            pytest.param({}, (2, 2, 2), 1, marks=pytest.mark.slow),
            ({"tied_repeats": True, "scan": False}, (2, 2, 2), 2),
        ],
        ids=["unrolled, recomputed, accumulated", "2x2x2", "tied on 2x2x2, unrolled, accumulated"],
    )
    def test_training_in_parts_and_on_meshes(self, kind, fields, mesh, accumulation):
        tied = fields.get("tied_repeats", False)
        config = model(kind, tied_repeats=tied)
        given = params(kind, tied)
        found = results(dataclasses.replace(config, **fields), given, LENGTH, mesh, accumulation)
        whole = results(config, given, LENGTH)
        assert_close(found[:2], whole[:2], 2e-5)
        assert_close(found[2], whole[2], 1e-4, atol=1e-6)
        own = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found[2]) if "chooser" in str(path)]
        assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in own)
        assert bool(own) == (kind != "a_vit")

    def test_reports_of_a_model(self, kind):
        config = model(kind)
        _, reports, _ = results(config, params(kind), LENGTH)
        row = layer_metrics(config, reports, "train")
        assert 1 < row["halting/mean_depth"] <= LAYERS and 1 < row["halting/weighted_depth"] < LAYERS
        found = routing_arrays(config, reports)
        halting = [int(found[f"{layer.name}/halting"]) for layer in config.layers]
        assert sum(halting) == found["00_dense/tokens"]
        keys = float(reports["pattern_0"].halting.keys[0])
        spared = spared_flops(config, reports, keys)
        running, seen = reports["pattern_0"].halting.running, reports["pattern_0"].halting.keys
        left = 0 if kind == "a_vit" else 4 * 16 * 2 * 4  # keys and values of those that have halted
        of_token = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 24) + (0 if kind == "a_vit" else 2 * 16) - left
        expected = ((running[0] - running) * of_token).sum() + ((keys - seen) * 2 * 2 * 16).sum()
        assert spared == pytest.approx(float(expected))


@pytest.mark.parametrize("tied", [False, True], ids=["own weights", "tied"])
def test_ponder_net_loses_what_every_step_does(tied):
    """Σ p_n L_n of targets and the divergence of p from the prior, and their gradients by finite differences."""
    kind, batch = "ponder_net", host_batch(8, LENGTH, 32)
    config, given = model(kind, tied_repeats=tied), params(kind, tied)
    loss, reports, (grads,) = results(config, given, LENGTH)

    def slow_loss(given):
        plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(given))
        units, table = plain["stack"]["units"]["blocks"][0], plain["embedding"]["table"]
        x, states, scores = np.sqrt(table.shape[1]) * table[batch["tokens"]], [], []
        for r in range(LAYERS):
            of_layer = jax.tree.map(lambda leaf, r=0 if tied else r: leaf[r], units)
            x = transformer.block(of_layer["block"], x, batch, config, batch["segments"] > 0, {})
            states.append(transformer.scores(plain, x, config))
            scores.append(x @ of_layer["chooser"]["weight"] + of_layer["chooser"]["bias"])
        expected, divergence, prior = 0.0, 0.0, [0.3, 0.3 * 0.7, 0.3 * 0.49, 0.343]
        for b, t in np.argwhere(batch["segments"] > 0):
            p = slow.ponder_distribution([each[b, t] for each in scores])
            divergence += sum(each * np.log(each / q) for each, q in zip(p, prior, strict=True))
            for each, logits in zip(p, states, strict=True):
                log_z = np.log(np.exp(logits[b, t]).sum())
                expected += each * (log_z - logits[b, t, batch["targets"][b, t]]) * batch["loss_mask"][b, t]
        return expected / batch["loss_mask"].sum() + 0.3 * divergence / (batch["segments"] > 0).sum()

    assert float(loss) == pytest.approx(slow_loss(given), rel=1e-5)
    assert float(sum(reports["pattern_0"].halting.weight_sum)) == pytest.approx((batch["segments"] > 0).sum(), rel=1e-5)
    rng = np.random.default_rng(3)
    for names in (("chooser", "bias"), ("chooser", "weight"), ("mlp",), ("table",), ("final_norm",)):

        def way(path, leaf, names=names):
            inside = all(name in jax.tree_util.keystr(path) for name in names)
            return np.cos(np.arange(leaf.size)).reshape(leaf.shape) * inside

        along = jax.tree_util.tree_map_with_path(way, given)
        step = 1e-5 * (1 + rng.random())
        ends = [jax.tree.map(lambda leaf, along, by=by: leaf + by * along, given, along) for by in (step, -step)]
        slope = (slow_loss(ends[0]) - slow_loss(ends[1])) / (2 * step)
        found = sum(np.sum(a * b) for a, b in zip(jax.tree.leaves(grads.dense), jax.tree.leaves(along), strict=True))
        assert float(found) == pytest.approx(slope, rel=2e-3, abs=1e-6), names


def test_what_halting_costs():
    """A score and its bias in each of the layers, however often they are; with PonderNet, a head for every layer."""
    plain, tied = (component_costs(model(tied_repeats=each)) for each in (False, True))
    assert tied["mlp"].parameters * LAYERS == plain["mlp"].parameters
    assert tied["mlp"].per_token == plain["mlp"].per_token
    own, shared = (component_costs(model("act", tied_repeats=each))["halting"] for each in (False, True))
    assert (own.parameters, shared.parameters) == (17 * LAYERS, 17) and own.per_token == 2 * 16 * LAYERS
    assert component_costs(model("ponder_net"))["exit_heads"].per_token == 2 * 3 * 32 * 16
    assert "exit_heads" not in component_costs(model("act"))


def test_weights_that_are_tied_are_one_layer_s():
    """Repeats with equal weights of their own compute the same."""
    tied, own = model("act", tied_repeats=True), model("act")
    given = params("act", tied=True)

    def copied(path, leaf):
        return np.repeat(leaf, LAYERS, axis=0) if "units" in str(path) else leaf

    assert_close(outcome(own, jax.tree_util.tree_map_with_path(copied, given)), outcome(tied, given))


def test_repeats_that_were_trained_apart_cannot_be_tied():
    tied, own = model("act", tied_repeats=True), model("act")
    with on_mesh(ONE_DEVICE) as mesh:
        trained, fresh = put_params(params("act", True), mesh), put_params(params("act"), mesh)
        assert_close(to_numpy(continued(tied, trained, tied, trained)), params("act", True))
        apart = to_numpy(continued(own, fresh, tied, trained))
        assert_close(outcome(own, apart), outcome(tied, params("act", True)))
        with pytest.raises(RequestError, match="trained apart"):
            continued(tied, params("act", True), own, params("act"))


class TestRefused:
    @pytest.mark.parametrize(
        "change, key",
        [
            ({"streams": AltUp(streams=2)}, "halting"),
            ({"exits": ExitHeads(layers=(1,))}, "halting"),
            ({"layer_dropout": 0.1}, "halting"),
            ({"blocks": {"dense": MoESpec()}}, "halting"),
            ({"halting": HALTINGS["ponder_net"](), "causal": False, "head": Classes(classes=3)}, "halting"),
        ],
    )
    def test_what_does_not_go_together(self, change, key):
        with pytest.raises(ConfigError) as error:
            dataclasses.replace(model("act"), **change)
        assert error.value.key == key

    def test_ties_of_what_has_a_state(self):
        with pytest.raises(ConfigError) as error:
            model(blocks={"dense": MoESpec()}, tied_repeats=True)
        assert error.value.key == "tied_repeats"

    @pytest.mark.parametrize(
        "kind, settings, key",
        [
            ("act", {"epsilon": 0.0}, "epsilon"),
            ("act", {"coefficient": -1.0}, "coefficient"),
            ("a_vit", {"deviation": 0.0}, "deviation"),
            ("a_vit", {"prior": -1.0}, "prior"),
            ("ponder_net", {"rate": 1.0}, "rate"),
            ("ponder_net", {"coefficient": -1.0}, "coefficient"),
            ("ponder_net", {"quantile": 1.0}, "quantile"),
        ],
    )
    def test_settings_that_make_no_sense(self, kind, settings, key):
        with pytest.raises(ConfigError) as error:
            HALTINGS[kind](**settings)
        assert error.value.key == key


def test_rows_of_classes_halt_too():
    config = model("act", causal=False, head=Classes(classes=3))
    given = parted(config)
    batch = arrays(documents=1)
    batch["targets"], batch["loss_mask"] = batch["targets"] % 3, (np.arange(LENGTH) == 0) & batch["loss_mask"]
    found = [outcome(dataclasses.replace(config, halting=each), given, batch) for each in both(config.halting)]
    assert_close(*found)
    assert np.isfinite(found[0][0]).all() and jnp.shape(found[0][0]) == (ROWS, 1, 3)


def both(halting):
    return [dataclasses.replace(halting, execution=execution) for execution in ("compact", "masked")]
