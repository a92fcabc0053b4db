"""`eval --exit-rule` of a decoder: rows of the validation split, scored as generation with early exits meets them."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import make_mesh
from sparsejax.base.writers import json_values
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.decode_cost import decode_flops
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import bits_per_byte
from sparsejax.train.record import check_corpus, check_platform
from sparsejax.train.restore import restore_variables


def exit_score_command(loaded: Loaded[ExperimentConfig], workdir: Path, args: argparse.Namespace) -> int:
    """Decodes the rows of `eval.batches` batches token by token from the newest good checkpoint (or `--step`), every
    row as one text, and prints what they lose, where tokens left, FLOPs and speed, as one JSON object."""
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    if args.exit_policy == "monotone":
        raise RequestError("--exit-policy=monotone asks no rule; its depth falls with the number of sampled tokens")
    told = {"threshold": args.exit_threshold, "keys": args.exit_policy}
    how = EarlyExit(rule=args.exit_rule, **{name: value for name, value in told.items() if value is not None})
    generator = Generator(config.model, Sampling(temperature=0), decoding=how)
    mesh, corpus = make_mesh(config.mesh), open_corpus(config.data)
    check_corpus(config, corpus)
    check_platform(config, mesh)
    nll, depths, seconds, compiled = [], [], 0.0, 0.0
    with jax.set_mesh(mesh):
        variables, _, step = restore_variables(config, workdir, mesh, args.step)
        for batch in eval_batches(corpus, config.data, config.microbatch_size, config.eval.batches):
            rows = batch["tokens"][(batch["segments"] > 0).all(-1)]
            if not len(rows):
                continue
            found = generator.score(variables, list(rows[:, :1]), list(rows[:, 1:]))
            nll += found.nll
            depths += found.depths or []
            seconds, compiled = seconds + found.decode_seconds, compiled + (found.compiled_flops or 0.0)
    if not nll:
        raise RequestError("no row of the validation split is full, and others are not decoded; shorten its rows")
    lost, ran = np.stack(nll), np.stack(depths)
    row: dict[str, Any] = {"step": step, "split": "eval", "exit_rule": dataclasses.asdict(how)}
    row |= {"targets": lost.size, "cross_entropy": float(lost.mean())}
    if corpus.tokenizer.is_bytes:
        row["bits_per_byte"] = bits_per_byte(float(lost.mean()))
    layers, counts = np.unique(ran, return_counts=True)
    row["exits"] = {
        "histogram": {str(layer): int(count) for layer, count in zip(layers, counts, strict=True)},
        "mean_layer": float(ran.mean()),
        "flops": {**decode_flops(config.model, how, ran, [1] * len(ran)), "compiled": compiled},
    }
    row["tokens_per_second"] = lost.size / max(seconds, 1e-9)
    print(json.dumps(json_values(row), allow_nan=False))
    return 0
