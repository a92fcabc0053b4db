"""`train --init-from=RUN`: a mixture of experts that begins as the dense run it is made of."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.config import load
from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import MeshConfig
from sparsejax.blocks.upcycling import mixture_of_copies, rescale
from sparsejax.data.corpus import open_corpus
from sparsejax.routers import presets
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw, Renormalized
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.upcycle import begin_from

from runs import CONFIG, SMALL, arguments, contents, here, losses
from support import on_mesh


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """The folder of a run without experts; its two layers are a pattern."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    words = arguments("train", f"--workdir={workdir}", model__pattern="(dense,)", model__repeats=2, train__steps=6)
    assert here(*words).status == 0
    return workdir


@pytest.fixture(scope="module")
def upcycled(dense_run, tmp_path_factory):
    """(the folder of a run that began from it, what that printed). Its second layer has experts."""
    workdir = tmp_path_factory.mktemp("upcycled") / "run"
    done = here(*arguments("train", f"--workdir={workdir}", f"--init-from={dense_run}"))
    assert done.status == 0, done.err
    return workdir, done.out


def receipt(workdir):
    return json.loads((workdir / "upcycling.json").read_text())


def test_the_receipt_says_that_the_function_is_kept(upcycled, dense_run):
    workdir, printed = upcycled
    said = receipt(workdir)
    assert (said["run"], said["step"]) == (str(dense_run), 6)
    assert said["logit_difference"]["generate"] <= 1e-5 * said["largest_logit"]
    # A fresh router is far from even: training has too few slots, and the receipt does not hide it.
    assert said["logit_difference"]["train"] > 1e-3 * said["largest_logit"]
    assert f"begun from checkpoint 6 of {dense_run}\n" in printed
    assert f"{said['logit_difference']['generate']:.3g} with a slot for every token" in printed


def test_training_goes_on(upcycled, dense_run):
    workdir, _ = upcycled
    after = losses(workdir)
    assert list(after) == [1, 4, 8, 12] and after[12] < after[1]
    # Where the dense run was, up to what is dropped and the balance losses, and not where a new model begins.
    assert after[1] < losses(dense_run)[1]


def test_the_same_command_resumes(upcycled, dense_run, tmp_path):
    workdir = shutil.copytree(upcycled[0], tmp_path / "copy")
    before = contents(workdir)
    done = here(*arguments("train", f"--workdir={workdir}", f"--init-from={dense_run}"))
    assert done.status == 0 and "--init-from is not read again" in done.out and "finished" in done.out
    assert contents(workdir)["upcycling.json"] == before["upcycling.json"]


@pytest.mark.parametrize(("width", "shape", "kept"), [(32, (2, 2, 2), True), (16, (1, 1, 1), False)])
def test_granular(dense_run, width, shape, kept):
    """k = 2 takes both halves of a network, but only two of its four quarters."""
    settings = SMALL | {"model.blocks.moe.d_ff": width}
    config = load(ExperimentConfig, CONFIG.removeprefix("--config="), [(k, str(v)) for k, v in settings.items()]).config
    data, expert, tensor = shape
    config = dataclasses.replace(config, mesh=MeshConfig(data=data, expert=expert, tensor=tensor))
    with on_mesh(shape) as mesh:
        said = begin_from(dense_run, config, open_corpus(config.data), mesh).receipt
    assert (said["logit_difference"]["generate"] <= 1e-5 * said["largest_logit"]) == kept


@pytest.mark.parametrize("pool", ["first", "prefix_mean"])
def test_the_receipt_of_a_model_that_cannot_generate(dense_run, pool):
    """A slot for every token, in whole documents."""
    settings = SMALL | {
        "model.blocks.moe.router.logits": "by_sequence",
        "model.blocks.moe.router.logits.pool": pool,
    }
    config = load(ExperimentConfig, CONFIG.removeprefix("--config="), [(k, str(v)) for k, v in settings.items()]).config
    with on_mesh((1, 1, 1)) as mesh:
        said = begin_from(dense_run, config, open_corpus(config.data), mesh).receipt
    assert said["logit_difference"]["generate"] <= 1e-5 * said["largest_logit"]


MEMORIES = {
    "model.pattern": "(dense,)",
    "model.repeats": 2,
    "model.memory.ids": "lookup",
    "model.memory.ids.blocks": "(dense,)",
    "model.memory.ids.consume": "concat",
    "model.memory.states": "lookup",
    "model.memory.states.address": "hyperplanes",
    "model.memory.states.blocks": "(dense,)",
    "model.memory.ngrams": "lookup",
    "model.memory.ngrams.address": "n_grams",
    "model.memory.ngrams.consume": "gated_add",
    "model.memory.ngrams.place": "embedding",
}


@pytest.fixture(scope="module")
def with_memories(dense_run, tmp_path_factory):
    """The folder of a run with memories that began from the run without, on two devices."""
    workdir = tmp_path_factory.mktemp("memories") / "run"
    done = here(*arguments("train", f"--workdir={workdir}", f"--init-from={dense_run}", **MEMORIES, mesh__data=2))
    assert done.status == 0, done.err
    return workdir


def test_memories_that_a_run_gets_change_nothing_at_first(with_memories, dense_run):
    said = receipt(with_memories)
    assert (said["run"], said["step"]) == (str(dense_run), 6)
    assert set(said["logit_difference"].values()) == {0.0} and said["largest_logit"] > 0
    after = losses(with_memories)
    assert after[12] < after[1] < losses(dense_run)[1]


def test_a_run_with_tables_resumes_and_generates(with_memories, dense_run, tmp_path):
    """From a checkpoint in the middle the same losses again, which takes tables and their moments; and text."""
    workdir = shutil.copytree(with_memories, tmp_path / "run")
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > 6:
            shutil.rmtree(folder)
    done = here(*arguments("train", f"--workdir={workdir}", f"--init-from={dense_run}", **MEMORIES, mesh__data=2))
    assert done.status == 0 and "resumed" in done.out, done.err
    assert losses(workdir) == losses(with_memories)
    made = here("generate", f"--workdir={workdir}", "--prompt=a b", "--max-tokens=4", "--format=json")
    assert made.status == 0 and made.json


def test_a_memory_of_another_form_is_no_continuation(with_memories, dense_run):
    """The table of a memory that the run has must fit, as all arrays do."""
    settings = SMALL | MEMORIES | {"model.memory.ids.content.size": 4}
    pairs = [(key, str(value)) for key, value in settings.items()]
    config = load(ExperimentConfig, CONFIG.removeprefix("--config="), pairs).config
    with on_mesh((1, 1, 1)) as mesh, pytest.raises(RequestError, match="tables/ids/rows"):
        begin_from(with_memories, config, open_corpus(config.data), mesh)


D, F, E = 3, 8, 6
MLP, EXPERTS = "feed_forward/mlp", "feed_forward/experts"


def arrays(shapes: Mapping[str, tuple[int, ...]]):
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def dense_block(more: Mapping[str, tuple[int, ...]] = MappingProxyType({}), width: int = F):
    matrices = {f"{MLP}/w_in/weight": (D, width), f"{MLP}/w_out/weight": (width, D)}
    return arrays({"attention/q": (D, D)} | matrices | dict(more))


def moe_block(more: Mapping[str, tuple[int, ...]] = MappingProxyType({}), width: int = F):
    matrices = {f"{EXPERTS}/w_in": (E, D, width), f"{EXPERTS}/w_out": (E, width, D), "feed_forward/router": (D, E)}
    return arrays({"attention/q": (D, D)} | matrices | dict(more))


def test_every_expert_is_a_copy():
    fresh, trained = moe_block({"feed_forward/shared/w_in/weight": (D, F)}), dense_block()
    new = mixture_of_copies(fresh, trained, RouterConfig(), E)
    assert set(new) == set(fresh)
    for e in range(E):
        assert np.array_equal(new[f"{EXPERTS}/w_in"][e], trained[f"{MLP}/w_in/weight"])
        assert np.array_equal(new[f"{EXPERTS}/w_out"][e], trained[f"{MLP}/w_out/weight"])
    for name in ("feed_forward/router", "feed_forward/shared/w_in/weight"):
        assert np.array_equal(new[name], fresh[name])
    assert np.array_equal(new["attention/q"], trained["attention/q"])


def test_columns_of_experts_without_a_network_stay():
    fresh = moe_block(width=F // 2) | arrays({"feed_forward/router": (D, E + 2)})
    new = mixture_of_copies(fresh, dense_block(), RouterConfig(), E + 2)["feed_forward/router"]
    assert np.array_equal(new[:, :E:2], new[:, 1:E:2]) and not np.array_equal(new[:, :2], new[:, 2:4])
    assert np.array_equal(new[:, E:], fresh["feed_forward/router"][:, E:])


def test_shards_are_whole_copies_within_a_virtual_group():
    fresh, trained = moe_block(width=F // 2), dense_block()
    new = mixture_of_copies(fresh, trained, RouterConfig(), E)
    for first in range(0, E, 2):
        whole_in = np.concatenate(new[f"{EXPERTS}/w_in"][first : first + 2], axis=1)
        assert np.array_equal(whole_in, trained[f"{MLP}/w_in/weight"])
        whole_out = np.concatenate(new[f"{EXPERTS}/w_out"][first : first + 2], axis=0)
        assert np.array_equal(whole_out, 2 * trained[f"{MLP}/w_out/weight"])
        one, other = new["feed_forward/router"][:, first], new["feed_forward/router"][:, first + 1]
        assert np.array_equal(one, other) and np.array_equal(one, fresh["feed_forward/router"][:, first // 2])


@pytest.mark.parametrize(
    ("router", "shards", "factor"),
    [
        (RouterConfig(), 1, 1.0),
        (RouterConfig(selection=TopK(k=4), weight=Renormalized(scale=2.5)), 2, 0.8),
        # Probabilities of 1/E each: the factor E m / k of arXiv:2410.07524.
        (RouterConfig(selection=TopK(k=1), weight=Raw()), 1, 8.0),
        (RouterConfig(selection=TopK(k=4), weight=Raw()), 2, 4.0),
        (presets.expert_choice(), 1, 4.0),
        (presets.hash(), 2, 2.0),
    ],
)
def test_rescale_is_that_of_equal_logits(router, shards, factor):
    assert rescale(router, 8, shards) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("fresh", "trained", "parts"),
    [
        (
            moe_block(width=3),
            dense_block(),
            [f"{MLP}/w_in/weight float32[3, 8] does not make {EXPERTS}/w_in float32[6, 3, 3]", "divisor"],
        ),
        (moe_block(width=2), dense_block(), [f"{MLP}/w_in/weight float32[3, 8]", "float32[6, 3, 2]"]),  # 4 shards
        (moe_block(width=16), dense_block(), [f"{MLP}/w_in/weight float32[3, 8]", "float32[6, 3, 16]"]),
        (moe_block(), dense_block({"attention/q": (D, 5)}), ["its attention/q is float32[3, 5], not float32[3, 3]"]),
        (
            moe_block({f"{EXPERTS}/w_gate": (E, D, F)}),
            dense_block(),
            [f"it lacks {MLP}/w_gate/weight, of which {EXPERTS}/w_gate float32[6, 3, 8]"],
        ),
        (
            moe_block(),
            dense_block({f"{MLP}/w_gate/weight": (D, F)}),
            [f"its {MLP}/w_gate/weight float32[3, 8] has no place"],
        ),
        (moe_block(), dense_block({"attention/bias": (D,)}), ["its attention/bias float32[3] has no place"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(fresh, trained, parts):
    with pytest.raises(RequestError) as error:
        mixture_of_copies(fresh, trained, RouterConfig(), E)
    assert all(part in str(error.value) for part in parts)


def with_other_tokenizer(run):
    record = json.loads((run / "config.json").read_text())
    record["environment"]["corpus"]["tokenizer"] = "0123456789abcdef"
    (run / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "overrides", "parts"),
    [
        (lambda run: (run / "config.json").unlink(), {}, ["not the folder of a run (it has no config.json)"]),
        (lambda run: shutil.rmtree(run / "checkpoints"), {}, ["no checkpoint in "]),
        (with_other_tokenizer, {}, ["the tokenizer (data.tokenizer) is not the one of the run", "0123456789ab"]),
        (None, {"model__repeats": 2}, ["it has 2 layers, and config.model has 4"]),
        (
            None,
            {"model__blocks__moe__d_ff": 24},
            ["layer 01_moe: its feed_forward/mlp/w_in/weight float32[16, 64] does not make", "float32[8, 16, 24]"],
        ),
        (None, {"model__d_model": 32}, ["its embedding/table is float32[256, 16], not float32[256, 32]"]),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(dense_run, tmp_path, spoil, overrides, parts):
    run, workdir = dense_run, tmp_path / "new"
    if spoil is not None:
        spoil(run := shutil.copytree(dense_run, tmp_path / "spoiled"))
    error = here(*arguments("train", f"--workdir={workdir}", f"--init-from={run}", **overrides)).error
    assert all(part in error for part in [f"--init-from={run}: ", *parts]), error
    assert not workdir.exists()


def test_a_folder_with_another_run_is_left_alone(dense_run, upcycled, tmp_path):
    for held, words in ((dense_run, "did not begin from another run"), (upcycled[0], f"began from {dense_run}")):
        workdir = shutil.copytree(held, tmp_path / held.parent.name)
        before = contents(workdir)
        error = here(*arguments("train", f"--workdir={workdir}", f"--init-from={tmp_path / 'other'}")).error
        assert words in error and "use another --workdir" in error
        assert contents(workdir) == before
