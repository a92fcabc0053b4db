"""Does the mesh change the numbers? One step's loss, gradients and ledger on several meshes, against one device."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import batches, train_rows
from sparsejax.nn.table import summed_rows
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import routing_arrays
from sparsejax.train.record import check_corpus, check_platform
from sparsejax.train.state import make_optimizer, new_state
from sparsejax.train.step import make_grads_of_step

TOLERANCE = 1e-5
"""Largest difference of a float32 gradient, relative to the largest entry of the reference's."""


def parity(config: ExperimentConfig, meshes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The first training step of `config` on each mesh, compared with one device.

    Returns:
      For every mesh, as 'D,E,T': loss, largest relative gradient difference and where it is, and the counts of the
      ledger that are not equal; `equal` says that there are none and the rest is within `TOLERANCE`.

    Raises:
      RequestError: no mesh is given, or the config does not fit one of them.
    """
    if not meshes:
        raise RequestError("eval --parity needs at least one --mesh=D,E,T to compare with one device")
    reference_config, *others = [_on_mesh(config, mesh) for mesh in [(1, 1, 1), *meshes]]
    corpus = open_corpus(config.data)
    check_corpus(reference_config, corpus)
    with contextlib.closing(
        batches(train_rows(corpus, config.data, config.train.seed), batch_size=config.data.batch_size)
    ) as rows:
        batch = next(rows)
    reference = _first_step(reference_config, batch)
    compared = {",".join(map(str, each.mesh.shape)): _compare(reference, _first_step(each, batch)) for each in others}
    return {
        "reference_loss": reference["loss"],
        "meshes": compared,
        "equal": all(row["equal"] for row in compared.values()),
    }


def _on_mesh(config: ExperimentConfig, shape: tuple[int, int, int]) -> ExperimentConfig:
    """`config` on a mesh of this shape. Raises `ConfigError` when it does not fit there."""
    data, expert, tensor = shape
    mesh = dataclasses.replace(config.mesh, data=data, expert=expert, tensor=tensor)
    config = dataclasses.replace(config, mesh=mesh.resolve(jax.device_count()))
    check_platform(config, make_mesh(config.mesh))
    return config


def _first_step(config: ExperimentConfig, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tx = make_optimizer(config)
        state = jax.block_until_ready(new_state(config, tx))
        arrays = shard_batch(batch, mesh, config.train.accumulation)
        (loss, (*_, reports, _)), grads = jax.jit(make_grads_of_step(config))(
            state.params, state.model_state, arrays, state.step
        )
    dense = nnx.to_flat_state(grads.dense)
    gradients = {".".join(map(str, path)): np.asarray(value[...]) for path, value in dense}
    gradients |= {f"tables.{name}": summed_rows(read) for name, read in grads.rows.items()}
    return {"loss": float(loss), "gradients": gradients, "ledger": _ledger(routing_arrays(config.model, reports))}


def _ledger(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The counts of what became of tokens and pairs. Where a dropless layer computed them is the devices' affair."""
    dropless = {name.removesuffix("block_rows") for name in arrays if name.endswith("/block_rows")}
    devices = {layer + name for layer in dropless for name in ("block_rows", "slots")}
    integers = [name for name, value in arrays.items() if np.issubdtype(value.dtype, np.integer)]
    return {name: arrays[name] for name in integers if name not in devices and "/exchange/" not in name}


def _compare(reference: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    differences = {
        name: float(np.abs(other["gradients"][name] - value).max() / max(float(np.abs(value).max()), 1e-30))
        for name, value in reference["gradients"].items()
    }
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    unequal = [name for name, count in reference["ledger"].items() if not np.array_equal(count, other["ledger"][name])]
    close = (
        abs(other["loss"] - reference["loss"]) <= TOLERANCE * abs(reference["loss"]) and differences[worst] <= TOLERANCE
    )
    return {
        "loss": other["loss"],
        "max_gradient_difference": differences[worst],
        "worst_gradient": worst,
        "unequal_counts": unequal,
        "equal": close and not unequal,
    }
