"""A model and the same one unrolled: equal logits and caches, also with streams, pools and memories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.recursion import MixtureOfRecursions
from sparsejax.memory.config import MEMORIES
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel, init_caches
from sparsejax.model.unrolled import unrolled, unrolled_caches, unrolled_variables

from support import ONE_DEVICE, assert_close, host_batch, on_mesh, put_batch, to_numpy

SHAPE = {"d_model": 16, "num_heads": 2, "vocab_size": 32, "prefix": ("dense",), "suffix": ("moe",), "repeats": 2}
BLOCKS = {"dense": DenseSpec(d_ff=32), "moe": MoESpec(num_experts=4, d_ff=32, pooled=True)}
CONFIGS = {
    "plain": ModelConfig(**SHAPE, blocks=BLOCKS),
    "tied": ModelConfig(**SHAPE, blocks=BLOCKS, pattern=("dense",), tied_repeats=True),
    "recursions": ModelConfig(
        **SHAPE | {"suffix": ("dense",), "pattern": ("deep",)},
        blocks={"dense": DenseSpec(d_ff=32), "deep": DenseSpec(d_ff=24)},
        tied_repeats=True,
        scan=False,
        select=MixtureOfRecursions(blocks=("deep",)),
    ),
    "altup": ModelConfig(**SHAPE, blocks=BLOCKS, streams=AltUp(streams=2)),
    "lookup": ModelConfig(**SHAPE, blocks=BLOCKS, memory={"lookup": MEMORIES["lookup"](blocks=("dense",))}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_the_stacked_one_computes(name):
    config = CONFIGS[name]
    flat = unrolled(config)
    assert flat.num_layers == config.num_layers == len(flat.prefix)

    @jax.jit
    def both(batch):
        model = LanguageModel(jax.random.key(0), config)
        graph, variables = nnx.split(model)
        other = nnx.graphdef(jax.eval_shape(lambda: LanguageModel(jax.random.key(0), flat)))
        # Moved, so that no two layers are alike and scales are not all ones.
        variables = jax.tree.map(
            lambda v: v + 0.1 * jnp.sin(jnp.arange(v.size)).reshape(v.shape) if v.dtype == jnp.float32 else v, variables
        )
        models = nnx.merge(graph, variables), nnx.merge(other, unrolled_variables(config, variables))
        return [
            each(batch, mode="generate", caches=init_caches(of, 4, 12))
            for each, of in zip(models, (config, flat), strict=True)
        ]

    with on_mesh(ONE_DEVICE) as mesh:
        batch = put_batch(host_batch(4, 12, documents=1), mesh)
        stacked, apart = to_numpy(both(batch))
    assert np.abs(stacked.logits).max() > 0.1
    assert_close(apart.logits, stacked.logits)
    assert_close(apart.caches, unrolled_caches(config, stacked.caches))
