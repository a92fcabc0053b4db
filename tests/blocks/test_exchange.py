"""A dropless layer whose experts are split over devices: what its bounded buffers drop, and what it says of them."""

import functools
from typing import Any

import numpy as np
import pytest

from sparsejax.base.ratios import moe_ratios
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.balance import NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw

from support import ONE_DEVICE, assert_close, host_batch, moe_layer_params, moe_layer_runner

ROWS, LENGTH, K = 8, 16, 2
BACKBONE = ModelConfig(d_model=8, num_heads=2)
SHAPE = (1, 4, 1)


def spec_with(buffer_factor: float, dispatch: str = "grouped", **more: Any) -> MoESpec:
    router = RouterConfig(selection=TopK(k=K), weight=Raw(), balance=NoBalance())
    return MoESpec(num_experts=8, d_ff=4, router=router, dispatch=dispatch, buffer_factor=buffer_factor, **more)


@functools.cache
def run(buffer_factor: float, shape=SHAPE, mode="train", dispatch="grouped", **more):
    spec = spec_with(buffer_factor, dispatch, **more)
    params = moe_layer_params(spec, BACKBONE)
    weight = params["router"]["weight"]
    loads = np.linspace(0, 2, 8, dtype=np.float32)  # the last experts are the favourites
    params["router"]["weight"] = weight.replace(np.concatenate([loads[None], weight[...][1:]]))
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 8)).astype(np.float32)
    x[..., 0] = 1
    return moe_layer_runner(spec, BACKBONE, shape)(params, x, host_batch(ROWS, LENGTH), mode=mode)


def test_what_does_not_fit_is_a_drop_of_its_own_cause():
    (y, report), (whole, _) = run(1.0), run(4.0)
    assert report.exchange.dropped.sum() > 0 and (report.dropped_capacity == 0).all()
    np.testing.assert_array_equal(report.assigned, report.processed + report.dropped)
    np.testing.assert_array_equal(report.dropped, report.exchange.dropped)
    lost_everything = (y == 0).all(-1) & (host_batch(ROWS, LENGTH)["segments"] > 0)
    assert report.unserved == lost_everything.sum()
    untouched = (y == whole).all(-1)
    assert 0 < (~untouched).sum() <= report.dropped.sum(), "others get what they got"


def test_the_report_says_how_full_buffers_were_and_what_would_have_been_safe():
    (_, report), even = run(1.0), ROWS * LENGTH * K
    assert report.exchange.room == even and report.exchange.received == report.processed.sum() < even
    assert report.exchange.demand.sum() == SHAPE[1]
    ratios = moe_ratios(report, K)
    assert ratios["moe/buffer_occupancy"] == report.processed.sum() / even
    of_device = report.assigned.reshape(SHAPE[1], -1).sum(-1)
    needed = of_device.max() / (even / SHAPE[1])
    safe = ratios["moe/safe_buffer_factor"]
    assert needed <= safe < needed + 1 / 8
    assert (run(safe)[1].dropped == 0).all() and (run(safe - 1 / 4)[1].dropped > 0).any()


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_generation_has_room_for_all(mode):
    _, report = run(1.0, mode=mode)
    assert (report.dropped > 0).any() == (mode == "eval")


@pytest.mark.parametrize("dispatch", ["gather", "grouped"])
def test_generation_computes_pairs_and_no_slots_for_everyone(dispatch):
    """The same numbers as with slots for all, which training with ample capacity has."""
    (y, report), (expected, _) = run(4.0, ONE_DEVICE, "generate", dispatch), run(4.0)
    real = host_batch(ROWS, LENGTH)["segments"] > 0
    assert_close(y[real], expected[real])
    assert report.processed.sum() == real.sum() * K
    assert report.slots <= 1.5 * ROWS * LENGTH * K < 8 * ROWS * LENGTH


@pytest.mark.parametrize("way", [{"exchange": "all_gather"}, {"replicated": True}])
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 2)])
def test_other_ways_to_an_expert_give_the_same(way, shape):
    """The tokens of all to every device, or every expert: the smallest buffers drop nothing."""
    (y, report), (expected, whole) = run(1.0, shape, **way), run(4.0, ONE_DEVICE)
    assert_close(y, expected)
    np.testing.assert_array_equal(report.processed, whole.processed)
    assert (report.dropped == 0).all()
    if "exchange" in way:
        assert report.exchange.received == report.processed.sum() <= report.exchange.room
    else:
        assert report.exchange is None


def test_few_tokens_are_given_to_everyone():
    spec = spec_with(1.0)
    assert [spec.transport("tpu", tokens) for tokens in (3, 4, None)] == ["all_gather", *["ragged_all_to_all"] * 2]
