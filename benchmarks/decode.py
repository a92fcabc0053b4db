"""Decoding of one row against the machine: tokens a second, beside the time that reading the weights once would take.

Run:  python benchmarks/decode.py                       a model of 110 M parameters, untrained
      python benchmarks/decode.py --run=runs/early_exit                a trained one: early exit and drafts, too

Of a trained one, windows of the validation split are also scored as a decoder with early exits meets them: bits per
byte and time together. The threshold is the lowest that loses 1 % or less on the first half of the windows; what is
said of it is measured on the second.

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
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
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


def windows(config: ExperimentConfig, count: int) -> np.ndarray:
    """Rows of tokens, spread over the validation split."""
    found = eval_batches(open_corpus(config.data), config.data, 1, count)
    return np.concatenate([np.asarray(batch["tokens"]) for batch in found])


def score(config: ExperimentConfig, model: Variables, thresholds: list[float], count: int, rounds: int) -> None:
    """Prints bits per byte and the time of a token of the plain decoder and of `max_prob` at some thresholds."""
    length, prompt = config.data.sequence_length, 32
    rows = windows(config, count)
    halves = rows[::2], rows[1::2]
    plain, exits = Generator(config.model, GREEDY), Generator(config.model, GREEDY, decoding=EarlyExit())

    def lost(generator: Generator, rows: np.ndarray, threshold: Optional[float] = None):
        """(nats per token, seconds per token, mean layer), a row at a time."""
        found = [generator.score(model, [row[:prompt]], [row[prompt:]], threshold) for row in rows]
        depths = [each.depths[0] for each in found if each.depths is not None]
        seconds = sum(each.decode_seconds for each in found) / (len(rows) * (length - prompt))
        return np.mean([each.nll[0] for each in found]), seconds, np.mean(depths) if depths else config.model.num_layers

    whole = lost(plain, halves[0])[0]
    chosen = 1.0
    print(f"scored on {len(halves[0])} windows: {whole / np.log(2):.4f} bits per byte")
    for threshold in sorted(thresholds, reverse=True):
        nats, _, layer = lost(exits, halves[0], threshold)
        print(f"  max_prob {threshold:<5} loss × {nats / whole:.4f}  mean layer {layer:.2f}")
        if nats <= 1.01 * whole:
            chosen = threshold
    turns = [(lost(plain, halves[1]), lost(exits, halves[1], chosen)) for _ in range(rounds)]
    faster = quartiles([full[1] / early[1] for full, early in turns])
    full, early = turns[0]
    print(
        f"on {len(halves[1])} others: max_prob {chosen} loss × {early[0] / full[0]:.4f}"
        f"  mean layer {early[2]:.2f}  speed-up {faster}"
    )


def _seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a trained model with exits")
    parser.add_argument("--windows", type=int, default=16, help="that are scored")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
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
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = restore_variables(config, args.run, mesh, None)[0]
        score(config, variables, args.thresholds, args.windows, args.rounds)
        measure(config.model, variables, windows(config, 1)[0, :64], args.tokens, args.rounds, decodings)


if __name__ == "__main__":
    main()
