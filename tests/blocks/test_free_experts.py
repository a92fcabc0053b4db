"""Experts without a network: no slot, no drop, no work; what they return; the ledger and the loads around them."""

import dataclasses

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import LossFree
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw

from support import FREE, ONE_DEVICE, assert_close, host_batch, moe_layer_params, moe_layer_runner

ROWS, LENGTH, WIDTH, EXPERTS = 4, 8, 12, 5
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2)
TOP_1 = RouterConfig(selection=TopK(k=1), weight=Raw())


def spec(router=TOP_1, **fields):
    return MoESpec(num_experts=EXPERTS, d_ff=10, capacity_factor=0.8, router=router, **fields)


def run(layer_spec, wanted=None, shape=ONE_DEVICE):
    """(x, y, report); with `wanted`, of a router that sends every token to that expert."""
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    params = moe_layer_params(layer_spec, BACKBONE)
    if wanted is not None:
        x[..., 0] = 1.0
        matrix = np.zeros_like(params["router"]["weight"][...])
        matrix[0, wanted] = 3.0
        params["router"]["weight"] = params["router"]["weight"].replace(matrix)
    return x, *moe_layer_runner(layer_spec, BACKBONE, shape)(params, x, host_batch(ROWS, LENGTH))


REAL = host_batch(ROWS, LENGTH)["segments"] > 0


def test_a_zero_expert_that_everyone_picks_leaves_exactly_nothing():
    _, y, report = run(spec(zero_experts=1), wanted=EXPERTS)
    assert (y == 0).all()
    assert report.assigned.tolist() == report.processed.tolist() == [0] * EXPERTS + [REAL.sum()]
    assert report.dropped.sum() == 0 and report.unserved == 0


def test_a_copy_is_the_weight_times_the_token():
    x, y, report = run(spec(copy_experts=1), wanted=EXPERTS)
    weight = np.exp(3.0) / (np.exp(3.0) + EXPERTS)
    assert_close(y, np.where(REAL[..., None], np.float32(weight) * x, 0).astype(np.float32))
    assert report.processed[EXPERTS] == REAL.sum()


def test_they_take_no_slot_and_do_no_work():
    """A layer in which every token picks a free expert has the slots of its experts with a network, all empty."""
    layer_spec = spec(zero_experts=1, copy_experts=2, constant_experts=2)
    _, _, report = run(layer_spec, wanted=EXPERTS + 3)
    assert report.slots == ROWS * EXPERTS * layer_spec.capacities(LENGTH, "train")[-1]
    metrics = layer_spec.metrics(Report(moe=report), "train")
    assert metrics["moe/experts_per_token"] == metrics["moe/slot_utilisation"] == metrics["moe/drop_fraction"] == 0
    assert layer_spec.processed_flops(Report(moe=report), BACKBONE) == 0


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_a_mesh_changes_nothing(shape):
    """With drops among those that have slots."""
    layer_spec = spec(RouterConfig(selection=TopK(k=4)), zero_experts=1, copy_experts=2, constant_experts=1)
    layer_spec = dataclasses.replace(layer_spec, num_experts=4, capacity_factor=0.5)
    one, many = run(layer_spec), run(layer_spec, shape=shape)
    assert_close(many, one)
    assert (one[2].dropped[:4] > 0).any() and (one[2].dropped[4:] == 0).all() and (one[2].processed[4:] > 0).any()


@pytest.mark.parametrize("rule", ["sign", "proportional", "momentum"])
def test_the_controller_moves_those_with_a_network_towards_their_part_of_all_pairs(rule):
    """Nine experts with a third of them free: 90 pairs make 10 each. The free ones are not told apart."""
    controller = LossFree(rate=0.1, rule=rule)
    loads = np.array([10, 20, 4, 10, 10, 10, 26, 0, 0], np.int32)

    @dataclasses.dataclass
    class Loads:
        assigned: np.ndarray

    state = np.zeros((controller.rows, 9), np.float32)
    bias = np.asarray(controller.update(state, Loads(loads), 1, free=3))[0]
    assert bias[1] < bias[0] < bias[2] and bias[0] == bias[3]
    assert bias[6] == bias[7] == bias[8] == bias[0], "10 pairs are a fair part: no more wanted than a free expert"
    alone = np.asarray(controller.update(state, Loads(loads), 1))[0]
    assert alone[6] < alone[7]


def test_sums_of_pairs():
    """Of k pairs a token, those that meet a network are counted apart."""
    layer_spec = spec(RouterConfig(selection=TopK(k=3)), zero_experts=2, copy_experts=2)
    _, _, report = run(layer_spec)
    metrics = layer_spec.metrics(Report(moe=report), "train")
    assert report.assigned.sum() == 3 * REAL.sum()
    assert metrics["moe/experts_per_token"] == report.processed[:EXPERTS].sum() / REAL.sum() < 3


@pytest.mark.parametrize("field", FREE)
def test_less_than_none_is_refused(field):
    with pytest.raises(ConfigError, match="-1 is negative") as error:
        MoESpec(**{field: -1})
    assert error.value.key == field


def test_without_a_capacity_they_are_the_same():
    """`grouped` against slots for everyone."""
    router = RouterConfig(selection=TopK(k=3))
    free = {"zero_experts": 1, "copy_experts": 2, "constant_experts": 2}
    roomy = dataclasses.replace(spec(router, **free), capacity_factor=10.0)
    (_, y, slots), (_, other_y, grouped) = run(roomy), run(dataclasses.replace(roomy, dispatch="grouped"))
    assert_close(other_y, y)
    assert np.array_equal(grouped.processed, slots.processed) and grouped.dropped.sum() == slots.dropped.sum() == 0
    assert np.array_equal(grouped.assigned, grouped.processed) and grouped.unserved == 0
