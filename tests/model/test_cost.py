"""The cost model: parameters agree exactly with the model that is built, FLOPs with hand-counted ones."""

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.cost import Cost
from sparsejax.base.reports import Report
from sparsejax.blocks.altup import AltUp, DynamicAltUp
from sparsejax.blocks.attention import AttentionSpec
from sparsejax.blocks.conditional_adapters import ConditionalAdapters
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.hyper_connections import HyperConnections, ManifoldHyperConnections
from sparsejax.blocks.light_heavy import LightHeavySpec
from sparsejax.blocks.merged import MergedSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.sequence import SequenceAltUp, StrideAndSkip
from sparsejax.blocks.soft import SoftSpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import COMPONENTS, component_costs, forward_flops, total
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.train.state import abstract_model

BASE = {"d_model": 16, "num_heads": 4, "vocab_size": 20}
SHARED = MoESpec(num_experts=4, d_ff=24, shared_experts=2)
MIXED = MoESpec(num_experts=4, d_ff=24, shared_experts=1, mix_shared=True)
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
    "pools": ModelConfig(
        **BASE,
        prefix=("moe",),
        pattern=("moe", "small"),
        repeats=2,
        blocks={"moe": dataclasses.replace(SHARED, pooled=True), "small": dataclasses.replace(SMALL, pooled=True)},
    ),
    "no pattern": ModelConfig(**BASE, prefix=("moe",), pattern=(), suffix=("dense",)),
    "shared experts, mixed": ModelConfig(**BASE, blocks={"dense": DenseSpec(), "moe": MIXED}),
    "attention alone": ModelConfig(
        **BASE, pattern=("alone", "dense"), blocks={"alone": AttentionSpec(), "dense": DenseSpec()}
    ),
    "soft": ModelConfig(**BASE, pattern=("soft",), blocks={"soft": SoftSpec(slots_per_expert=3, allow_leak=True)}),
    "merged": ModelConfig(**BASE, pattern=("merged",), blocks={"merged": MergedSpec(gated=True)}),
    "free experts": ModelConfig(
        **BASE, blocks={"dense": DenseSpec(), "moe": MoESpec(zero_experts=2, copy_experts=1, constant_experts=3)}
    ),
    "every third token": ModelConfig(**BASE, sequence=SequenceAltUp(stride=3, blocks=("dense",))),
    "every third token skips": ModelConfig(**BASE, sequence=StrideAndSkip(stride=3, blocks=("dense",))),
    "wide streams": ModelConfig(**BASE, streams=AltUp(streams=3, embedding="wide", collapse="concatenate")),
    "recycled streams, untied": ModelConfig(**BASE, tied_head=False, streams=AltUp(collapse="concatenate")),
    "streams normalised apart": ModelConfig(
        **BASE, streams=AltUp(embedding="wide", collapse="concatenate", final_norm="each_stream")
    ),
    "projected streams": ModelConfig(**BASE, streams=AltUp(streams=3, embedding="projected", collapse="projected")),
    "dynamic streams": ModelConfig(**BASE, streams=DynamicAltUp(streams=3, modes=5)),
    "hyper-connections": ModelConfig(**BASE, streams=HyperConnections(streams=3)),
    "static hyper-connections": ModelConfig(**BASE, streams=HyperConnections(streams=3, dynamic=False)),
    "hyper-connections on the manifold": ModelConfig(**BASE, streams=ManifoldHyperConnections(streams=3)),
    "light and heavy": ModelConfig(
        **BASE,
        num_kv_heads=2,
        qk_norm=True,
        causal=False,
        pattern=("dense", "deep"),
        blocks={"dense": DenseSpec(), "deep": LightHeavySpec(gated=True)},
        select=ConditionalAdapters(blocks=("dense",)),
    ),
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
    marks = {
        "ends": "stream_projections",
        "mixer": "streams",
        "sharing": "sequence",
        "phi": "router",
        "feed_forward']['scale": "router",
        "norm": "norm",
        "chooser": "selection",
        "adapter": "selection",
        "constants": "constant_experts",
        "pools": "experts",
        "shared": "shared_experts",
        "experts": "experts",
        "router": "router",
        "'mlp'": "mlp",
    }
    marks |= {"'light'": "mlp", "'heavy'": "mlp", "_attention'": "attention_projections"}
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
    assert {part: cost.flops(keys=7, row_length=13) for part, cost in component_costs(config).items()} == expected
    assert forward_flops(config, tokens=5, keys=35) == 5 * sum(expected.values())
    assert spec.pair_flops(config) == 2 * 3 * 16 * 24
    done = Report(moe=SimpleNamespace(processed=np.array([5, 3, 2, 1])))
    assert spec.processed_flops(done, config) == 11 * spec.pair_flops(config)
    processed = 11 * spec.pair_flops(config)
    assert forward_flops(config, 5, 35, processed) == 5 * (sum(expected.values()) - expected["experts"]) + processed


def test_two_blocks_with_different_k_add_up():
    config = CONFIGS["prefix and suffix"]
    pairs = 4 * 2 * SHARED.pair_flops(config) + 2 * 3 * SMALL.pair_flops(config)
    assert component_costs(config)["experts"].routed == pairs
    assert DenseSpec().processed_flops(Report(), config) == 0


def test_experts_without_a_network_cost_what_their_few_matrices_cost():
    """Six with a network, two of each other kind; of a token's four pairs two meet a network when loads are equal."""
    given = {"num_experts": 6, "d_ff": 8, "router": RouterConfig(selection=TopK(k=4))}
    config, spec = CONFIGS["free experts"], MoESpec(**given, zero_experts=2, copy_experts=2, constant_experts=2)
    plain, costs = MoESpec(**given).costs(config), spec.costs(config)
    assert costs["experts"].parameters == plain["experts"].parameters == 6 * 2 * 16 * 8
    assert costs["experts"].routed == 2 * 2 * 2 * 16 * 8 == plain["experts"].routed / 2
    assert costs["constant_experts"] == Cost(parameters=2 * 3 * 16, active=2 * 3 * 16, per_token=2 * 2 * 3 * 16)
    assert costs["router"].per_token == 2 * 16 * 12
    done = Report(moe=SimpleNamespace(processed=np.arange(12)))
    assert spec.processed_flops(done, config) == (0 + 1 + 2 + 3 + 4 + 5) * spec.pair_flops(config)


def test_streams_cost_their_mixing_and_a_wide_head():
    """K = 3: K² + K multiply-adds of D numbers in each of 4 layers, and a head that reads K · D."""
    wide = component_costs(CONFIGS["wide streams"])
    assert wide["streams"] == Cost(parameters=4 * 12, active=4 * 12, per_token=4 * 2 * 12 * 16)
    assert wide["embedding"].parameters == 20 * 3 * 16 and wide["head"].per_token == 2 * 20 * 3 * 16
    matrices = Cost.of_matrices(2 * 2 * 16 * 16)
    assert component_costs(CONFIGS["projected streams"])["stream_projections"] == matrices


def test_layers_on_every_kth_token_cost_a_kth_and_their_attention_a_k_squareth():
    plain = ModelConfig(**BASE, pattern=("dense",), repeats=2)
    whole = component_costs(plain)
    shortened = component_costs(dataclasses.replace(plain, sequence=SequenceAltUp(stride=4)))
    for name in ("attention_projections", "mlp"):
        assert shortened[name].per_token == whole[name].per_token / 4 > 0
        assert shortened[name].parameters == whole[name].parameters
    assert shortened["attention_scores"].per_key == whole["attention_scores"].per_key / 16 > 0
    assert shortened["head"] == whole["head"]
    assert shortened["sequence"] == Cost(parameters=6, active=6)
