"""Capacity: the golden table of the code bases, whole numbers against floats, and what holds for every formula."""

from typing import get_args

import numpy as np
import pytest

from sparsejax.blocks.moe import MoESpec
from sparsejax.ops.capacity import CONVENTIONS, CapacityConvention, capacity, capacity_table
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import ExpertChoice, TopK
from sparsejax.routers.weights import Raw

from reference import routing as slow

COLUMNS = ("mesh_tf", "flaxformer", "axlearn", "praxis", "vmoe", "per_choice", "megablocks", "olmo_core")
COLUMNS += ("tutel", "maxtext", "deepspeed", "torchscale", "per_token")
GOLDEN = {  # (S, E, k, CF) → slots by `COLUMNS`; `per_choice` is Megatron-LM's
    (64, 8, 2, 1.25): (10, 10, 10, 12, 20, 20, 20, 24, 20, 20, 20, 16, 10),
    (50, 8, 2, 1.25): (7, 8, 7, 8, 16, 16, 15, 16, 16, 16, 16, 14, 8),
    (2048, 64, 8, 1.0): (32, 32, 32, 32, 256, 256, 256, 256, 256, 256, 256, 64, 32),
}


@pytest.mark.parametrize("setting", GOLDEN, ids=str)
@pytest.mark.parametrize("name", COLUMNS)
def test_golden_values_of_the_peers(setting, name):
    tokens, experts, k, factor = setting
    assert capacity(tokens, experts, k, factor, name) == GOLDEN[setting][COLUMNS.index(name)]


def test_every_convention_is_in_the_golden_table_and_in_the_type():
    assert set(CONVENTIONS) == set(COLUMNS) == set(get_args(CapacityConvention))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_equals_the_formula_as_its_code_base_writes_it(name):
    """Numbers of experts and factors are such that floats are exact."""
    for experts, k, factor in [(8, 2, 1.25), (16, 1, 0.75), (4, 4, 2.0), (64, 8, 1.0), (2, 1, 0.5)]:
        for tokens in range(70):
            expected = slow.peer_capacity(name, tokens, experts, k, factor)
            assert capacity(tokens, experts, k, factor, name) == min(tokens, max(expected, 1)), (tokens, experts, k)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_slots_grow_with_tokens_and_stay_between_one_and_all(name):
    for experts, k, factor in [(8, 2, 1.25), (5, 1, 0.01), (7, 3, 100.0), (64, 6, 1 / 3)]:
        table = capacity_table(300, experts, k, factor, name)
        assert (np.diff(table) >= 0).all() and (table[1:] >= 1).all() and (table <= np.arange(301)).all()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_table_holds_every_number_of_unmasked_tokens(name):
    for training in (True, False):
        table = capacity_table(40, 5, 2, 1.1, name, training)
        assert table.dtype == np.int32
        assert list(table) == [capacity(n, 5, 2, 1.1, name, training) for n in range(41)]


@pytest.mark.parametrize(
    "tokens, experts, k, slots", [(400, 8, 1, 55), (50, 11, 1, 5), (25, 11, 4, 10), (1600, 64, 2, 55)]
)
def test_a_factor_of_1_1_is_eleven_tenths_and_not_a_float(tokens, experts, k, slots):
    assert np.ceil(1.1 * k * tokens / experts) == slots + 1, "the case no longer shows the rounding it is here for"
    assert capacity(tokens, experts, k, 1.1, "per_choice") == slots


def test_equals_the_reference_in_whole_numbers():
    for tokens in range(0, 200, 7):
        for experts, k, percent in [(8, 2, 125), (7, 3, 110), (16, 1, 70), (3, 3, 200), (5, 1, 33)]:
            for convention in ("per_choice", "per_token"):
                expected = slow.capacity(tokens, experts, k, percent, 100, convention == "per_choice")
                assert capacity(tokens, experts, k, percent / 100, convention) == expected


def test_never_more_slots_than_tokens_nor_less_than_one():
    assert capacity(16, 4, 2, 100.0, "per_choice") == 16
    assert capacity(1, 64, 1, 0.01, "per_choice") == 1
    assert capacity(0, 4, 2, 1.0, "per_choice") == 0


def test_a_factor_of_many_digits_does_not_overflow():
    assert capacity_table(100_000, 8, 2, 1 / 3, "per_choice")[-1] == 8334


class TestSpec:
    def test_a_quarter_of_the_tokens_in_torchscales_evaluation(self):
        spec = MoESpec(num_experts=8, capacity_convention="torchscale")
        assert [spec.capacities(50, mode)[-1] for mode in ("train", "eval", "generate")] == [14, 13, 50]
        factors = {"capacity_factor", "eval_capacity_factor"}
        assert factors & set(spec.unused()) == factors
        top_1 = RouterConfig(selection=TopK(k=1), weight=Raw())
        one = MoESpec(router=top_1, capacity_convention="torchscale")
        assert factors & set(one.unused()) == {"eval_capacity_factor"}
        assert not factors & set(MoESpec(capacity_convention="tutel").unused())

    def test_slots_that_are_the_selection_are_those_of_training(self):
        router = RouterConfig(selection=ExpertChoice(), allow_leak=True)
        spec = MoESpec(num_experts=8, capacity_convention="torchscale", router=router)
        assert np.array_equal(spec.capacities(50, "train"), spec.capacities(50, "eval"))

    def test_the_factor_of_generation_stands_for_all_tokens(self):
        factors = {name: MoESpec(num_experts=8, capacity_convention=name).factor("generate") for name in CONVENTIONS}
        assert {name for name, factor in factors.items() if factor == 8} == {
            "per_token", "mesh_tf", "flaxformer", "axlearn", "praxis"
        }  # fmt: skip
        assert set(factors.values()) == {4, 8}
