"""Throughput of an encoder whose tokens leave on the way, against the plain one, and what both get right.

Reads two runs on the same data: a plain one, and one of the same model with `model.skim`. The forward pass of the
second is timed as it was trained (masked) and compact, with room in every layer for `--slack` times the share of tokens
that it kept on average, or for the shares of `--ladder`. Other competitors are the plain model on rows cut to several
lengths, evaluated as it is. The plain and the masked model are scanned, the compact one cannot be.

Run:     python benchmarks/skim.py --plain=runs/encoder_classify --skimmed=runs/encoder_skim
Bar:     at 1 point of accuracy lost or less, 1.6 times the rows per second, on rows of 256 tokens
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.timing import interleaved

from encoders import Encoder, room, shortened
from timing import quartiles

ROUNDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--skimmed", type=Path, required=True)
    parser.add_argument("--ladder", default="", help="share of the row for each layer, separated by commas")
    parser.add_argument("--slack", type=float, default=1.1, help="room over the mean kept fraction of a layer")
    flags = parser.parse_args()
    plain, skimmed = (load(ExperimentConfig, str(run / "config.json")).config for run in (flags.plain, flags.skimmed))
    mesh = make_mesh(dataclasses.replace(plain.mesh, data=1))
    skimmed = dataclasses.replace(skimmed, mesh=dataclasses.replace(skimmed.mesh, data=1))
    plain = dataclasses.replace(plain, mesh=skimmed.mesh)
    with jax.set_mesh(mesh):
        rows = list(eval_batches(open_corpus(plain.data), plain.data, plain.data.batch_size))
        batches = [shard_batch(batch, mesh, 1) for batch in rows]
        dense, masked = Encoder(plain, flags.plain, mesh), Encoder(skimmed, flags.skimmed, mesh)
        right = {"plain": dense.over(batches)[0]}
        right["masked"], reports = masked.over(batches)
        kept = [[float(r.skim.kept / r.skim.tokens) for r in each.values()] for each in reports]
        ladder = tuple(float(share) for share in flags.ladder.split(",")) if flags.ladder else room(kept, flags.slack)
        skim = dataclasses.replace(skimmed.model.skim, stage="hard", execution="compact", ladder=ladder)
        model = dataclasses.replace(skimmed.model, skim=skim, scan=False)
        compact = Encoder(dataclasses.replace(skimmed, model=model), flags.skimmed, mesh)
        right["compact"], reports = compact.over(batches)
        lost = sum(int(r.skim.unplaced) for each in reports for r in each.values())
        print(f"kept after each layer: {np.round(np.mean(kept, axis=0), 3)}; room {np.round(ladder, 3)}; {lost} lost")
        encoders = {"plain": dense, "masked": masked, "compact": compact}
        runs = {name: lambda e=encoder: e.step(e.variables, batches[0]) for name, encoder in encoders.items()}
        for length in (16, 32, 64, 96, 128, 160, 192):
            cut = [shard_batch(shortened(batch, length), mesh, 1) for batch in rows]
            name = f"cut to {length}"
            right[name] = dense.over(cut)[0]
            runs[name] = lambda batch=cut[0]: dense.step(dense.variables, batch)
        seconds = interleaved(runs, ROUNDS)
    print(f"{plain.data.batch_size} rows of {plain.data.sequence_length} tokens, {ROUNDS} rounds: median [quartiles]")
    for name, each in seconds.items():
        ratio = quartiles(seconds["plain"] / each)
        print(f"  {name:<12} rows per second over plain: {ratio}   right {100 * right[name]:.2f} %", flush=True)


if __name__ == "__main__":
    main()
