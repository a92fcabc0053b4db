"""Evaluation: a pass over the validation split, and the `eval` command."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import jax
import numpy as np

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RunError
from sparsejax.base.reports import add, to_host
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.base.writers import json_values
from sparsejax.data.corpus import Corpus, open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import Arrays, Row, bits_per_byte, eval_row
from sparsejax.train.parity import parity
from sparsejax.train.record import check_corpus, check_platform, other_corpus
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables
from sparsejax.train.step import EvalReport, make_eval_step


class Evaluator:
    """Evaluates models of one config on the validation split, always the same rows in the same order. One compile."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh):
        self.config, self.corpus, self.mesh = config, corpus, mesh
        self._step: Optional[Callable[..., EvalReport]] = None

    def __call__(
        self, variables: Variables, should_stop: Callable[[], bool] = lambda: False
    ) -> Optional[tuple[Row, Arrays]]:
        """The metrics of a model over `eval.batches` batches, and its routing arrays; None when told to stop."""
        config, total = self.config, None
        rows, parts = host_rows(config.microbatch_size, 1), config.train.accumulation
        # A microbatch at a time, as in training: memory and groups are those of a step.
        data = eval_batches(self.corpus, config.data, config.data.batch_size, config.eval.batches, rows, parts)
        for batch in data:
            if should_stop():
                data.close()
                return None
            arrays = shard_batch(batch, self.mesh, 1)
            if self._step is None:
                self._step = jax.jit(make_eval_step(config)).lower(variables, arrays).compile()
            report = to_host(self._step(variables, arrays))
            total = report if total is None else add(total, report)
        if total is None:
            raise RunError("the evaluation has no batch")
        row, arrays = eval_row(config.model, total)
        if self.corpus.tokenizer.is_bytes:
            row["bits_per_byte"] = bits_per_byte(row["cross_entropy"])
        return row, arrays


def host_rows(batch_size: int, accumulation: int) -> np.ndarray:
    """The rows of a batch that this process reads: of every microbatch, its share, in the mesh's order."""
    share = batch_size // accumulation // jax.process_count()
    first = share * jax.process_index()
    return np.concatenate([m * (batch_size // accumulation) + first + np.arange(share) for m in range(accumulation)])


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
    with jax.set_mesh(mesh):
        variables, progress, step = restore_variables(config, workdir, mesh, args.step)
        evaluated = Evaluator(config, corpus, mesh)(variables)
    assert evaluated is not None  # nothing stops it
    row = evaluated[0]
    row = {"step": step, "split": "eval", **row, "tokens": progress["tokens"], "flops": progress["flops"]}
    flagged = other_corpus(workdir, corpus.info)
    print(json.dumps(json_values(row if flagged is None else {**row, "warning": flagged}), allow_nan=False))
    return 0
