"""`eval --exit-rule`: a classifier whose rows leave early, evaluated and timed."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Optional

import jax
import numpy as np

from sparsejax.base.config import Loaded
from sparsejax.base.errors import ConfigError, RequestError, did_you_mean
from sparsejax.base.reports import add
from sparsejax.base.sharding import make_mesh
from sparsejax.base.writers import json_values
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.encoder_exit import ExitingEncoder, check_encoder, ladder_of
from sparsejax.infer.encoder_report import EncoderReport, as_row, reported
from sparsejax.infer.exit_rules import RULES, ExitRule
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_corpus, check_platform
from sparsejax.train.restore import restore_variables

WANTING = {
    "learned": "the scores of a learned exit head",
    "q_exit": "the scores of a learned exit head",
    "calibrated": "temperatures that were fitted on an exit table",
}
"""Rules that need what a run does not hold."""


def encoder_exit_command(loaded: Loaded[ExperimentConfig], workdir: Path, args: argparse.Namespace) -> int:
    """Evaluates the newest good checkpoint (or `--step`) with rows that leave by `--exit-rule`; prints accuracy, exits,
    FLOPs and throughput, without compilation, as one JSON object."""
    if args.exit_policy is not None:
        raise RequestError("--exit-policy has no effect on a classifier, whose rows leave nothing behind")
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    rule = read_rule(args.exit_rule, args.exit_threshold)
    mesh, length = make_mesh(config.mesh), config.data.sequence_length
    with jax.set_mesh(mesh):
        check_encoder(config.model, length)
    corpus = open_corpus(config.data)
    check_corpus(config, corpus)
    check_platform(config, mesh)
    with jax.set_mesh(mesh):
        variables, _, step = restore_variables(config, workdir, mesh, args.step)
        ladder = ladder_of(config.microbatch_size, config.mesh.batch_shards)
        encoder = ExitingEncoder(config.model, variables, length, ladder)
        size, parts = config.data.batch_size, config.train.accumulation
        data = eval_batches(corpus, config.data, size, config.eval.batches, parts=parts)
        total = over(encoder, data, rule)
    chosen = {"name": args.exit_rule, **vars(rule)}
    row = {"step": step, "split": "eval", "exit_rule": chosen, **as_row(config.model, total)}
    print(json.dumps(json_values(row), allow_nan=False))
    return 0


def over(encoder: ExitingEncoder, data: Iterator[Mapping[str, np.ndarray]], rule: ExitRule) -> EncoderReport:
    """Sums over batches, of which there is at least one."""
    return functools.reduce(add, (reported(encoder.config, batch, encoder(batch, rule)) for batch in data))


def read_rule(name: str, threshold: Optional[float]) -> ExitRule:
    """The rule of the flags, with its own default where there is no threshold; that of patience is how many exits have
    to agree. Raises `RequestError` for one that there is not, or that a run has not what it needs for."""
    known = [each for each in RULES if each not in WANTING]
    if name in WANTING:
        raise RequestError(f"exit rule {name}: it needs {WANTING[name]}; allowed here: {', '.join(known)}")
    if name not in RULES:
        raise RequestError(f"exit rule {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    if threshold is None:
        return RULES[name]()
    try:
        if name != "patience":
            return RULES[name](threshold=threshold)
        if threshold != int(threshold):
            raise ConfigError("patience", f"{threshold} is not a number of exits")
        return RULES[name](patience=int(threshold))
    except (ConfigError, OverflowError) as error:
        told = error.message if isinstance(error, ConfigError) else f"{threshold} is not finite"
        raise RequestError(f"--exit-threshold={threshold:g} with --exit-rule={name}: {told}") from None
