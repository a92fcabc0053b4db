"""What choosing tokens saves: Mixture-of-Depths in every other block against the dense model, and Mixture-of-Recursions
against the model whose layers are one as well, on all tokens.

Run:  python benchmarks/depths.py [--rounds=8] [--rows=2] [--length=512] [--tokens=128]

Twelve dense layers, d = 256, bytes; float32, one device; every second block on 12.5 % of the tokens, or twelve
recursions of one block from all of them to 30 %. `step` is the whole training step, `decode` a token at batch 1 after a
prompt of `--length` minus `--tokens` tokens, of models that have learned nothing: predictors are set to choose about as
many tokens as training does, which is what they learn to do. All take turns; a figure is the median over rounds of
model / its dense model, with quartiles. Beside it the ratio of FLOPs."""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.recursion import MixtureOfRecursions
from sparsejax.blocks.selection import MixtureOfDepths
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import mean_keys, total
from sparsejax.train.state import Variables
from sparsejax.train.timing import Step, interleaved

from model_step import model_step
from timing import quartiles

BLOCKS = {"dense": DenseSpec(), "deep": DenseSpec()}
PLAIN = ModelConfig(d_model=256, num_heads=4, pattern=("dense", "deep"), repeats=6, blocks=BLOCKS)
CAPACITY = 0.125
TIED = dataclasses.replace(PLAIN, pattern=("dense",), repeats=12, tied_repeats=True, scan=False)
RECURSIONS = MixtureOfRecursions()
MODELS = {
    "dense": PLAIN,
    "depths": dataclasses.replace(PLAIN, select=MixtureOfDepths(capacity=CAPACITY, blocks=("deep",))),
    "tied": TIED,
    "recursions": dataclasses.replace(TIED, select=RECURSIONS),
}
BASES = {"depths": "dense", "recursions": "tied"}
SHARES = {"depths": [CAPACITY], "recursions": [RECURSIONS.part(recursion, 12) for recursion in range(12)]}
"""Of the tokens that each of a predictor's numbers chooses."""


def calibrated(params: nnx.State, shares: Sequence[float]) -> nnx.State:
    """The same parameters, but every predictor chooses about these shares of tokens: one random projection of its
    hidden layer, the mean of which is not 0, is cut at the quantile that a share exceeds."""
    key = jax.random.key(1)

    def of(path, leaf):
        if "prediction" not in path:
            return leaf
        hidden = jax.nn.gelu(jax.random.normal(key, (4096, leaf[...].shape[-2])))
        weight = leaf[...]
        mean, one = hidden.mean(0), weight[:, :, :1]
        wanted = jnp.quantile(hidden @ one[0, :, 0], 1 - jnp.asarray(shares))
        shifted = one - wanted * mean[None, :, None] / (mean @ mean)
        return leaf.replace(jax.sharding.reshard(shifted, jax.typeof(weight).sharding.spec))

    return nnx.from_flat_state([(path, of(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


def chosen(step: Step, variables: Variables) -> float:
    """Share of the tokens that the predictors choose, in the layers that have one."""
    found = [report.selection for report in step.eval_step(variables, step.batch).reports.values() if report.selection]
    return sum(int(each.chosen.sum()) for each in found) / sum(int(each.tokens.sum()) for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    flags = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.device_count()} × {jax.devices()[0].device_kind}, {flags.rounds} rounds")
    prompt = [np.random.default_rng(0).integers(0, 256, flags.length - flags.tokens).astype(np.int32)]
    with jax.set_mesh(make_mesh(MeshConfig())):
        steps = {name: model_step(model, flags.rows, flags.length) for name, model in MODELS.items()}
        params = {name: calibrated(step.state.params, SHARES.get(name, ())) for name, step in steps.items()}
        variables = {
            name: Variables(params=params[name], model_state=step.state.model_state) for name, step in steps.items()
        }
        decode: dict[str, list[float]] = {name: [] for name in MODELS}
        generators = {name: Generator(model, Sampling(temperature=1.0)) for name, model in MODELS.items()}
        for turn in range(flags.rounds + 1):
            for name, generate in generators.items():
                took = generate(variables[name], prompt, flags.tokens, seed=turn).decode_seconds
                decode[name] += [took] if turn else []
        shares = {name: chosen(steps[name], variables[name]) for name in BASES}
        seconds = interleaved(steps, flags.rounds)
    keys = mean_keys(PLAIN, flags.length)
    for name, base in BASES.items():
        work = total(MODELS[name]).flops(keys, flags.length) / total(MODELS[base]).flops(keys, flags.length)
        print(f"{name} / {base}: median [quartiles]; FLOPs {work:.3f}; decoding, {shares[name]:.3f} of tokens chosen")
        for what, took in (("step", seconds), ("decode", decode)):
            ratio = quartiles(np.asarray(took[name]) / np.asarray(took[base]))
            of_tokens = 1 if what == "step" else flags.tokens
            print(f"  {what:<6} {ratio}   {base} {1e3 * np.median(took[base]) / of_tokens:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
