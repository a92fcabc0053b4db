"""The cost model: parameters agree exactly with the model that is built, FLOPs with hand-counted ones."""

import math
from collections import Counter

import jax
import pytest
from flax import nnx

from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import COMPONENTS, component_costs, forward_flops, total
from sparsejax.routers.router import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.train.state import abstract_model

BASE = {"d_model": 16, "num_heads": 4, "vocab_size": 20}
SHARED = MoESpec(num_experts=4, d_ff=24, shared_experts=2)
SMALL = MoESpec(num_experts=6, d_ff=8, router=RouterConfig(selection=TopK(k=3)))
CONFIGS = {
    "default": ModelConfig(),
    "dense": ModelConfig(**BASE, pattern=("dense",), repeats=3),
    "gated": ModelConfig(**BASE, blocks={"dense": DenseSpec(gated=True, d_ff=40), "moe": MoESpec(gated=True, d_ff=12)}),
    "grouped queries": ModelConfig(**BASE, num_kv_heads=2),
    "one key head, wide heads": ModelConfig(**BASE, num_kv_heads=1, head_dim=10),
    "qk norm": ModelConfig(**BASE, num_kv_heads=2, qk_norm=True),
    "untied head": ModelConfig(**BASE, tied_head=False),
    "shared experts": ModelConfig(**BASE, blocks={"dense": DenseSpec(), "moe": SHARED}),
    "prefix and suffix": ModelConfig(
        **BASE,
        prefix=("dense", "small"),
        pattern=("moe", "dense", "moe"),
        repeats=2,
        suffix=("small",),
        blocks={"dense": DenseSpec(gated=True), "moe": SHARED, "small": SMALL},
    ),
    "no pattern": ModelConfig(**BASE, prefix=("moe",), pattern=(), suffix=("dense",)),
    "unrolled": ModelConfig(**BASE, scan=False, qk_norm=True, tied_head=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_by_component_are_those_of_the_model(name, one_device):
    config = CONFIGS[name]
    built = Counter()
    _, params, rest = abstract_model(config)
    for path, param in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        built[component(jax.tree_util.keystr(path))] += math.prod(param.shape)
    costs = component_costs(config)
    assert {part: cost.parameters for part, cost in costs.items() if cost.parameters} == built
    assert total(config).parameters == sum(built.values())
    assert set(costs) <= set(COMPONENTS)
    assert not jax.tree.leaves(rest)


def component(path: str) -> str:
    """The component to which a parameter of the built model belongs."""
    marks = {"norm": "norm", "shared": "shared_experts", "experts": "experts", "router": "router", "'mlp'": "mlp"}
    marks |= {"'attention'": "attention_projections", "embedding": "embedding", "head": "head"}
    return next(part for mark, part in marks.items() if mark in path)


def test_active_parameters_are_all_but_the_experts_that_are_not_selected():
    config = CONFIGS["prefix and suffix"]
    left_out = 4 * (4 - 2) * 2 * 16 * 24 + 2 * (6 - 3) * 2 * 16 * 8
    assert total(config).parameters - total(config).active == left_out
    dense = total(CONFIGS["dense"])
    assert dense.active == dense.parameters


def test_flops_counted_by_hand():
    """One gated MoE layer with a shared expert: D = 16, N = 4, M = 2, H = 4, E = 4, k = 3, F = 24, V = 20."""
    spec = MoESpec(num_experts=4, d_ff=24, gated=True, shared_experts=1, router=RouterConfig(selection=TopK(k=3)))
    config = ModelConfig(**BASE, num_kv_heads=2, pattern=("moe",), repeats=1, blocks={"moe": spec})
    expected = {
        "embedding": 0,
        "head": 2 * 16 * 20,
        "norm": 0,
        "attention_projections": 2 * 16 * (4 * 4 + 2 * 4 + 2 * 4 + 4 * 4),
        "attention_scores": 7 * 2 * (4 * 4 + 4 * 4),
        "router": 2 * 16 * 4,
        "experts": 3 * 2 * 3 * 16 * 24,
        "shared_experts": 2 * 3 * 16 * 24,
    }
    assert {part: cost.flops(keys=7) for part, cost in component_costs(config).items()} == expected
    assert forward_flops(config, tokens=5, keys=35) == 5 * sum(expected.values())
    assert spec.pair_flops(config) == 2 * 3 * 16 * 24
    processed = 11 * spec.pair_flops(config)
    assert forward_flops(config, 5, 35, processed) == 5 * (sum(expected.values()) - expected["experts"]) + processed


def test_two_blocks_with_different_k_add_up():
    config = CONFIGS["prefix and suffix"]
    pairs = 4 * 2 * SHARED.pair_flops(config) + 2 * 3 * SMALL.pair_flops(config)
    assert component_costs(config)["experts"].routed == pairs
    assert DenseSpec().pair_flops(config) == 0
