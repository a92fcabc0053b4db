"""What light and heavy branches save: encoders in which few tokens have the heavy part, against the dense encoder.

Run:  python benchmarks/light_heavy.py [--rounds=8] [--rows=4] [--length=512] [--layers=12] [--width=256]

Bytes; float32, AdamW, one device. `light_heavy` has light and heavy branches in every layer, `coda` an adapter for all
tokens and the dense layer for an eighth of them; `masked` is the first with all tokens computed. `step` is the whole
training step, `forward` the loss alone. All take turns; a figure is the median over rounds of model / dense model, with
quartiles. Beside it the ratio of the FLOPs that the model's choices need."""

import argparse
import dataclasses

import jax
import numpy as np

from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.blocks.conditional_adapters import ConditionalAdapters
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.light_heavy import LightHeavySpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import mean_keys, total
from sparsejax.train.timing import interleaved

from model_step import model_step
from timing import quartiles

DEEP = LightHeavySpec()


def models(layers: int, width: int) -> dict[str, ModelConfig]:
    dense = ModelConfig(d_model=width, num_heads=4, pattern=("dense",), repeats=layers, causal=False)
    dense = dataclasses.replace(dense, blocks={"dense": DenseSpec()})
    branches = lambda spec: dataclasses.replace(dense, pattern=("deep",), blocks={"deep": spec})  # noqa: E731
    return {
        "dense": dense,
        "light_heavy": branches(DEEP),
        "masked": branches(dataclasses.replace(DEEP, execution="masked")),
        "coda": dataclasses.replace(dense, select=ConditionalAdapters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 8, "rows": 4, "length": 512, "layers": 12, "width": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.device_count()} × {jax.devices()[0].device_kind}, {flags.rounds} rounds")
    competitors = models(flags.layers, flags.width)
    with jax.set_mesh(make_mesh(MeshConfig())):
        steps = {name: model_step(model, flags.rows, flags.length) for name, model in competitors.items()}
        seconds = {"step": interleaved(steps, flags.rounds)}
        seconds["forward"] = interleaved({name: step.forward for name, step in steps.items()}, flags.rounds)
    keys = mean_keys(competitors["dense"], flags.length)
    whole = total(competitors["dense"]).flops(keys, flags.length)
    print(f"{flags.rows} × {flags.length} tokens; model / dense model: median [quartiles]; FLOPs")
    for what, took in seconds.items():
        print(f"{what}: dense {1e3 * np.median(took['dense']):.0f} ms")
        for name, model in competitors.items():
            ratio = quartiles(took[name] / took["dense"])
            print(f"  {name:<12} {ratio}   {total(model).flops(keys, flags.length) / whole:.3f}", flush=True)


if __name__ == "__main__":
    main()
