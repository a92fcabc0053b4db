"""What a wider residual costs: the training step with K streams (Recycled-AltUp) against the plain one, and against a
model that is wider in earnest.

Run:  python benchmarks/altup.py [--rounds=12] [--rows=8] [--length=128]

Twelve dense layers, d = 256, bytes; float32, AdamW, one device, the whole training step: forward, backward, optimizer.
`wide` is the plain model with 2 d. All take turns; a figure is the median over rounds of step / plain step, with
quartiles. Beside it the ratio of the models' FLOPs, mixing included."""

import argparse
import dataclasses

import jax
import numpy as np

from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import mean_keys, total
from sparsejax.train.timing import interleaved

from model_step import model_step
from timing import quartiles

PLAIN = ModelConfig(d_model=256, num_heads=4, pattern=("dense",) * 4, repeats=3, blocks={"dense": DenseSpec()})
MODELS = {
    "plain": PLAIN,
    "K = 2": dataclasses.replace(PLAIN, streams=AltUp(streams=2)),
    "K = 4": dataclasses.replace(PLAIN, streams=AltUp(streams=4)),
    "wide": dataclasses.replace(PLAIN, d_model=512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    flags = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {jax.device_count()} × {device}, {flags.rounds} rounds")
    with jax.set_mesh(make_mesh(MeshConfig())):
        steps = {name: model_step(model, flags.rows, flags.length) for name, model in MODELS.items()}
        seconds = interleaved(steps, flags.rounds)
    keys = mean_keys(PLAIN, flags.length)
    print(f"{flags.rows} × {flags.length} tokens; step / plain step: median [quartiles]; the same ratio of FLOPs")
    for name, model in MODELS.items():
        work = total(model).flops(keys, flags.length) / total(PLAIN).flops(keys, flags.length)
        ratio = quartiles(seconds[name] / seconds["plain"])
        print(f"  {name:<6} {1e3 * np.median(seconds[name]):6.0f} ms   {ratio}   {work:.3f}", flush=True)


if __name__ == "__main__":
    main()
