"""One planted case for each alert, and what is next to it and must be silent."""

import numpy as np
import pytest

from sparsejax.base.alerts import WINDOWS, Seen, alerts

EVEN = np.full(8, 1000)


def history(*loads, **values):
    """Windows with these loads, or `WINDOWS` of rows whose `a__b` takes the values of a list in turn."""
    count = len(loads) or WINDOWS
    rows = [{"step": 10 * n} | {key.replace("__", "/"): each[n] for key, each in values.items()} for n in range(count)]
    arrays = [{"03_moe/assigned": np.asarray(load), "03_moe/tokens": np.asarray(np.sum(load))} for load in loads]
    return [Seen(row, array) for row, array in zip(rows, arrays or [{}] * count)]


def kinds(*loads, **values):
    return [alert.kind for alert in alerts(history(*loads, **values))]


def favourites(*some, rest=5):
    load = np.full(8, rest)
    load[list(some)] = 4000
    return load


def test_nothing_is_wrong_with_an_even_run():
    noise = np.random.default_rng(0).multinomial(8000, np.full(8, 1 / 8), WINDOWS)
    assert kinds(*noise, moe__drop_fraction=[0.02] * 8, moe__balance_loss=[1.01] * 8, loss__balance=[0.01] * 8) == []
    assert alerts([]) == []


def test_collapse():
    found = alerts(history(*[favourites(2)] * 3))
    assert [alert.kind for alert in found] == ["collapse"]
    assert found[0].layer == "03_moe" and found[0].step == 20 and "model.blocks.moe.router" in found[0].remedy
    assert kinds(*[favourites(2)] * 2) == []  # may be chance
    assert kinds(*[favourites(2, 3, 5, 6, rest=100)] * 3) == []


def test_collapse_is_measured_against_the_experts_of_a_token():
    windows = history(*[favourites(2, 3)] * 3)
    two = [Seen(seen.row, seen.arrays | {"03_moe/tokens": seen.arrays["03_moe/tokens"] // 2}) for seen in windows]
    assert [alert.kind for alert in alerts(two)] == ["collapse"]
    assert "collapse" not in [alert.kind for alert in alerts(windows)]


def test_starvation():
    starved = np.array([1000, 1000, 1000, 1000, 1000, 0, 1000, 3])
    (alert,) = alerts(history(starved, starved, starved))
    assert alert.kind == "starvation" and "2 of 8 experts" in alert.text and alert.text.endswith("5, 7")
    assert kinds(starved, EVEN, starved) == []
    assert kinds(*[starved // 100] * 3) == []  # so few pairs that none at all may be chance


def test_oscillating_bias():
    high = np.array([1500, 500] * 4)
    assert kinds(*[high, high[::-1]] * 4) == ["oscillating bias"]
    assert kinds(*[high] * 8) == []
    assert kinds(*[high, high[::-1]] * 3) == []


def test_drops_rising():
    assert kinds(moe__drop_fraction=list(np.linspace(0.02, 0.2, 8))) == ["drops rising"]
    assert kinds(moe__drop_fraction=list(np.linspace(0.2, 0.02, 8))) == []
    assert kinds(moe__drop_fraction=[0.2] * 8) == []


def test_balance_loss_that_no_longer_moves():
    assert kinds(moe__balance_loss=[1.8] * 8, loss__balance=[0.02] * 8) == ["balance loss stuck"]
    assert kinds(moe__balance_loss=[1.8] * 8, loss__balance=[0.0] * 8) == []  # it has no weight
    assert kinds(moe__balance_loss=list(np.linspace(2, 1.5, 8)), loss__balance=[0.02] * 8) == []
    assert kinds(moe__balance_loss=[1.02] * 8, loss__balance=[0.02] * 8) == []


def test_router_logits_growing():
    assert kinds(moe__router_z=list(np.geomspace(20, 400, 8))) == ["router logits growing"]
    assert kinds(moe__router_z=list(np.geomspace(2, 40, 8))) == []
    assert kinds(moe__router_z=[400.0] * 8) == []


@pytest.mark.parametrize("group", ["select", "sequence"])
def test_selector_without_room(group):
    assert kinds(**{f"{group}__unplaced_fraction": [0.2] * 8}) == ["selector stuck at its budget"]
    assert kinds(**{f"{group}__unplaced_fraction": [0.2] * 7 + [0.0]}) == []


def test_selector_at_its_price():
    assert kinds(select__price=[100.0] * 8, select__keep_fraction=[0.7] * 8) == ["selector stuck at its budget"]
    assert kinds(select__price=[100.0] * 8, select__keep_fraction=list(np.linspace(0.9, 0.7, 8))) == []
    assert kinds(select__price=list(np.linspace(1, 3, 8)), select__keep_fraction=[0.7] * 8) == []


def test_a_row_without_a_number_is_none():
    assert kinds(moe__router_z=[None] * 8) == []
