"""Presets: each a router that a layer runs with, and that leaves nothing unused but what it says."""

import jax
import numpy as np
import pytest

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


def test_they_differ():
    made = [preset() for preset in PRESETS.values()]
    assert len(set(map(repr, made))) == len(made) and all(type(router) is RouterConfig for router in made)


@pytest.mark.parametrize("name, scale", [("deepseek_v3", 2.5), ("deepseek_v4", 1.5), ("longcat", 6.0)])
def test_weights_are_scaled_as_in_the_model(name, scale):
    assert PRESETS[name]().weight.scale == scale


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
