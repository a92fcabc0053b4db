"""Experts that all depths share, as in routing networks (Rosenbaum et al., arXiv:1711.01239)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.policy import Policy
from sparsejax.routers.weights import Raw
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.step import make_grads_of_step

from support import ONE_DEVICE, assert_close, host_batch, host_params, on_mesh, put_params, to_numpy

ROWS, LENGTH, VOCAB, EXPERTS = 8, 6, 16, 4
ARRAYS = host_batch(ROWS, LENGTH, VOCAB)


def experiment(pooled=True, shape=ONE_DEVICE, accumulation=1, **fields):
    """A layer of its own and two stacked ones, which choose from one pool with routers of their own."""
    router = RouterConfig(selection=Policy(), weight=Raw(), balance=LoadBalance(scope="sequence"))
    spec = MoESpec(num_experts=EXPERTS, d_ff=8, capacity_factor=0.75, pooled=pooled, router=router)
    layers = {"prefix": ("moe",), "pattern": ("moe",), "repeats": 2, "blocks": {"moe": spec}}
    return ExperimentConfig(
        model=ModelConfig(d_model=8, num_heads=2, vocab_size=VOCAB, **layers, **fields),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]),
        train=TrainConfig(accumulation=accumulation),
    )


@functools.cache
def parameters():
    """On the host, of the model with a pool."""
    return host_params(lambda key: LanguageModel(key, experiment().model))


def pool_of(values):
    return {name: values["stack"]["pools"]["moe"][name][...] for name in ("w_in", "w_out")}


def copied():
    """The same model with the pool's experts written into every layer."""
    flat = dict(nnx.to_flat_state(parameters()))
    for name in ("w_in", "w_out"):
        leaf = flat.pop(("stack", "pools", "moe", name))
        twice = leaf.replace(np.stack([leaf[...]] * 2), axes=(None, *leaf.get_metadata()["axes"]))
        flat["stack", "prefix", 0, "feed_forward", "experts", name] = leaf
        flat["stack", "units", "blocks", 0, "feed_forward", "experts", name] = twice
    return nnx.from_flat_state(flat)


@functools.cache
def step(pooled=True, shape=ONE_DEVICE, accumulation=1, **fields):
    """((loss, (nll, correct, terms, reports, exits)), gradients)."""
    config = experiment(pooled, shape, accumulation, **fields)
    with on_mesh(shape) as mesh:
        state = put_params(parameters() if pooled else copied(), mesh), nnx.State({})
        arrays = shard_batch(ARRAYS, mesh, accumulation)
        found, grads = jax.jit(make_grads_of_step(config))(*state, arrays, jnp.int32(0))
        return to_numpy((found, grads.dense))


def test_a_pool_is_stored_once_and_routers_are_not():
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(parameters())}
    experts = [path for path, shape in shapes.items() if EXPERTS in shape and path[-1] in ("w_in", "w_out")]
    assert sorted(experts) == [("stack", "pools", "moe", "w_in"), ("stack", "pools", "moe", "w_out")]
    routers = {shape for path, shape in shapes.items() if path[-2:] == ("router", "weight")}
    assert routers == {(8, EXPERTS), (2, 8, EXPERTS)}


def test_it_is_the_model_whose_layers_have_equal_experts():
    """The same numbers, and as gradient of the pool the sum of theirs."""
    (found, gradients), (expected, each) = step(), step(pooled=False)
    assert_close(found, expected)
    stack, pool = each["stack"], pool_of(gradients)
    for name in ("w_in", "w_out"):
        own = stack["prefix"][0]["feed_forward"]["experts"][name][...]
        stacked = stack["units"]["blocks"][0]["feed_forward"]["experts"][name][...]
        assert all(np.abs(part).max() > 0 for part in (own, *stacked)), "every depth has its part"
        assert_close(pool[name], own + stacked.sum(0))


@pytest.mark.parametrize(
    "setting", [{"scan": False, "remat": "full"}, {"shape": (2, 2, 2), "accumulation": 2}], ids=str
)
def test_however_it_is_compiled(setting):
    assert_close(step(**setting), step())


def test_blocks_of_other_names_have_pools_of_their_own():
    spec = experiment().model.blocks["moe"]
    config = dataclasses.replace(experiment().model, prefix=("other",), blocks={"moe": spec, "other": spec})
    with on_mesh(ONE_DEVICE):
        model = jax.eval_shape(lambda key: LanguageModel(key, config), jax.random.key(0))
    assert set(model.stack.pools) == {"moe", "other"}
