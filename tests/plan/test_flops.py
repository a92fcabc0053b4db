"""FLOPs by the config against those of the program that XLA compiles: ideal, padded and compiled are three numbers.

Unrolled, d = 512, one row of 64 tokens: small enough to compile, wide enough that only the matrix products count. The
design allows 5 %; on both supported versions of JAX the numbers are equal.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax.base.structs import Batch
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.light_heavy import LightHeavySpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import Masked, NextToken
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs, mean_keys
from sparsejax.plan.abstract import abstract_batch
from sparsejax.plan.products import read_dots
from sparsejax.plan.work import work
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import abstract_model, abstract_state, make_optimizer

T = 64
TOLERANCE = 0.01
TOP1 = RouterConfig(selection=TopK(k=1), weight=Raw())
EINSUM = {"dispatch": "einsum", "capacity_factor": 4.0, "router": TOP1}
MODELS = {
    "gather": {  # with a dense layer, gated networks, grouped queries and a head of its own
        "num_kv_heads": 2,
        "tied_head": False,
        "blocks": {"dense": DenseSpec(gated=True, d_ff=1024), "moe": MoESpec(d_ff=512, capacity_factor=1.5)},
    },
    "einsum": {  # with top-1 and a shared expert; many slots and small experts, so that the movement shows
        "pattern": ("moe",),
        "qk_norm": True,
        "blocks": {"moe": MoESpec(num_experts=4, d_ff=128, shared_experts=1, **EINSUM)},
    },
    "light and heavy": {  # shares of a row that are no whole numbers of tokens, blocks of nearby keys
        "pattern": ("deep",),
        "causal": False,
        "blocks": {"deep": LightHeavySpec(capacity=0.11, query_capacity=0.11, key_capacity=0.22, radius=12)},
    },
}


def model_of(name):
    return ModelConfig(d_model=512, num_heads=8, vocab_size=256, repeats=1, scan=False, **MODELS[name])


@pytest.fixture
def dots_of(one_device):
    """`dots_of(name)`: the matrix products of the compiled forward pass; `training=True`: of loss and gradient."""
    return lambda name, training=False: compiled_dots(name, training, one_device)


@functools.cache
def compiled_dots(name, training, mesh):
    task = NextToken() if model_of(name).causal else Masked()
    config = ExperimentConfig(model=model_of(name), data=DataConfig(batch_size=1, sequence_length=T, task=task))
    state = abstract_state(config, make_optimizer(config), mesh)
    graph, _, _ = abstract_model(config.model)

    def forward(params, microbatches):
        microbatch = Batch(**{key: rows[0] for key, rows in microbatches.items()})
        return nnx.merge(graph, params, state.model_state)(microbatch, mode="train").logits

    def loss(params, microbatches):
        return jnp.square(forward(params, microbatches)).sum()

    function = jax.value_and_grad(loss) if training else forward
    return read_dots(jax.jit(function).lower(state.params, abstract_batch(config, mesh)).compile().as_text())


def as_executed(name, step):
    """FLOPs of the row, every slot being computed and the whole T × T square of attention, as XLA does it."""
    model = model_of(name)
    scores = component_costs(model)["attention_scores"]
    more = scores.flops(T, T) - scores.flops(mean_keys(model, T), T)
    return T * (work(model, T).flops_per_token[f"{step}_padded"] + more * {"forward": 1, "training": 3}[step])


@pytest.mark.parametrize("name", MODELS)
def test_the_compiled_forward_pass_is_the_padded_plan(name, dots_of):
    compiled = sum(dot.flops for dot in dots_of(name))
    assert compiled == pytest.approx(as_executed(name, "forward"), rel=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_the_compiled_gradient_is_the_padded_plan(name, dots_of):
    compiled = sum(dot.flops for dot in dots_of(name, training=True))
    assert compiled == pytest.approx(as_executed(name, "training"), rel=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_the_tolerance_tells_ideal_and_padded_apart(name):
    planned = work(model_of(name), T).flops_per_token
    for step in ("forward", "training"):
        assert planned[f"{step}_padded"] > (1 + 2 * TOLERANCE) * planned[step]


def test_experts_compute_every_slot_and_not_only_the_selected(dots_of):
    (train,) = (row for row in work(model_of("gather"), T).slots if row.mode == "train")
    dots = dots_of("gather")
    experts = sum(dot.flops for dot in dots if "/experts/" in dot.scope)
    assert experts == T * train.padded_flops == T * 1.5 * train.ideal_flops
    router = sum(dot.flops for dot in dots if "/route/" in dot.scope)
    assert router == 2 * T * 512 * 8
