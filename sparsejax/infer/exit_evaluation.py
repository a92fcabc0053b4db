"""The exit table of a trained model: one pass over the validation split, every exit asked about every token or, of a
classifier, every row."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES, host_rows, make_mesh, shard_batch, to_numpy
from sparsejax.base.structs import Batch
from sparsejax.data.corpus import Corpus, open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.exit_table import ExitTable, concatenate
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import layer_cost, mean_keys
from sparsejax.model.partial import logits_at
from sparsejax.ops.exits import largest_two
from sparsejax.ops.head_loss import pieces
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_corpus, check_platform
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables, abstract_model

Measures = dict[str, Float[Array, "B T E"]]


def exit_table_command(loaded: Loaded[ExperimentConfig], workdir: Path, args: argparse.Namespace) -> int:
    """Writes the exit table of the newest good checkpoint (or `--step`); prints each exit's loss and accuracy as one
    JSON object."""
    path: Path = args.exit_table
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    if not config.model.exits.depths:
        raise RequestError(f"--exit-table={path}: the model has no exits (model.exits=none)")
    if not path.parent.is_dir():
        raise RequestError(f"--exit-table={path}: there is no folder {path.parent}")
    if path.suffix != ".npz":
        raise RequestError(f"--exit-table={path}: its name has to end in .npz")
    corpus = open_corpus(config.data)
    check_corpus(config, corpus)
    mesh = make_mesh(config.mesh)
    check_platform(config, mesh)
    with jax.set_mesh(mesh):
        variables, _, step = restore_variables(config, workdir, mesh, args.step)
        table = table_of(config, variables, corpus, mesh)
    table.save(path)
    exits = {
        f"exit/{depth:02d}": {"cross_entropy": float(loss), "accuracy": float(right), "flops": float(cost)}
        for depth, loss, right, cost in zip(table.depth, table.loss.mean(0), table.correct.mean(0), table.cost)
    }
    print(json.dumps({"step": step, "split": "eval", "examples": len(table), **exits}))
    return 0


def table_of(config: ExperimentConfig, variables: Variables, corpus: Corpus, mesh: jax.sharding.Mesh) -> ExitTable:
    """The table of `eval.batches` batches: an example is a token that has a target, or a row that has a class; its
    `group` is the row. Costs are those of a row of one document. Needs the mesh to be set."""
    rows, parts = host_rows(mesh, config.microbatch_size, 1), config.train.accumulation
    data = eval_batches(corpus, config.data, config.data.batch_size, config.eval.batches, rows, parts)
    run, tables, first = jax.jit(make_measures(config.model)), [], 0
    for batch in data:
        arrays = {name: each[0] for name, each in shard_batch(batch, mesh, 1).items()}
        found = {name: to_numpy(each) for name, each in run(variables, Batch(**arrays)).items()}
        scored = found["loss"].shape[1]
        mask_BT, targets_BT = (to_numpy(arrays[name])[:, :scored] for name in ("loss_mask", "targets"))
        row_BT = np.broadcast_to(np.arange(len(mask_BT))[:, None] + first, mask_BT.shape)
        first += len(mask_BT)
        tables.append(_table(config, found, mask_BT.astype(bool), targets_BT, row_BT))
    return concatenate(tables)


def make_measures(config: ModelConfig) -> Callable[[Variables, Batch], Measures]:
    """`(variables, batch) -> measures` by the names of `ExitTable`, of every token or row at every exit. The logits of
    a whole batch are never there, but those of classes, which are few and among the measures."""
    graph = abstract_model(config)[0]
    depths = (*config.exits.depths, config.num_layers)

    def measures(variables: Variables, batch: Batch) -> Measures:
        model = nnx.merge(graph, variables.params, variables.model_state)
        out = model(batch, mode="eval")
        features = (*out.exits, out.features)
        rows, length = out.features.shape[:2]
        number = pieces(length, rows * classes_of(config) * len(depths))
        cut = lambda a: jnp.moveaxis(a.reshape(rows, number, length // number, *a.shape[2:]), 1, 0)  # noqa: E731

        def of_piece(given: tuple[tuple[Array, ...], Int[Array, "B t"]]) -> Measures:
            features, targets_BT = given
            logits = [logits_at(model, x, depth) for x, depth in zip(features, depths, strict=True)]
            logits = [jax.sharding.reshard(each, P(BATCH_AXES, None, None)) for each in logits]
            more = {} if config.head.of_tokens else {"logits": jnp.stack(logits, -2)}
            return _measured(logits, features, targets_BT) | more

        found = jax.lax.map(of_piece, (jax.tree.map(cut, features), cut(batch.targets[:, :length])))
        whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, length, *a.shape[3:])  # noqa: E731
        return jax.tree.map(whole, found)

    return measures


def _measured(logits: list[Array], features: tuple[Array, ...], targets_BT: Int[Array, "B t"]) -> Measures:
    log_p = [jax.nn.log_softmax(each) for each in logits]
    found: dict[str, list[Array]] = {
        name: [] for name in ("prediction", "loss", "max_prob", "margin", "entropy", "divergence", "similarity")
    }
    for number, log_p_BTV in enumerate(log_p):
        p_BTV = jnp.exp(log_p_BTV)
        best_BT, second_BT = largest_two(p_BTV)
        at_target = targets_BT[..., None] == jnp.arange(p_BTV.shape[-1])
        found["prediction"].append(jnp.argmax(log_p_BTV, -1).astype(jnp.float32))
        found["loss"].append(-jnp.where(at_target, log_p_BTV, 0).sum(-1))
        found["max_prob"].append(best_BT)
        found["margin"].append(best_BT - second_BT)
        found["entropy"].append(-jnp.where(p_BTV > 0, p_BTV * log_p_BTV, 0).sum(-1))
        if number == 0:
            found["divergence"].append(jnp.full_like(best_BT, jnp.inf))
            found["similarity"].append(jnp.full_like(best_BT, -1.0))
            continue
        before = log_p[number - 1]
        middle = jnp.logaddexp(log_p_BTV, before) - jnp.log(2.0)
        halves = [jnp.where(jnp.isfinite(each), jnp.exp(each) * (each - middle), 0) for each in (log_p_BTV, before)]
        found["divergence"].append(jnp.maximum(0.5 * (halves[0] + halves[1]).sum(-1), 0))
        x, y = (each.astype(jnp.float32) for each in features[number - 1 : number + 1])
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        found["similarity"].append((x * y).sum(-1) / jnp.maximum(norms, 1e-30))
    return {name: jnp.stack(values, -1) for name, values in found.items()}


def _table(config: ExperimentConfig, found: dict[str, Any], mask_BT, targets_BT, row_BT) -> ExitTable:
    model, target_N = config.model, targets_BT[mask_BT]
    by_name = {name: values[mask_BT] for name, values in found.items()}
    prediction = by_name.pop("prediction").astype(np.int32)
    depths = np.array([*model.exits.depths, model.num_layers], np.int32)
    return ExitTable(
        cost=exit_flops(model, config.data.sequence_length),
        depth=depths,
        classes=np.asarray(classes_of(model), np.int32),
        target=target_N.astype(np.int32),
        prediction=prediction,
        correct=prediction == target_N[:, None],
        group=row_BT[mask_BT].astype(np.int32),
        **by_name,
    )


def classes_of(config: ModelConfig) -> int:
    """What an exit chooses among: tokens or classes."""
    return config.head.logits(1, 1, config.vocab_size, 1)[1]


def exit_flops(config: ModelConfig, length: int) -> Float[np.ndarray, " E"]:
    """FLOPs of a token that leaves at each exit, with the heads on its way: ideal, of the layers that it runs alone, on
    average over the places of a row of one document. Of a classifier, those of such a row."""
    costs = [layer_cost(config, layer.block).flops(mean_keys(config, length), length) for layer in config.layers]
    head = config.head.cost(config.vocab_size, config.streams.head_width(config.d_model), config.tied_head)
    tokens = 1 if config.head.of_tokens else length
    depths = (*config.exits.depths, config.num_layers)
    heads = tokens * head.per_token + head.per_row
    return np.array([tokens * sum(costs[:depth]) + heads * n for n, depth in enumerate(depths, 1)], np.float64)
