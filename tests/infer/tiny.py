"""Tiny models on a mesh, shared by the tests of generation."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES, MeshConfig, Rules, make_mesh
from sparsejax.base.structs import Batch
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import Hash, TopK
from sparsejax.routers.weights import Raw
from sparsejax.train.state import Variables, abstract_model, variable_specs

ONE, CUBE = (1, 1, 1), (2, 2, 2)

SPARSE = ModelConfig(
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    qk_norm=True,
    attention_soft_cap=5.0,
    logit_soft_cap=5.0,
    repeats=1,
    vocab_size=64,
    blocks={"dense": DenseSpec(d_ff=32), "moe": MoESpec(num_experts=4, d_ff=32)},
)
"""Everything that decoding could get wrong: grouped heads, norms on heads, soft caps, top-2 of 4 experts."""

SWITCH = dataclasses.replace(
    SPARSE,
    num_kv_heads=None,
    qk_norm=False,
    attention_soft_cap=None,
    logit_soft_cap=None,
    prefix=("dense",),
    pattern=("moe",),
    repeats=1,
    scan=False,
    tied_head=False,
    blocks={
        "dense": DenseSpec(d_ff=32, gated=True, activation="silu"),
        "moe": MoESpec(
            num_experts=4,
            d_ff=32,
            shared_experts=1,
            dispatch="einsum",
            router=RouterConfig(selection=TopK(k=1), weight=Raw()),
        ),
    },
)

BIGRAM = dataclasses.replace(
    SPARSE,
    tied_head=False,  # a tied one likes to repeat itself
    blocks={
        "dense": DenseSpec(d_ff=32),
        "moe": MoESpec(num_experts=4, d_ff=32, router=RouterConfig(selection=Hash(kind="bigram"), weight=Raw())),
    },
)
"""Experts that depend on the token before, too."""

DENSE = dataclasses.replace(SPARSE, pattern=("dense",), blocks={"dense": DenseSpec(d_ff=32)})


def mesh_of(shape):
    data, expert, tensor = shape
    return make_mesh(MeshConfig(data=data, expert=expert, tensor=tensor))


def variables(config, mesh, seed=0):
    """Random parameters, the same values on every mesh. The mesh must be set.

    They come from NumPy, for speed, and are large enough that attention and routers are decided.
    """
    rng = np.random.default_rng(seed)
    _, params, model_state = abstract_model(config)
    specs = jax.tree.leaves(variable_specs(params, Rules()), is_leaf=lambda leaf: isinstance(leaf, P))
    leaves, structure = jax.tree.flatten(params)
    values = [rng.normal(size=leaf.shape).astype(np.float32) / config.d_model**0.5 for leaf in leaves]
    placed = [jax.device_put(value, NamedSharding(mesh, spec)) for value, spec in zip(values, specs, strict=True)]
    return Variables(params=structure.unflatten(placed), model_state=model_state)


def batch_of(tokens_BT, segments_BT, positions_BT, mesh):
    place = lambda a: jax.device_put(np.asarray(a, np.int32), NamedSharding(mesh, P(BATCH_AXES)))  # noqa: E731
    tokens, zero = place(tokens_BT), place(np.zeros_like(tokens_BT))
    return Batch(
        tokens=tokens,
        targets=zero,
        segments=place(segments_BT),
        positions=place(positions_BT),
        loss_mask=zero > 0,
        domains=zero,
        rows=place(np.arange(len(tokens_BT))),
    )


def forward(config):
    """`(variables, batch[, caches]) -> ModelOutput` in generation, compiled once for each shape."""
    graph = abstract_model(config)[0]

    @jax.jit
    def run(model, batch, caches=None):
        return nnx.merge(graph, model.params, model.model_state)(batch, mode="generate", caches=caches)

    return run


def greedy_without_cache(config, mesh, prompts, max_tokens):
    """Each prompt's likeliest continuation, every token from a pass over the whole row."""
    run, model = forward(config), variables(config, mesh)
    shards = mesh.shape["data"] * mesh.shape["expert"]
    length = max(map(len, prompts)) + max_tokens
    out = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_tokens):
            row = np.zeros(length, np.int32)
            row[: len(ids)] = ids
            order = np.arange(length)
            rows = lambda a: np.tile(a, (shards, 1))  # noqa: E731
            logits = run(model, batch_of(rows(row), rows(order < len(ids)), rows(order), mesh)).logits
            ids.append(int(np.asarray(logits)[0, len(ids) - 1].argmax()))
        out.append(ids[len(prompt) :])
    return np.array(out)
