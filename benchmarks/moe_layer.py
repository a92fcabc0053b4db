"""What routing costs: an MoE layer against a dense network of the same active FLOPs and against the expert matmuls
alone.

Run:  python benchmarks/moe_layer.py [--rounds=25]

Value and gradient, with respect to parameters and input, of sum(y · cotangent); float32, GELU, two matrices, capacity
factor 1.0, one group, one device. `dense` is one network on T · k tokens; `batched` is the E expert networks on T · k
/ E rows each, without routing. The three take turns; the figure is the median over rounds of layer / max(dense,
batched)."""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES, MeshConfig, make_mesh
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.ffn import expert_ffn
from sparsejax.routers.router import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw

from timing import interleaved, quartiles

SHAPES = [(4096, 512, 1024, 8, 1), (4096, 512, 1024, 8, 2), (4096, 512, 256, 64, 8)]
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


def competitors(tokens: int, width: int, hidden: int, num_experts: int, k: int):
    """name → a call that computes value and gradient once."""
    keys = jax.random.split(jax.random.key(0), 6)
    config = ModelConfig(d_model=width, num_heads=8)
    router = RouterConfig(selection=TopK(k=k), weight=Raw())
    spec = MoESpec(num_experts=num_experts, d_ff=hidden, capacity_factor=1.0, router=router)
    graph, params = nnx.split(MoELayer(keys[0], config, spec))
    x = jax.sharding.reshard(jax.random.normal(keys[1], (1, tokens, width)), P(BATCH_AXES))
    cotangent = jax.random.normal(keys[2], x.shape)
    batch = one_row(tokens)

    def layer(params, x, batch):
        y, _ = nnx.merge(graph, params)(x, Context(batch=batch, mode="train"))
        return jnp.sum(y * cotangent)

    def stacked(experts: int):
        w_in = jax.random.normal(keys[3], (experts, width, hidden)) * width**-0.5
        w_out = jax.random.normal(keys[4], (experts, hidden, width)) * hidden**-0.5
        z = jax.random.normal(keys[5], (experts, tokens * k // experts, width))
        step = jax.jit(
            jax.value_and_grad(lambda weights, z: jnp.sum(expert_ffn(z, weights, "gelu") * z), argnums=(0, 1))
        )
        return lambda: step((w_in, w_out), z)

    layer_step = jax.jit(jax.value_and_grad(layer, argnums=(0, 1)))
    return {"layer": lambda: layer_step(params, x, batch), "dense": stacked(1), "batched": stacked(num_experts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {jax.device_count()} × {device}, {rounds} rounds; ratio: median [quartiles]")
    titles = f"{'layer ms':>10}{'dense ms':>10}{'batched ms':>12}   layer / max(dense, batched)"
    print(f"{'(tokens, d, hidden, E, k)':<28}{titles}")
    with jax.set_mesh(make_mesh(MeshConfig())):
        for shape in SHAPES:
            seconds = interleaved(competitors(*shape), rounds)
            ratio = seconds["layer"] / jnp.maximum(seconds["dense"], seconds["batched"])
            ms = {name: f"{1e3 * float(jnp.median(values)):.0f}" for name, values in seconds.items()}
            print(
                f"{shape!s:<28}{ms['layer']:>10}{ms['dense']:>10}{ms['batched']:>12}   {quartiles(ratio)}", flush=True
            )


if __name__ == "__main__":
    main()
