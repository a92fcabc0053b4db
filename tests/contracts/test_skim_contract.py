"""What every method of token pruning owes: executions that agree, a class token that stays, nothing that comes back,
nothing random in evaluation, and documents that know nothing of their neighbours."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks import SKIMS
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.heads import Classes
from sparsejax.model.lm import LanguageModel, layer_reports

from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

LAYERS, LENGTH, ROWS = 3, 24, 4
SETTINGS = {
    "ltp": {"threshold": 0.06, "temperature": 0.01},
    "power_bert": {"rate": 1.0},
    "transkimmer": {"bias": 0.2},
    "schedule": {"shares": (1.0, 0.6, 0.3)},
    "tome": {"merge": 0.3},
}
KINDS = [name for name in SKIMS if name != "none"]
LADDER, NARROW = (1.0, 0.95, 0.9), (0.5, 0.4, 0.2)


def skim(kind, **more):
    return SKIMS[kind](**(SETTINGS[kind] | {"stage": "hard"} | more))


def model(kind="none", pool="mean", scan=True, **more):
    return ModelConfig(
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=32,
        pattern=("dense",),
        repeats=LAYERS,
        blocks={"dense": DenseSpec(d_ff=24)},
        causal=False,
        scan=scan and more.get("execution") != "compact",
        head=Classes(classes=3, pool=pool),
        skim=SKIMS["none"]() if kind == "none" else skim(kind, **more),
    )


@functools.cache
def params(kind):
    """Weights large enough that attention differs from token to token."""
    found = host_params(lambda key: LanguageModel(key, model(kind)))

    def moved(path, leaf):
        name = jax.tree_util.keystr(path)
        if "retention" in name:
            return leaf - 4 + np.linspace(2, -2, leaf.shape[-1], dtype=np.float32)
        if any(part in name for part in ("'q'", "'k'", "odds", "hidden'")):
            return leaf * 3
        return leaf

    return jax.tree_util.tree_map_with_path(moved, found)


def arrays(documents=1):
    given = host_batch(ROWS, LENGTH, 32, documents=documents, padded=5)
    given["targets"], given["loss_mask"] = given["targets"] % 3, given["positions"] == 0
    given["loss_mask"] &= np.arange(LENGTH) == 0
    return given


@functools.cache
def program(config, mode, shape, learns):
    with on_mesh(shape):
        graph = graph_of(lambda key: LanguageModel(key, config))

    def loss(params, batch, key):
        lm = nnx.merge(graph, params)
        out = lm(batch, mode=mode, key=key)
        return lm.losses([out], batch).total, (out.logits, layer_reports(config, out.reports))

    if not learns:
        return jax.jit(lambda *given: loss(*given)[1])

    def call(*given):
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(*given)
        return *found, grads

    return jax.jit(call)


def outcome(config, kind, given=None, mode="eval", key=None, shape=ONE_DEVICE, learns=False):
    """(logits, reports of the layers, and, if it learns, gradients of the loss)."""
    with on_mesh(shape) as mesh:
        batch = put_batch(arrays() if given is None else given, mesh)
        return to_numpy(program(config, mode, shape, learns)(put_params(params(kind), mesh), batch, key))


def reports_of(found):
    return [report.skim for report in found[1].values()]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryMethod:
    @pytest.mark.parametrize("ladder", [LADDER, NARROW], ids=["with room", "too narrow"])
    def test_compact_is_masked_in_value_and_gradient(self, kind, ladder):
        mode, learns = ("train", True) if ladder == NARROW else ("eval", False)
        masked = outcome(model(kind, ladder=ladder), kind, mode=mode, learns=learns)
        compact = outcome(model(kind, ladder=ladder, execution="compact"), kind, mode=mode, learns=learns)
        assert_close(compact, masked, 2e-5, atol=1e-7)
        lost = sum(report.unplaced for report in reports_of(masked))
        assert (lost > 0) == (ladder == NARROW)

    def test_something_leaves_and_nothing_comes_back(self, kind):
        kept = [int(report.kept) for report in reports_of(outcome(model(kind), kind))]
        tokens = int((arrays()["segments"] > 0).sum())
        assert ROWS < kept[-1] < tokens, "neither all nor the class tokens alone"
        assert kept == sorted(kept, reverse=True)

    def test_compiled_once_or_unrolled(self, kind):
        assert_close(outcome(model(kind, scan=False), kind), outcome(model(kind), kind))

    def test_the_class_token_stays(self, kind):
        """With room for one token it is that, whose state alone the head then reads."""
        narrow = (1 / LENGTH,) * LAYERS
        by_mean, by_first = (outcome(model(kind, pool, ladder=narrow), kind) for pool in ("mean", "first"))
        assert_close(by_mean[0], by_first[0])
        assert all(report.kept == ROWS for report in reports_of(by_mean)[1:])

    def test_documents_of_a_row_do_not_meet(self, kind):
        """The first document decides the same with another neighbour."""
        given = arrays(documents=2)
        other = {name: array.copy() for name, array in given.items()}
        other["tokens"][:, LENGTH // 2 :] = (other["tokens"][:, LENGTH // 2 :] + 7) % 32
        first, second = (outcome(model(kind, pool="first"), kind, each)[0] for each in (given, other))
        assert np.array_equal(first, second)

    def test_rows_do_not_meet(self, kind):
        given = arrays()
        order = np.array([2, 0, 3, 1])
        whole = outcome(model(kind), kind, given)[0]
        permuted = outcome(model(kind), kind, {name: array[order] for name, array in given.items()})[0]
        assert_close(permuted, whole[order])

    def test_evaluation_needs_no_key_and_is_the_same_every_time(self, kind):
        left, right = (outcome(model(kind, stage="soft"), kind)[0] for _ in range(2))
        assert np.array_equal(left, right)
        assert_close(left, outcome(model(kind), kind)[0])

    def test_soft_training_learns_what_leaves(self, kind):
        config = model(kind, stage="soft")
        grads = outcome(config, kind, mode="train", key=jax.random.key(0), learns=True)[2]
        own = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
        assert all(np.isfinite(leaf).all() for leaf in own.values())
        learned = [leaf for name, leaf in own.items() if "chooser" in name]
        assert bool(learned) == (kind not in ("schedule", "tome")) and all(np.abs(leaf).max() > 0 for leaf in learned)

    @pytest.mark.slow
    def test_on_a_mesh(self, kind):
        config = model(kind, stage="soft")
        run = functools.partial(outcome, config, kind, mode="train", key=jax.random.key(0), learns=True)
        assert_close(run(shape=(2, 2, 2)), run(), 5e-5, atol=1e-7)


KEEPING = {
    "ltp": {"threshold": 1e-9},
    "power_bert": {},
    "transkimmer": {"bias": 100.0},
    "schedule": {"shares": (1.0,) * LAYERS},
    "tome": {"merge": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_who_keeps_all_is_the_plain_model(kind):
    config = dataclasses.replace(model(kind), skim=skim(kind, **KEEPING[kind]))
    given = dict(nnx.to_flat_state(host_params(lambda key: LanguageModel(key, config))))
    plain = {tuple(p for p in path if p != "block"): leaf for path, leaf in given.items() if "chooser" not in path}

    def logits(config, flat):
        with on_mesh(ONE_DEVICE) as mesh:
            graph = graph_of(lambda key: LanguageModel(key, config))
            values = put_params(nnx.from_flat_state(list(flat.items())), mesh)
            return to_numpy(nnx.merge(graph, values)(put_batch(arrays(), mesh), mode="eval").logits)

    assert_close(logits(config, given), logits(model(), plain))


class TestRefused:
    @pytest.mark.parametrize(
        "change, key",
        [
            ({"causal": True}, "skim"),
            ({"head": None}, "skim"),
            ({"attention": "splash"}, "attention"),
            ({"blocks": {"dense": MoESpec()}}, "skim"),
            ({"skim": skim("ltp", ladder=LADDER, execution="compact"), "scan": True}, "skim.execution"),
            ({"skim": skim("ltp", ladder=LADDER, execution="compact"), "remat": "full"}, "skim.execution"),
            ({"skim": skim("ltp", ladder=(1.0, 0.5))}, "skim.ladder"),
            ({"skim": skim("schedule", shares=(1.0, 0.5))}, "skim.shares"),
        ],
    )
    def test_what_does_not_go_together(self, change, key):
        from sparsejax.model.heads import Tokens

        change = change | ({"head": Tokens()} if "head" in change else {})
        with pytest.raises(ConfigError) as error:
            dataclasses.replace(model("ltp"), **change)
        assert error.value.key == key

    @pytest.mark.parametrize(
        "kind, settings, key",
        [
            ("ltp", {"ladder": (0.5, 0.6)}, "ladder"),
            ("ltp", {"ladder": (0.0,)}, "ladder"),
            ("ltp", {"execution": "compact"}, "ladder"),
            ("transkimmer", {"coefficient": -1.0}, "coefficient"),
            ("ltp", {"threshold": 0.0}, "threshold"),
            ("power_bert", {"bins": 0}, "bins"),
            ("schedule", {"shares": (1.5,)}, "shares"),
            ("tome", {"merge": 0.6}, "merge"),
        ],
    )
    def test_settings_that_make_no_sense(self, kind, settings, key):
        with pytest.raises(ConfigError) as error:
            SKIMS[kind](**settings)
        assert error.value.key == key
