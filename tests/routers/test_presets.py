"""Presets: each a router that a layer runs with, and that leaves nothing unused but what it says."""

import operator

import jax
import numpy as np
import pytest
from contracts.test_router_contract import AXES as REGISTRIES

from sparsejax.base.config import unused
from sparsejax.base.config_view import walk
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.presets import PRESETS

from support import ONE_DEVICE, host_batch, moe_layer_params, moe_layer_runner

BACKBONE = ModelConfig(d_model=8, num_heads=2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_runs_with_it(name):
    dispatch = "grouped" if name == "dts_gate" else "gather"  # begins with nearly all experts
    spec = MoESpec(num_experts=16, d_ff=4, capacity_factor=1.25, dispatch=dispatch, router=PRESETS[name]())
    x = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
    run, key = moe_layer_runner(spec, BACKBONE, ONE_DEVICE), jax.random.key(0)
    arrays = host_batch(4, 16)
    y, report = run(moe_layer_params(spec, BACKBONE), x, arrays | {"domains": arrays["tokens"] % 8}, key)
    assert np.isfinite(y).all() and np.abs(y).max() > 0
    assert np.array_equal(report.assigned, report.processed + report.dropped)
    if not spec.router.selection.traits.thresholds:  # of which the first step knows nothing: everybody is above 0
        assert report.processed.sum() > 0.5 * report.assigned.sum()


def row(score="softmax", selection="top_k", weight="raw", balance="load_balance", **numbers):
    """What a preset is on the axes; in `numbers`, `_` stands for the dot after an axis."""
    axes = {"score": score, "selection": selection, "weight": weight, "balance": balance}
    return (
        {"logits": "linear", "noise": "none", "controller": "none", "limit": "none", "order": "choice_major"}
        | {"overflow": "drop"}
        | axes
        | numbers
    )


SECOND = {"selection": "second_expert", "weight": "renormalized", "balance.count": "first"}
GOLDEN = {
    "switch": row(k=1, jitter=0.01, z_loss=0.0, **{"balance.coefficient": 0.01}),
    "gshard": row(**SECOND, z_loss=0.0, **{"selection.policy": "random", "selection.threshold": 0.5}),
    "mtf_top2": row(**SECOND, z_loss=0.0, **{"selection.policy": "random", "selection.threshold": 0.2}),
    "st_moe": row(**SECOND, z_loss=0.001, **{"selection.threshold": 0.2, "balance.coefficient": 0.01}),
    "shazeer17": row(
        weight="renormalized",
        balance="importance_load",
        noise="learned",
        **{"balance.importance": 0.1, "balance.load": 0.1, "balance.form": "shazeer", "logits.start": "zeros"},
    ),
    "vmoe": row(
        balance="importance_load", noise="gaussian", k=2, **{"balance.importance": 0.005, "balance.load": 0.005}
    ),
    "vmoe_bpr": row(balance="importance_load", noise="gaussian", k=2, order="priority"),
    "expert_choice": row(selection="expert_choice", balance="none", k=2, **{"selection.cap": None}),
    "expert_choice_capped": row(selection="expert_choice", balance="none", k=2, **{"selection.cap": 3}),
    "base": row("sigmoid", "balanced_assignment", balance="none", k=1),
    "s_base": row("sigmoid", "sinkhorn", balance="none", k=1),
    "hash": row(selection="hash", weight="constant", k=1),
    "stable_moe": row("sigmoid", k=1),
    "rl_r": row(selection="policy", weight="constant", k=1),
    "routing_network": row(selection="policy", weight="constant", balance="none", k=1),
    "thor": row(selection="random", weight="constant", k=1),
    "m6_t": row(selection="prototypes", k=2),
    "mixtral": row(weight="renormalized", k=2, **{"balance.scope": "microbatch"}),
    "qwen3": row(weight="renormalized", k=8, **{"balance.scope": "global", "balance.coefficient": 0.001}),
    "olmoe": row(k=8, z_loss=0.001, **{"balance.coefficient": 0.01}),
    "deepseek_moe": row(k=6, z_loss=0.0),
    "deepseek_v3": row(
        "sigmoid",
        weight="renormalized",
        controller="loss_free",
        limit="groups",
        k=8,
        **{"limit.groups": 8, "limit.kept": 4, "limit.best": 2, "controller.rate": 0.001, "weight.scale": 2.5},
        **{"balance.scope": "sequence", "balance.coefficient": 0.0001},
    ),
    "deepseek_v4": row(
        "sqrt_softplus",
        weight="renormalized",
        controller="loss_free",
        k=6,
        **{"controller.rate": 0.001, "weight.scale": 1.5, "balance.scope": "sequence", "balance.coefficient": 0.0001},
    ),
    "deepseek_v4_hash": row("sqrt_softplus", "hash", "renormalized", k=6, **{"weight.scale": 1.5}),
    "quantile_balanced": row("sigmoid", weight="renormalized", balance="none", controller="quantile"),
    "trinity": row(
        "sigmoid",
        weight="renormalized",
        balance="none",
        controller="loss_free",
        k=4,
        **{"controller.rule": "soft_clamped"},
    ),
    "moe_plus_plus": row(k=2, residual=True, **{"balance.free_weight": 0.75}),
    "longcat": row(controller="loss_free", k=12, **{"controller.rule": "proportional", "weight.scale": 6.0}),
    "remoe": row("relu", "positive", balance="none", controller="sparsity"),
    "xmoe": row(logits="cosine", k=1, jitter=0.0),
    "task_moe": row(**SECOND, logits="by_domain"),
    "dselect_k": row("relu", "positive", balance="selector_entropy", logits="dselect_k", **{"logits.selectors": 2}),
    "dts_gate": row(selection="positive", noise="gumbel", controller="annealing"),
    "expert_threshold": row(selection="threshold", balance="none", controller="expert_threshold", k=2),
}
"""Presets as papers and models have them."""


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_where_its_paper_is_on_the_axes(name):
    router, expected = PRESETS[name](), dict(GOLDEN[name])
    assert expected.pop("k", router.selection.experts_per_token) == router.selection.experts_per_token
    for key, value in expected.items():
        found = operator.attrgetter(key)(router)
        assert (REGISTRIES[key].name_of(found) if key in REGISTRIES else found) == value, key


def test_the_table_has_every_preset_and_no_other():
    assert set(GOLDEN) == set(PRESETS)


def test_they_differ():
    made = [preset() for preset in PRESETS.values()]
    assert len(set(map(repr, made))) == len(made) and all(type(router) is RouterConfig for router in made)


@pytest.mark.parametrize("name", PRESETS)
def test_it_sets_nothing_that_has_no_effect(name):
    """A config file that takes it would be refused."""
    router = PRESETS[name]()
    values = {path: (value, default) for path, value, default in walk(router, None)}
    assert [path for path in unused(router) if values[path][0] != values[path][1]] == []


@pytest.mark.parametrize("name", PRESETS)
def test_its_name_is_in_the_readme(name):
    from runs import ROOT

    assert f"`{name}`" in (ROOT / "README.md").read_text()
