"""What routing costs: an MoE layer against a dense network of the same active FLOPs and against the expert matmuls
alone.

Run:  python benchmarks/moe_layer.py [--rounds=25] [--shapes=1,2,3,4,5] [--load=random|zipf|one]

Value and gradient, with respect to parameters and input, of sum(y · cotangent); float32, GELU, two matrices, one group,
one device. `gather` has capacity factor 1.0, `grouped` drops nothing. `dense` is one network on T · k tokens; `batched`
is the E expert networks on T · k / E rows each, without routing. All take turns; a figure is the median over rounds of
layer / max(dense, batched).

Loads are those of a random router; `zipf`: one expert has half of all pairs, the others follow Zipf's law; `one`: all
tokens prefer the same k experts. `in blocks` are rows that a grouped layer computed outside its common slots; `memory`
is the compiled program's temporary memory over 4 · T · k · (2 d + 2 hidden) bytes, gradients of parameters not counted.
With --rounds=0 nothing is timed and that alone is printed."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES, MeshConfig, make_mesh
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.ffn import expert_ffn
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw
from sparsejax.train.timing import interleaved

from timing import quartiles

SHAPES = [
    (4096, 512, 1024, 8, 1),
    (4096, 512, 1024, 8, 2),
    (4096, 512, 256, 64, 8),
    (4096, 256, 1024, 32, 1),
    (1024, 512, 512, 128, 2),
]
"""(tokens, model width, hidden width, experts, k)"""


def one_row(tokens: int) -> Batch:
    """A batch of a single row without padding, laid out on the mesh."""
    ints = jnp.zeros((1, tokens), jnp.int32)
    batch = Batch(
        tokens=ints,
        targets=ints,
        segments=ints + 1,
        positions=ints,
        loss_mask=ints > -1,
        domains=ints,
        rows=jnp.zeros(1, jnp.int32),
    )
    return jax.tree.map(lambda array: jax.sharding.reshard(array, P(BATCH_AXES)), batch)


def preferences(load: str, num_experts: int) -> np.ndarray:
    """What is added to every token's logits, `[E]`. Random scores stay in it, but for `one`."""
    if load == "random":
        return np.zeros(num_experts)
    if load == "one":
        return -100.0 * np.arange(num_experts)
    others = 1 / np.arange(1, num_experts)
    return np.log(np.concatenate([[1.0], others / others.sum()]))


def layer(shape: tuple[int, int, int, int, int], dispatch: str, load: str):
    """(a call that computes value, report and gradients once, its report, temporary memory over the bound)."""
    tokens, width, hidden, num_experts, k = shape
    keys = jax.random.split(jax.random.key(0), 6)
    config = ModelConfig(d_model=width, num_heads=8)
    router = RouterConfig(selection=TopK(k=k), weight=Raw())
    spec = MoESpec(num_experts=num_experts, d_ff=hidden, capacity_factor=1.0, router=router, dispatch=dispatch)
    graph, params = nnx.split(MoELayer(keys[0], config, spec))
    x = jax.random.normal(keys[1], (1, tokens, width)).at[..., 0].set(1.0)  # what carries the preferences
    x = jax.sharding.reshard(x, P(BATCH_AXES))
    weight = params["router"]["weight"]
    if load == "zipf":  # scores of Gumbel noise and log odds would draw experts by their odds
        weight = weight.replace(weight[...] * 1.28)
    params["router"]["weight"] = weight.replace(weight[...].at[0].set(preferences(load, num_experts)))
    cotangent = jax.random.normal(keys[2], x.shape)
    batch = one_row(tokens)

    def value(params, x, batch):
        y, report = nnx.merge(graph, params)(x, Context(batch=batch, mode="train"))
        return jnp.sum(y * cotangent), report

    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    memory = step.lower(params, x, batch).compile().memory_analysis().temp_size_in_bytes
    bound = 4 * tokens * k * (2 * width + 2 * hidden)
    report = jax.tree.map(np.asarray, step(params, x, batch)[0][1])
    return lambda: step(params, x, batch), report, memory / bound


def matmuls(shape: tuple[int, int, int, int, int], experts: int):
    """A call of that many networks on equal parts of T · k rows."""
    tokens, width, hidden, _, k = shape
    keys = jax.random.split(jax.random.key(1), 3)
    w_in = jax.random.normal(keys[0], (experts, width, hidden)) * width**-0.5
    w_out = jax.random.normal(keys[1], (experts, hidden, width)) * hidden**-0.5
    z = jax.random.normal(keys[2], (experts, tokens * k // experts, width))
    step = jax.jit(jax.value_and_grad(lambda weights, z: jnp.sum(expert_ffn(z, weights, "gelu") * z), argnums=(0, 1)))
    return lambda: step((w_in, w_out), z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--shapes", default="1,2,3,4,5")
    parser.add_argument("--load", choices=("random", "zipf", "one"), default="random")
    flags = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {jax.device_count()} × {device}, {flags.rounds} rounds, {flags.load} load")
    print("ratios to max(dense, batched): median [quartiles]; memory; largest load / mean; rows in blocks")
    with jax.set_mesh(make_mesh(MeshConfig())):
        for number in flags.shapes.split(","):
            shape = SHAPES[int(number) - 1]
            if flags.rounds:
                compare(shape, flags.load, flags.rounds)
            else:
                memory = {name: layer(shape, name, flags.load)[2] for name in ("gather", "grouped")}
                print(f"{shape}: " + ", ".join(f"{name} {each:.2f}" for name, each in memory.items()), flush=True)


def compare(shape: tuple[int, int, int, int, int], load: str, rounds: int) -> None:
    layers = {name: layer(shape, name, load) for name in ("gather", "grouped")}
    calls = {name: call for name, (call, *_) in layers.items()}
    seconds = interleaved(calls | {"dense": matmuls(shape, 1), "batched": matmuls(shape, shape[3])}, rounds)
    print(f"{shape}: " + ", ".join(f"{name} {1e3 * np.median(each):.0f} ms" for name, each in seconds.items()))
    slowest = np.maximum(seconds["dense"], seconds["batched"])
    for name, (_, report, memory) in layers.items():
        told = f"memory {memory:.2f}; load {report.assigned.max() / report.assigned.mean():.2f}"
        if report.block_rows is not None:
            told += f"; in blocks {report.block_rows / report.slots:.0%} of {report.slots} rows"
        print(f"  {name:<8} {quartiles(seconds[name] / slowest)}   {told}", flush=True)


if __name__ == "__main__":
    main()
