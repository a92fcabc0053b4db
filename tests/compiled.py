"""What tests of whole models share, which are compiled in several ways: random parameters, a step, rows with caches."""

import jax
import numpy as np
from flax import nnx

from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import Masked, NextToken
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.state import abstract_model
from sparsejax.train.step import make_grads_of_step

from support import host_batch, put_batch, put_params, to_numpy

ROWS = 8


def parted(model):
    """Host parameters drawn at random, coefficients, too."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(MeshConfig())):
        _, params, _ = abstract_model(model)
    ones = ("scale", "correction", "prediction")
    begin = lambda path: 1.0 if any(name in str(path) for name in ones) else 0.0  # noqa: E731
    value = lambda path, leaf: (rng.normal(size=leaf.shape) * 0.2 + begin(path)).astype(np.float32)  # noqa: E731
    return jax.tree_util.tree_map_with_path(value, params)


def results(model, params, length, mesh=(1, 1, 1), accumulation=1):
    """(loss, reports, gradients) of a step on eight rows."""
    task = NextToken() if model.causal else Masked()
    data = DataConfig(name="synthetic", batch_size=ROWS, sequence_length=length, task=task)
    along = MeshConfig(data=mesh[0], expert=mesh[1], tensor=mesh[2])
    config = ExperimentConfig(model=model, data=data, mesh=along, train=TrainConfig(accumulation=accumulation))
    mesh = make_mesh(along)
    with jax.set_mesh(mesh):
        batch = shard_batch(host_batch(ROWS, length, model.vocab_size), mesh, accumulation)
        state = abstract_model(model)[2]
        step = jax.jit(lambda params, batch: make_grads_of_step(config)(params, state, batch, 0))
        (loss, (*_, reports, _)), *grads = to_numpy(step(put_params(params, mesh), batch))
        return loss, reports, grads


def on_rows(model, params):
    """`(batch, caches) -> ModelOutput`, compiled."""
    mesh = jax.sharding.get_mesh()
    graph, _, state = abstract_model(model)
    forward = jax.jit(
        lambda params, batch, caches=None: nnx.merge(graph, params, state)(batch, mode="generate", caches=caches)
    )
    return lambda arrays, *caches: forward(put_params(params, mesh), put_batch(arrays, mesh), *caches)


def cut(arrays, start, stop):
    return {name: array[:, start:stop] if array.ndim == 2 else array for name, array in arrays.items()}
