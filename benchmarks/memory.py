"""What a lookup table costs: the training step and the forward pass of a model with one against the plain model's.

Run:  python benchmarks/memory.py [--rounds=12] [--rows=4] [--length=512] [--address=n_grams,hyperplanes] [--small]

Twelve dense layers, d = 256, bytes; float32, AdamW, one device, the state updated in place. One layer looks up rows of
64 numbers: of hashed bigrams and trigrams, a table each, or of one table by random hyperplanes. The tables have 2^18
rows together, and, unless --small, 2^22 in a second model, which needs 4 GiB. Of rows that were read the optimizer
keeps Adam's two moments.

All take turns; a figure is the median over rounds of step / step, with quartiles. `touched` are the rows that the last
step updated."""

import argparse
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.dense import DenseSpec
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.contents import Vector
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.memory.n_grams import NGrams
from sparsejax.memory.projections import Project
from sparsejax.model.config import ModelConfig
from sparsejax.train.timing import interleaved

from model_step import model_step
from timing import quartiles

WIDTH = 64
PLAIN = ModelConfig(
    d_model=256,
    num_heads=4,
    prefix=("dense", "with_memory"),
    pattern=("dense",) * 5,
    repeats=2,
    blocks={"dense": DenseSpec(), "with_memory": DenseSpec()},
)
ADDRESSES = {
    "n_grams": lambda bits: NGrams(orders=(2, 3), heads=1, buckets=2 ** (bits - 1)),
    "hyperplanes": lambda bits: Hyperplanes(bits=bits),
}


def with_memory(address: str, bits: int) -> ModelConfig:
    """The plain model with a table of 2^bits rows in one layer."""
    content = Vector(size=WIDTH, join="concat")
    spec = MemorySpec(address=ADDRESSES[address](bits), content=content, consume=Project(), blocks=("with_memory",))
    return dataclasses.replace(PLAIN, memory={"memory": spec})


def compare(address: str, sizes: Mapping[str, int], rounds: int, rows: int, length: int) -> None:
    """Prints the figures of the tables of one address: name of a size → log2 of its rows."""
    models = {"plain": PLAIN} | {name: with_memory(address, bits) for name, bits in sizes.items()}
    steps = {name: model_step(model, rows, length) for name, model in models.items()}
    training = interleaved(steps, rounds)
    forward = interleaved({name: step.forward for name, step in steps.items()}, rounds)
    print(f"{address}: plain step {1e3 * np.median(training['plain']):.0f} ms", flush=True)
    first = next(iter(sizes))
    for name in sizes:
        against = [quartiles(times[name] / times["plain"]) for times in (training, forward)]
        against.append(quartiles(training[name] / training[first]))
        touched = int(steps[name]().tables["memory"].touched)
        print(f"  {name:<10} {against[0]}   {against[1]}   {against[2]}   {touched}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--address", default=",".join(ADDRESSES))
    parser.add_argument("--small", action="store_true", help="no table of 2^22 rows")
    flags = parser.parse_args()
    sizes = {"2^18 rows": 18} | ({} if flags.small else {"2^22 rows": 22})
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {jax.device_count()} × {device}, {flags.rounds} rounds")
    print(f"{flags.rows} × {flags.length} tokens; medians [quartiles] of step / plain step, forward / plain forward,")
    print("step / step with 2^18 rows; rows touched")
    with jax.set_mesh(make_mesh(MeshConfig())):
        for address in flags.address.split(","):
            compare(address, sizes, flags.rounds, flags.rows, flags.length)


if __name__ == "__main__":
    main()
