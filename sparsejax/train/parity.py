"""Does the mesh change the numbers? One step's loss, gradients and ledger on several meshes, against one device."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import batches, train_rows
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import routing_arrays
from sparsejax.train.state import init_state, make_optimizer
from sparsejax.train.step import make_grads_of_step

TOLERANCE = 1e-5
"""Largest difference of a float32 gradient, relative to the largest entry of the reference's."""


def parity(config: ExperimentConfig, meshes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The first training step of `config` on each mesh, compared with one device.

    Returns:
      For every mesh, as 'D,E,T': loss, largest relative gradient difference and where it is, and whether the integers of the
      ledger are equal; `equal` says that all of it holds within `TOLERANCE`.
    """
    if not meshes:
        raise RequestError("eval --parity needs at least one --mesh=D,E,T to compare with one device")
    corpus = open_corpus(config.data)
    with contextlib.closing(batches(train_rows(corpus, config.data, config.train.seed), batch_size=config.data.batch_size)) as rows:
        batch = next(rows)
    reference = _first_step(config, (1, 1, 1), batch)
    compared = {",".join(map(str, mesh)): _compare(reference, _first_step(config, mesh, batch)) for mesh in meshes}
    return {"reference_loss": reference["loss"], "meshes": compared, "equal": all(row["equal"] for row in compared.values())}


def _first_step(config: ExperimentConfig, mesh_shape: tuple[int, int, int], batch: dict[str, np.ndarray]) -> dict[str, Any]:
    data, expert, tensor = mesh_shape
    mesh_config = MeshConfig(data=data, expert=expert, tensor=tensor, rules=config.mesh.rules)
    config = dataclasses.replace(config, mesh=mesh_config.resolve(jax.device_count()))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tx = make_optimizer(config)
        state = jax.jit(lambda: init_state(config, tx))()
        arrays = shard_batch(batch, mesh, config.train.accumulation)
        (loss, (_, _, reports)), grads = jax.jit(make_grads_of_step(config))(state.params, state.model_state, arrays, state.step)
    gradients = {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)}
    return {"loss": float(loss), "gradients": gradients, "ledger": routing_arrays(config.model, reports)}


def _compare(reference: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    differences = {
        name: float(np.abs(other["gradients"][name] - value).max() / max(float(np.abs(value).max()), 1e-30))
        for name, value in reference["gradients"].items()
    }
    worst = max(differences, key=lambda name: differences[name])
    integers = [name for name, value in reference["ledger"].items() if np.issubdtype(value.dtype, np.integer)]
    unequal = [name for name in integers if not np.array_equal(reference["ledger"][name], other["ledger"][name])]
    close = abs(other["loss"] - reference["loss"]) <= TOLERANCE * abs(reference["loss"]) and differences[worst] <= TOLERANCE
    return {
        "loss": other["loss"],
        "max_gradient_difference": differences[worst],
        "worst_gradient": worst,
        "unequal_counts": unequal,
        "equal": close and not unequal,
    }
