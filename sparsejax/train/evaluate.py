"""Evaluation: a pass over the validation split, and the `eval` command."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Optional

import jax
import numpy as np

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RequestError, RunError
from sparsejax.base.processes import is_first
from sparsejax.base.reports import add, to_host
from sparsejax.base.sharding import host_rows, make_mesh, shard_batch, to_numpy
from sparsejax.base.writers import json_values
from sparsejax.data.corpus import Corpus, open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.memory_metrics import Probe, churn, probed
from sparsejax.train.metrics import Arrays, Row, bits_per_byte, eval_row
from sparsejax.train.parity import parity
from sparsejax.train.record import check_corpus, check_platform, other_corpus
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables
from sparsejax.train.step import EvalReport, make_eval_step
from sparsejax.train.trace import Recording, Trace, check_replay, load_trace, token_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found."""

    row: Row  # of metrics.jsonl
    routing: Arrays  # summed, as in routing/STEP.npz
    sums: Arrays  # of evaluations/STEP.npz: by batch, in their order, `nats` and `targets`


class Evaluator:
    """Evaluates models of one config on the validation split, always the same rows in the same order. One compile."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh):
        self.config, self.corpus, self.mesh = config, corpus, mesh
        self._step: Optional[Callable[..., EvalReport]] = None
        self._probe: Optional[Probe] = None  # of the evaluation before

    def saved(self) -> dict[str, list]:
        """What the next evaluation compares with, as JSON values, for a checkpoint."""
        return {} if self._probe is None else {name: ids.tolist() for name, ids in self._probe.items()}

    def resume(self, saved: dict[str, list]) -> None:
        """Compares with what was `saved`."""
        self._probe = {name: np.asarray(ids, np.int32) for name, ids in saved.items()}

    def __call__(
        self,
        variables: Variables,
        should_stop: Callable[[], bool] = lambda: False,
        recording: Optional[Recording] = None,
        replayed: Optional[Trace] = None,
    ) -> Optional[Evaluated]:
        """Of a model over `eval.batches` batches; None when told to stop.

        Args:
          recording: is given the routers' decisions.
          replayed: decisions on the same rows, which are taken again.
        """
        config, total, probe, sums = self.config, None, {}, []
        rows, parts = host_rows(self.mesh, config.microbatch_size, 1), config.train.accumulation
        # A microbatch at a time, as in training: memory and groups are those of a step.
        data = eval_batches(self.corpus, config.data, config.data.batch_size, config.eval.batches, rows, parts)
        chosen = None if replayed is None else _in_batches(replayed, config.microbatch_size, rows)
        for batch in data:
            if should_stop():
                data.close()
                return None
            if chosen is not None:
                try:
                    batch = {**batch, "experts": _same_rows(chosen, batch)}
                except RequestError:
                    data.close()
                    raise
            arrays = shard_batch(batch, self.mesh, 1)
            if self._step is None:
                step = jax.jit(make_eval_step(config, record=recording is not None))
                self._step = step.lower(variables, arrays).compile()
            report = to_host(self._step(variables, arrays))
            if total is None:
                probe = probed(report.reads or {})
            report = dataclasses.replace(report, reads=None)
            if recording is not None:
                everyones = {name: to_numpy(rows[0]) for name, rows in arrays.items()}
                recording.append(config.model, everyones, report.decisions)
                report = dataclasses.replace(report, decisions=None)
            sums.append((report.cross_entropy_sum, report.targets))
            total = report if total is None else add(total, report)
        if total is None:
            raise RunError("the evaluation has no batch")
        row, arrays = evaluation_row(config, self.corpus, total)
        row |= churn(self._probe, probe)
        self._probe = probe
        return Evaluated(row=row, routing=arrays, sums=_by_batch(sums, parts))


def evaluation_row(config: ExperimentConfig, corpus: Corpus, total: EvalReport) -> tuple[Row, Arrays]:
    """(what `metrics.jsonl` says of a whole pass, its routing arrays) from its summed host report."""
    row, arrays = eval_row(config.model, total)
    places = max(int(total.rows), 1) * config.data.sequence_length
    row = {**row, "padding_fraction": 1 - int(total.tokens) / places}
    if config.data.task.every_token and corpus.tokenizer.is_bytes:
        row["bits_per_byte"] = bits_per_byte(row["cross_entropy"])
    return row, arrays


def _by_batch(sums: list[tuple[np.ndarray, np.ndarray]], parts: int) -> Arrays:
    """Of so many microbatches each; the last batch may have fewer."""
    nats, targets = (np.asarray(each) for each in zip(*sums, strict=True))
    first = np.arange(0, len(sums), parts)
    return {"nats": np.add.reduceat(nats, first), "targets": np.add.reduceat(targets, first)}


def _in_batches(trace: Trace, size: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, experts) of these rows of every `size`."""
    experts = trace.experts()
    for first in range(0, len(experts), size):
        chosen = first + rows[first + rows < len(experts)]
        yield trace.tokens[chosen], experts[chosen]


def _same_rows(chosen: Iterator[tuple[np.ndarray, np.ndarray]], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The experts of the next rows. Raises `RequestError` when these are not the rows of the trace."""
    tokens, experts = next(chosen, (None, None))
    if tokens is None or experts is None or not np.array_equal(tokens, token_ids(batch)):
        raise RequestError(
            "--replay: its rows are not those of this evaluation; data, eval.batches, data.batch_size and "
            "data.sequence_length must be those it was recorded with"
        )
    return experts


def evaluate_command(loaded: Loaded[ExperimentConfig], workdir: Optional[Path], args: argparse.Namespace) -> int:
    """Restores the newest good checkpoint (or `--step`) and prints its metrics as one JSON object.

    With `--parity`, compares meshes instead; the status is 1 when they differ.
    """
    if args.parity:
        result = parity(loaded.config, args.mesh)
        print(json.dumps(json_values(result), allow_nan=False))
        return 0 if result["equal"] else 1
    assert workdir is not None  # the command line sees to it
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    corpus = open_corpus(config.data)
    check_corpus(config, corpus)
    mesh = make_mesh(config.mesh)
    check_platform(config, mesh)
    written: Optional[Path] = args.trace
    _check_writable(written, config)
    replayed = None if args.replay is None else load_trace(args.replay)
    if replayed is not None:
        check_replay(replayed, config)
    with jax.set_mesh(mesh):
        variables, progress, step = restore_variables(config, workdir, mesh, args.step)
        recording = None if written is None else Recording()
        evaluated = Evaluator(config, corpus, mesh)(variables, recording=recording, replayed=replayed)
    if not is_first():
        return 0
    if recording is not None and written is not None:
        recording.trace(config, "eval", step).save(written)
    assert evaluated is not None  # nothing stops it
    row = {"step": step, "split": "eval", **evaluated.row, "tokens": progress["tokens"], "flops": progress["flops"]}
    flagged = other_corpus(workdir, corpus.info)
    print(json.dumps(json_values(row if flagged is None else {**row, "warning": flagged}), allow_nan=False))
    return 0


def _check_writable(trace: Optional[Path], config: ExperimentConfig) -> None:
    """Raises `RequestError` when there is nothing to record, or nowhere to."""
    if trace is None:
        return
    if not trace.parent.is_dir():
        raise RequestError(f"--trace={trace}: there is no folder {trace.parent}")
    if not any(config.model.blocks[layer.block].has_router for layer in config.model.layers):
        raise RequestError(f"--trace={trace}: the model has no routers")
