"""What `passages/STEP.npz` tells token by token is what the model computed, on any mesh, for every kind of model."""

import dataclasses
import itertools

import numpy as np
import pytest

from sparsejax.base.config import load
from sparsejax.base.errors import ConfigError
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import EvalConfig, ExperimentConfig
from sparsejax.train.evaluate import Evaluator
from sparsejax.train.passages import PLACES, Passages
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables, make_optimizer, new_state
from sparsejax.train.trace import load_trace

from runs import STEPS, here
from support import on_mesh

MANY = 100_000
"""Rows: more than there are."""


def told(config: ExperimentConfig, workdir=None, mesh=(1, 1, 1), passages: int = 8):
    """The arrays for the run in `workdir`, or else for an untrained model."""
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, passages=passages))
    with on_mesh(mesh) as devices:
        if workdir is None:
            state = new_state(config, make_optimizer(config))
            variables = Variables(params=state.params, model_state=state.model_state)
        else:
            variables = restore_variables(config, workdir, devices)[0]
        return Passages(config, open_corpus(config.data), devices)(variables)


@pytest.fixture(scope="module")
def config(finished_run):
    return load(ExperimentConfig, str(finished_run / "config.json")).config


@pytest.fixture(scope="module")
def everything(finished_run, config):
    """Of all rows of the validation split."""
    return told(config, finished_run, passages=MANY)


def test_losses_of_all_rows_are_those_of_the_evaluation(everything, finished_run, config):
    whole = here("eval", f"--workdir={finished_run}", "--config.eval.batches=None").json
    nats, real = everything["nats"], everything["segments"] > 0
    # What follows a row's last token is the next row's first, and not told.
    following = np.isfinite(nats).sum() + real[:, -1].sum()
    assert following - 1 <= whole["targets"] <= following
    assert np.nanmean(nats.astype(np.float64)) == pytest.approx(whole["cross_entropy"], rel=0.01)
    # The loss stands at the token that was predicted: none at the first of a document.
    first = np.diff(everything["segments"], axis=1, prepend=0) != 0
    assert np.isnan(nats[first]).all()


def test_decisions_are_those_of_a_trace(everything, finished_run, tmp_path):
    path = tmp_path / "trace.npz"
    assert here("eval", f"--workdir={finished_run}", "--config.eval.batches=None", f"--trace={path}").status == 0
    trace = load_trace(path)
    rows, layer = len(everything["tokens"]), trace.layers["01_moe"]
    real = everything["segments"] > 0
    assert np.array_equal(np.where(real, everything["tokens"], -1), trace.tokens.reshape(-1, real.shape[1])[:rows])
    experts = layer.experts.reshape(-1, *layer.experts.shape[-2:])[:rows]
    kept = layer.kept.reshape(-1, *experts.shape[1:])[:rows]
    assert np.array_equal(everything["01_moe/experts"][real], experts[real])
    assert np.array_equal(everything["01_moe/processed"][real], (kept & (experts >= 0))[real])


def test_the_file_has_rows_from_several_places_of_the_split(finished_run, config, tmp_path):
    done = here("train", f"--config={finished_run}/config.json", f"--workdir={tmp_path}", "--config.eval.passages=4")
    assert done.status == 0
    files = sorted((tmp_path / "passages").glob("*.npz"), key=lambda path: int(path.stem))
    assert [int(path.stem) for path in files] == [5, 10, STEPS]
    with np.load(files[-1]) as arrays:
        batches = list(eval_batches(open_corpus(config.data), config.data, config.microbatch_size, PLACES))
        assert np.array_equal(arrays["tokens"], np.stack([batch["tokens"][0] for batch in batches]))
        names = arrays["source_names"][arrays["source"][arrays["segments"] > 0]]
        assert len(set(names)) > 1


def test_no_rows_no_file(config, finished_run):
    assert told(config, finished_run, passages=0) == {} and not (finished_run / "passages").exists()
    with pytest.raises(ConfigError, match="passages: -1 is negative"):
        EvalConfig(passages=-1)


def test_a_mesh_tells_the_same(config, finished_run, everything):
    on_eight = told(config, finished_run, mesh=(2, 2, 2), passages=MANY)
    assert set(on_eight) == set(everything)
    for name, array in everything.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(on_eight[name], array, rtol=1e-4, atol=1e-5)
        else:
            assert np.array_equal(on_eight[name], array), name


SMALL = [("data.sequence_length", "16"), ("data.batch_size", "4"), ("model.d_model", "16"), ("model.num_heads", "2")]


def of(name: str, *more: tuple[str, str]):
    """(config of configs/NAME made small, the arrays of an untrained model)."""
    config = load(ExperimentConfig, f"configs/{name}", [*SMALL, *more]).config
    return config, told(config, passages=4)


def test_selection():
    config, arrays = of("mixture_of_depths.py")
    kept = {name: array for name, array in arrays.items() if name.endswith("/kept")}
    assert len(kept) == sum(layer.block == "deep" for layer in config.model.layers) == 2
    for array in kept.values():
        assert array.any() and not array.all()


def test_skimming_takes_tokens_away_layer_by_layer():
    _, arrays = of("tokens_arm.py:fixed")
    kept = [array for name, array in sorted(arrays.items()) if name.endswith("/kept")]
    assert len(kept) > 1 and all((later <= earlier).all() for earlier, later in itertools.pairwise(kept))
    assert 0 < kept[-1].sum() < kept[0].sum() and (kept[0] <= (arrays["segments"] > 0)).all()


def test_halting():
    config, arrays = of("halting.py")
    steps = arrays["halting/steps"]
    assert steps.min() >= 0 and 0 < steps.max() <= config.model.num_layers
    assert not any(name.endswith("/kept") for name in arrays)


def test_exits():
    config, arrays = of("early_exit.py")
    assert list(arrays["exit/layers"]) == [*config.model.exits.depths, config.model.num_layers]
    np.testing.assert_array_equal(arrays["exit/nats"][..., -1], arrays["nats"])
    top = arrays["exit/top"][np.isfinite(arrays["nats"])]
    assert ((top > 0) & (top <= 1)).all()


def test_tables():
    _, arrays = of("lookup_arm.py:lsh-add")
    rows = next(array for name, array in arrays.items() if name.endswith("/rows"))
    assert rows.shape[:2] == arrays["tokens"].shape and (rows >= -1).all() and len(np.unique(rows)) > 1


def test_a_classifier_loses_at_the_first_token():
    _, arrays = of("encoder_classify.py")
    found = np.isfinite(arrays["nats"])
    assert (found.sum(axis=1) == 1).all()


def test_an_encoder_tells_the_text_and_losses_of_what_was_hidden():
    config = load(ExperimentConfig, "configs/encoder_masked.py", [*SMALL, ("data.sequence_length", "64")]).config
    with on_mesh((1, 1, 1)) as mesh:
        state, corpus = new_state(config, make_optimizer(config)), open_corpus(config.data)
        variables = Variables(params=state.params, model_state=state.model_state)
        whole = dataclasses.replace(config, eval=EvalConfig(batches=PLACES, passages=PLACES * config.microbatch_size))
        arrays, evaluated = Passages(whole, corpus, mesh)(variables), Evaluator(whole, corpus, mesh)(variables)
    assert (arrays["tokens"] < 256).all()  # no mask
    assert np.isfinite(arrays["nats"]).sum() == evaluated.row["targets"]
    assert np.nanmean(arrays["nats"].astype(np.float64)) == pytest.approx(evaluated.row["cross_entropy"], rel=1e-5)
