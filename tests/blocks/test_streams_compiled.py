"""Models with several streams, however they are compiled: unrolled, recomputed, in microbatches, on a mesh, with a
cache. The streams have parted: coefficients are not what they are at first."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.ratios import stream_ratios
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.blocks.altup import AltUp, DynamicAltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.hyper_connections import HyperConnections, ManifoldHyperConnections
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches, layer_reports
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.metrics import layer_metrics
from sparsejax.train.state import abstract_model
from sparsejax.train.step import make_grads_of_step

from support import assert_close, host_batch, put_batch, put_params, to_numpy

ROWS, LENGTH, VOCAB = 8, 32, 32
WIDE = AltUp(streams=2, embedding="wide", collapse="concatenate")
BASE = ModelConfig(
    d_model=16,
    num_heads=2,
    vocab_size=VOCAB,
    prefix=("dense",),
    pattern=("dense", "moe"),
    repeats=2,
    blocks={"dense": DenseSpec(d_ff=16), "moe": MoESpec(num_experts=4, d_ff=8, eval_capacity_factor=4.0)},
    streams=WIDE,
)


def experiment(model, mesh=(1, 1, 1), accumulation=1):
    data = DataConfig(name="synthetic", batch_size=ROWS, sequence_length=LENGTH)
    train = TrainConfig(accumulation=accumulation)
    return ExperimentConfig(model=model, data=data, train=train, mesh=_mesh(mesh))


def _mesh(shape):
    return MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2])


def parted(model):
    """Host parameters drawn at random, coefficients, too."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(MeshConfig())):
        _, params, _ = abstract_model(model)
    begin = lambda path: 1.0 if "scale" in str(path) else 0.0  # noqa: E731

    def value(path, leaf):
        drawn = rng.normal(size=leaf.shape) * 0.2
        if "transition" in str(path):
            drawn += np.eye(leaf.shape[-1])
        if "correction" in str(path) or "output" in str(path):
            drawn += 1
        return (drawn + begin(path)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, params)


def results(config, params):
    """(loss, terms, reports, gradients) of a step."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = shard_batch(host_batch(ROWS, LENGTH, VOCAB), mesh, config.train.accumulation)
        state = abstract_model(config.model)[2]
        step = jax.jit(lambda params, batch: make_grads_of_step(config)(params, state, batch, 0))
        (loss, (_, _, terms, reports, _)), *grads = to_numpy(step(put_params(params, mesh), batch))
        return loss, terms, reports, grads


def comparable(found):
    """All but the reports of experts, in which a balance counts once for every microbatch."""
    loss, terms, reports, grads = found
    return loss, terms, {position: report.streams for position, report in reports.items()}, grads


@pytest.fixture(scope="module")
def scanned():
    params = parted(BASE)
    return params, results(experiment(BASE), params)


@pytest.mark.parametrize(
    "fields",
    [
        {"scan": False},
        {"remat": "full"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        {"remat": "names", "remat_names": ("attention", "mlp")},
        {"accumulation": 2},
        {"mesh": (2, 2, 2)},
        {"mesh": (4, 2, 1), "remat": "full"},
    ],
    ids=str,
)
def test_loss_gradients_and_reports_are_the_same(scanned, fields):
    params, expected = scanned
    around = {key: fields[key] for key in ("accumulation", "mesh") if key in fields}
    inside = {key: value for key, value in fields.items() if key not in around}
    config = experiment(dataclasses.replace(BASE, **inside), **around)
    assert_close(comparable(results(config, params)), comparable(expected), 2e-5)


def test_the_streams_have_parted_and_are_reported(scanned):
    _, (_, _, reports, grads) = scanned
    layers = layer_reports(BASE, reports)
    assert all(stream_ratios(layer.streams)["altup/effective_streams"] > 1.05 for layer in layers.values())
    row = layer_metrics(BASE, reports, "train")
    assert {"altup/stream_cosine", "altup/innovation", "altup/effective_streams", "altup/gain"} <= set(row)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("streams", [DynamicAltUp(streams=3), HyperConnections(streams=3), ManifoldHyperConnections()])
def test_other_residuals_on_a_mesh(streams):
    model = dataclasses.replace(BASE, streams=streams)
    params = parted(model)
    here, there = (results(experiment(model, mesh=shape), params) for shape in ((1, 1, 1), (2, 2, 2)))
    assert_close(comparable(there), comparable(here), 5e-5, atol=5e-6)  # some gradients cancel to nothing


@pytest.mark.parametrize(
    "streams", [WIDE, AltUp(streams=4, select="random"), DynamicAltUp(streams=3), ManifoldHyperConnections()], ids=str
)
def test_decoding_step_by_step_gives_the_logits_of_the_whole_row(streams):
    model, length = dataclasses.replace(BASE, streams=streams), 6
    arrays = host_batch(2, length, VOCAB, documents=1, padded=0)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        graph, _, state = abstract_model(model)
        params = put_params(parted(model), mesh)
        forward = jax.jit(lambda params, batch, caches=None: _forward(graph, params, state, batch, caches))
        whole = to_numpy(forward(params, put_batch(arrays, mesh)).logits)
        caches = jax.jit(lambda: init_caches(model, 2, length))()
        for at in range(length):
            one = {name: a[:, at : at + 1] if a.ndim == 2 else a for name, a in arrays.items()}
            out = forward(params, put_batch(one, mesh), caches)
            caches = out.caches
            assert_close(to_numpy(out.logits)[:, 0], whole[:, at])


def _forward(graph, params, state, batch, caches):
    return nnx.merge(graph, params, state)(batch, mode="generate", caches=caches)
