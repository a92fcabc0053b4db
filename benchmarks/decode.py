"""Decoding of one row against the machine: tokens a second, beside the time that reading the weights once would take.

Run:  python benchmarks/decode.py                       a model of 110 M parameters, untrained
      python benchmarks/decode.py --run=runs/early_exit --text=FILE    a trained one: early exit and drafts, too

The bandwidth is the better of a sum and a matrix–vector product over as many float32 values as the model has active
parameters, taken in turn with decoding in one process. Everything is float32; seconds are those after compilation."""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.dense import DenseSpec
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Decoding, Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.infer.self_speculation import SelfSpeculation
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import total
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables, abstract_model

from timing import quartiles

GREEDY = Sampling(temperature=0)
LARGE = ModelConfig(
    vocab_size=32_768,
    d_model=768,
    num_heads=12,
    pattern=("dense",),
    repeats=12,
    blocks={"dense": DenseSpec()},
)


def untrained(config: ModelConfig) -> Variables:
    """Small random values."""
    _, params, model_state = abstract_model(config)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    values = [jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
    return Variables(params=structure.unflatten(values), model_state=model_state)


def measure(
    config: ModelConfig,
    model: Variables,
    prompt: np.ndarray,
    tokens: int,
    rounds: int,
    decodings: dict[str, Optional[Decoding]],
) -> None:
    """Prints a line for each way of decoding. Greedy."""
    active = 4 * total(config).active
    memory, ones = jnp.ones((max(active // 4096, 1024), 1024)), jnp.ones(1024)  # larger than caches, if need be
    reads = [jax.jit(jnp.sum), jax.jit(lambda memory: memory @ ones)]
    for read in reads:
        jax.block_until_ready(read(memory))
    generators = {name: Generator(config, GREEDY, decoding=how) for name, how in decodings.items()}
    found = {name: generator(model, [prompt], tokens) for name, generator in generators.items()}  # compiles
    seconds, floors = {name: [] for name in generators}, []
    for _ in range(rounds):
        for name, generator in generators.items():
            floors.append(min(_seconds(functools.partial(read, memory)) for read in reads))
            found[name] = generator(model, [prompt], tokens)
            seconds[name].append(found[name].decode_seconds / tokens)
    floor = float(np.median(floors)) * active / memory.nbytes
    print(f"{active / 4e6:.1f} M active parameters, {memory.nbytes / np.median(floors) / 1e9:.1f} GB/s,", end=" ")
    print(f"{1e3 * floor:.3f} ms to read them once; {tokens} tokens after {len(prompt)}")
    plain = np.array(seconds["plain"])
    for name, values in seconds.items():
        generation, taken = found[name], np.array(values)
        same = int((generation.tokens[0] == found["plain"].tokens[0]).sum())
        line = f"{name:<28} {1e3 * np.median(taken):8.3f} ms/token  × floor {quartiles(taken / floor)}"
        line += f"  speed-up {quartiles(plain / taken)}  same tokens {same}/{tokens}"
        if generation.depths is not None:
            line += f"  mean layer {generation.depths.mean():.2f}"
        if generation.kept is not None:
            line += f"  tokens/round {tokens / generation.kept.sum():.2f}"
        print(line)


def _seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a trained model with exits")
    parser.add_argument("--text", type=Path, help="the prompt is its beginning")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[2, 4, 6])
    args = parser.parse_args()
    if args.run is None:
        with jax.set_mesh(make_mesh(MeshConfig())):
            measure(LARGE, untrained(LARGE), np.arange(16), args.tokens, args.rounds, {"plain": None})
        return
    loaded = load(ExperimentConfig, str(args.run / "config.json"), [])
    config = dataclasses.replace(loaded.config, mesh=MeshConfig())
    decodings: dict[str, Optional[Decoding]] = {"plain": None}
    decodings |= {f"max_prob {limit}": EarlyExit(threshold=limit) for limit in args.thresholds}
    for depth in config.model.exits.depths:
        of_depth = {f"draft {depth} × {m}": SelfSpeculation(layers=depth, length=m) for m in args.draft_lengths}
        decodings |= of_depth
    text = b"import os\n" if args.text is None else args.text.read_bytes()[:64]
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = restore_variables(config, args.run, mesh, None)[0]
        prompt = np.frombuffer(text, np.uint8).astype(np.int32)
        measure(config.model, variables, prompt, args.tokens, args.rounds, decodings)


if __name__ == "__main__":
    main()
