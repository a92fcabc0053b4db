"""Ratios from counts, by hand; what random routing would show, against draws."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.ratios import balance_floor, collapsed, memory_ratios, moe_ratios, over_layers
from sparsejax.base.reports import MemoryReport, MoEReport, to_host


def report(**fields):
    """Ten tokens with two pairs each over four experts; two pairs are dropped, one token loses everything."""
    given = {
        "assigned": [10, 6, 4, 0],
        "processed": [8, 6, 4, 0],
        "dropped_capacity": [2, 0, 0, 0],
        "tokens": 10,
        "masked": 3,
        "unserved": 1,
        "slots": 32,
        "probability_sum": [4.0, 3.0, 2.0, 1.0],
        "entropy_sum": 10 * math.log(4) / 2,
        "z_sum": 25.0,
        "balance_sum": 2.4,
        "balance_units": 2.0,
    } | fields
    return MoEReport(**{name: np.asarray(value) for name, value in given.items()})


def test_ratios_of_a_layer():
    ratios = moe_ratios(report(), experts_per_token=2)
    assert ratios.pop("moe/balance_floor") == balance_floor(10, 4, 2)
    assert ratios == pytest.approx(
        {
            "moe/drop_fraction": 2 / 20,
            "moe/unserved_fraction": 1 / 10,
            "moe/load_max_over_mean": 2.0,
            "moe/load_cv": np.std([10, 6, 4, 0]) / 5,
            "moe/dead_experts": 1,
            "moe/router_entropy": 0.5,
            "moe/router_z": 2.5,
            "moe/slots_per_token": 3.2,
            "moe/slot_utilisation": 18 / 32,
            "moe/experts_per_token": 1.8,
            "moe/balance_loss": 1.2,
        }
    )


def test_experts_without_slots_fill_none():
    ratios = moe_ratios(report(), experts_per_token=2, free=2)
    assert ratios["moe/slot_utilisation"] == 14 / 32 and ratios["moe/experts_per_token"] == 1.4
    assert ratios["moe/drop_fraction"] == 2 / 20


def test_an_expert_is_dead_below_a_hundredth_of_the_mean_load():
    assert moe_ratios(report(assigned=[299, 97, 3, 1]), 2)["moe/dead_experts"] == 0
    assert moe_ratios(report(assigned=[401, 0, 0, 1]), 2)["moe/dead_experts"] == 3


def test_a_layer_that_saw_only_padding_is_finite():
    nothing = {"assigned": [0] * 4, "processed": [0] * 4, "dropped_capacity": [0] * 4, "tokens": 0, "unserved": 0}
    sums = {"probability_sum": [0.0] * 4, "entropy_sum": 0.0, "z_sum": 0.0, "balance_sum": 0.0, "balance_units": 0.0}
    assert np.isfinite(list(moe_ratios(report(**nothing, **sums), 2).values())).all()


def test_over_layers_takes_means_of_those_that_have_it_and_sums_dead_experts():
    rows = [
        {"moe/drop_fraction": 0.1, "moe/dead_experts": 1.0},
        {},
        {"moe/drop_fraction": 0.3, "moe/dead_experts": 2.0},
    ]
    assert over_layers(rows) == pytest.approx({"moe/drop_fraction": 0.2, "moe/dead_experts": 3.0})
    assert over_layers([{}, {}]) == {}


@pytest.mark.parametrize("tokens, experts, k", [(40, 8, 1), (400, 8, 2), (4000, 16, 1), (4000, 64, 8), (1000, 2, 1)])
def test_balance_floor_is_the_mean_maximum_of_random_routing(tokens, experts, k):
    rng = np.random.default_rng(3)
    maxima = [
        np.bincount(rng.random((tokens, experts)).argsort(-1)[:, :k].ravel(), minlength=experts).max()
        for _ in range(60)
    ]
    drawn = np.array(maxima) * experts / (tokens * k)
    assert balance_floor(tokens, experts, k) == pytest.approx(
        drawn.mean(), abs=0.02 * (drawn.mean() - 1) + 4 * drawn.std() / math.sqrt(60)
    )


def test_balance_floor_where_nothing_can_be_uneven():
    assert balance_floor(0, 8, 2) == balance_floor(10, 4, 4) == 1.0


def test_what_is_recorded_keeps_its_kind_on_the_host():
    dtypes = {"int32": "int64", "float32": "float64", "bfloat16": "float64", "bool": "bool"}
    arrays = {name: jnp.ones(3, name) for name in dtypes}
    assert {name: array.dtype.name for name, array in to_host(arrays).items()} == dtypes


def memory_report(loads, **more):
    counts = {"lookups": np.sum(loads), "tokens": np.int64(10), "masked": np.int64(0)}
    return MemoryReport(loads=np.asarray(loads), **(counts | more))


def test_memory_ratios_of_two_tables_by_hand():
    report = memory_report([4, 4, 0, 0, 8, 0, 0, 0], gate_sum=np.float64(2.5))
    ratios = memory_ratios(report, (4, 4), row_bytes=32)
    assert ratios == {
        "memory/mean_gate": 0.25,
        "memory/bucket_entropy": pytest.approx(0.25),  # log 2 / log 4 and 0
        "memory/max_load": pytest.approx(0.75),
        "memory/rows_touched": 3,
        "memory/dead_rows": 5,
        "memory/bytes_per_token": pytest.approx(16 / 10 * 32),
    }


def test_rows_touched_of_a_binned_table_are_estimated_from_empty_bins():
    rng, bins, rows = np.random.default_rng(0), 65_536, 2**22
    touched = 100_000
    loads = np.bincount(rng.integers(0, bins, touched), minlength=bins)
    ratios = memory_ratios(memory_report(loads), (rows,), row_bytes=4)
    assert abs(ratios["memory/rows_touched"] - touched) < 0.02 * touched
    assert ratios["memory/rows_touched"] + ratios["memory/dead_rows"] == rows
    full = memory_ratios(memory_report(np.ones(bins)), (rows,), row_bytes=4)
    assert "memory/rows_touched" not in full  # nothing is left to estimate from


def test_no_lookups_at_all_are_no_collapse():
    nothing = memory_report([0, 0, 0, 0])
    assert collapsed(nothing.loads, (4,), 0.5) is None
    assert memory_ratios(nothing, (4,), 1)["memory/bucket_entropy"] == 0


def test_a_collapse_is_judged_by_what_so_many_lookups_could_reach():
    few = np.zeros(4096)
    few[:20] = 1  # every lookup another row: cannot be better
    assert collapsed(memory_report(few).loads, (4096,), 0.9) is None
    one = np.zeros(4096)
    one[:2] = 1000, 10
    assert collapsed(memory_report(one).loads, (4096,), 0.5) == pytest.approx(0.0554 / math.log(1010), rel=0.02)
