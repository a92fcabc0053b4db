"""Throughput of a classifier whose rows leave early, by patience and by entropy, against all of its layers and against
the same model cut off at each of its exits.

Thresholds are chosen on one half of the validation batches, from their exit table: the cheapest that loses at most
`--loss` points of accuracy there. Everything printed is measured on the other half. All competitors go from the host's
rows to the host's answers, batch after batch, taking turns; ratios are those of one round. The full model is the faster
of its scanned and its unrolled program.

Run:  python benchmarks/encoder_exit.py --run=runs/encoder_exit
Bar:  at half a point of accuracy lost or less, 1.7 times the full model's rows per second at batch 32
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Optional

import jax
import numpy as np
from flax import nnx

from sparsejax.base.config import load
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.base.structs import Batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.encoder_command import over
from sparsejax.infer.encoder_exit import ExitingEncoder, ladder_of
from sparsejax.infer.encoder_report import as_row
from sparsejax.infer.exit_evaluation import table_of
from sparsejax.infer.exit_metrics import summary
from sparsejax.infer.exit_rules import Entropy, ExitRule, Patience, leave
from sparsejax.infer.exit_table import ExitTable
from sparsejax.model.partial import embedded, features_at, logits_at, run_layers
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables, abstract_model
from sparsejax.train.timing import interleaved

from timing import quartiles

HostBatch = Mapping[str, np.ndarray]


def cut_off(config: ExperimentConfig, variables: Variables, depth: Optional[int]) -> Callable[[HostBatch], np.ndarray]:
    """Host rows → logits `[B, C]` of the model's first layers and the head that stands there; None: the scanned
    program of all layers."""
    model, mesh = config.model, jax.sharding.get_mesh()
    graph = abstract_model(model if depth is None else unrolled(model))[0]
    parts = (variables.params, variables.model_state)
    if depth is not None:
        parts = jax.jit(lambda parts: tuple(unrolled_variables(model, each) for each in parts))(parts)

    @jax.jit
    def logits(parts, arrays):
        lm, batch = nnx.merge(graph, *parts), Batch(**{name: each[0] for name, each in arrays.items()})
        if depth is None:
            return lm(batch, mode="eval").logits[:, 0]
        x, context, _ = embedded(lm, batch, None, "eval")
        x, _ = run_layers(lm, x, context, None, range(depth))
        return logits_at(lm, features_at(lm, x, batch, depth), depth)[:, 0]

    return lambda batch: np.asarray(logits(parts, shard_batch(batch, mesh, 1)))


def cheapest(rules: list[ExitRule], table: ExitTable, points: float) -> ExitRule:
    """Of those that lose at most so many points of accuracy on the table; the first where none does."""
    right = table.correct[:, -1].mean() - points / 100
    told = [summary(table, leave(rule, table)) for rule in rules]
    good = [number for number, each in enumerate(told) if each.accuracy >= right]
    return rules[min(good, key=lambda number: told[number].cost, default=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--batches", type=int, help="of the validation split, half of which are timed (default: all)")
    parser.add_argument("--loss", type=float, default=0.5, help="points of accuracy (default: 0.5)")
    flags = parser.parse_args()
    config = load(ExperimentConfig, str(flags.run / "config.json")).config
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        data=dataclasses.replace(config.data, batch_size=flags.rows),
        train=dataclasses.replace(config.train, accumulation=1),
        eval=dataclasses.replace(config.eval, batches=flags.batches),
    )
    model, mesh, corpus = config.model, make_mesh(config.mesh), open_corpus(config.data)
    with jax.set_mesh(mesh):
        variables = restore_variables(config, flags.run, mesh, None)[0]
        table = table_of(config, variables, corpus, mesh)
        chosen = table.take(table.group // flags.rows % 2 == 0)
        batches = list(eval_batches(corpus, config.data, flags.rows, flags.batches))[1::2]
        bounds = np.quantile(chosen.entropy[:, :-1], np.linspace(0, 1, 200))
        rules: dict[str, ExitRule] = {
            "patience": cheapest([Patience(patience=n) for n in range(table.exits, 0, -1)], chosen, flags.loss),
            "entropy": cheapest([Entropy(threshold=t) for t in (0.0, *bounds.tolist())], chosen, flags.loss),
            "never": Entropy(threshold=0.0),
        }
        encoder = ExitingEncoder(model, variables, config.data.sequence_length, ladder_of(flags.rows))
        depths = (*model.exits.depths, model.num_layers)
        fixed = {f"{depth} layers": cut_off(config, variables, depth) for depth in depths}
        fixed["scanned"] = cut_off(config, variables, None)
        told = {name: as_row(model, over(encoder, iter(batches), rule)) for name, rule in rules.items()}
        right = {name: accuracy(call, batches) for name, call in fixed.items()}
        runs: dict[str, Callable[[], object]] = {
            name: lambda rule=rule: [encoder(batch, rule).exits for batch in batches] for name, rule in rules.items()
        }
        runs |= {name: lambda call=call: [call(batch) for batch in batches] for name, call in fixed.items()}
        seconds = interleaved(runs, flags.rounds)
    whole = min("scanned", f"{model.num_layers} layers", key=lambda name: np.median(seconds[name]))
    rows = sum(int(batch["loss_mask"].any(-1).sum()) for batch in batches)
    print(
        f"{rows} rows in batches of {flags.rows}, {config.data.sequence_length} tokens, {flags.rounds} rounds;", end=" "
    )
    print(f"full: {whole}, {rows / np.median(seconds[whole]):.1f} rows/s, right {100 * right[whole]:.2f} %")
    for name, each in seconds.items():
        ratio = quartiles(seconds[whole] / each)
        found = right[name] if name in right else told[name]["accuracy"]
        line = (
            f"  {name:<12} rows/s over full: {ratio}  right {100 * found:.2f} % ({100 * (found - right[whole]):+.2f})"
        )
        if name in told:
            exits = told[name]["exits"]
            flops = {kind: value / exits["flops"]["full"] for kind, value in exits["flops"].items() if kind != "full"}
            line += f"  {rules[name]}  mean layer {exits['mean_layer']:.2f}  {exits['histogram']}"
            line += "  FLOPs over full: " + ", ".join(f"{kind} {value:.3f}" for kind, value in flops.items())
        print(line, flush=True)


def accuracy(call: Callable[[HostBatch], np.ndarray], batches: list[HostBatch]) -> float:
    """Of rows that have a class."""
    told = [(call(batch).argmax(-1) == batch["targets"][:, 0])[batch["loss_mask"][:, 0]] for batch in batches]
    return float(np.concatenate(told).mean())


if __name__ == "__main__":
    main()
