"""Effective speed-up and the scaling law, on planted numbers."""

import numpy as np
import pytest

from sparsejax.ablate.scaling import fit, laws, lines, main, saturated
from sparsejax.ablate.speed_up import speed_up
from sparsejax.base.errors import RequestError

FLOPS = np.array([1.0, 2.0, 8.0])
LOSSES = 3 * FLOPS**-0.1


@pytest.mark.parametrize("times", [1.0, 1.7, 4.0])
def test_speed_up_is_that_of_the_power_law(times):
    assert speed_up(FLOPS, LOSSES, 2.0, 3 * (2.0 * times) ** -0.1) == (pytest.approx(times), "")


def test_outside_of_the_budgets_only_a_bound_is_told():
    assert speed_up(FLOPS[::-1], LOSSES[::-1], 2.0, 1.0) == (pytest.approx(4.0), ">")
    assert speed_up(FLOPS, LOSSES, 2.0, 9.0) == (pytest.approx(0.5), "<")
    with pytest.raises(ValueError, match="does not fall"):
        speed_up(FLOPS, [1.0, 1.1, 0.9], 1.0, 1.0)


def planted(rng, noise, limits=None):
    n, e = (each.ravel() for each in np.meshgrid([1e5, 1e6, 1e7], [1, 2, 4, 8, 16, 32]))
    n, e = np.tile(n, 3), np.tile(e, 3)
    log_e = np.log(saturated(e, limits))
    mean = -0.08 * np.log(n) - 0.1 * log_e + 0.005 * np.log(n) * log_e + 2
    return n, e, np.exp(mean + noise * rng.normal(size=n.size))


@pytest.mark.parametrize("limits", [None, (1.9, 400.0)])
def test_the_law_is_recovered(limits):
    n, e, losses = planted(np.random.default_rng(0), 0.0, limits)
    law = fit(n, e, losses, limits=limits)
    found = {name: value for name, (value, _, _) in law.coefficients.items()}
    assert found == pytest.approx({"a": -0.08, "b": -0.1, "c": 0.005, "d": 2.0})
    assert law.loss(n[0], e[0], limits) == pytest.approx(losses[0])


def test_its_intervals_hold_as_often_as_they_say():
    rng = np.random.default_rng(1)
    found = [fit(*planted(rng, 0.01)).coefficients["b"] for _ in range(400)]
    assert 0.92 <= np.mean([low <= -0.1 <= high for _, low, high in found]) <= 0.98


def test_one_size_tells_of_experts_alone():
    n, e, losses = planted(np.random.default_rng(2), 0.0)
    same = n == 1e6
    law = fit(n[same], e[same], losses[same])
    assert law.coefficients["b"][0] == pytest.approx(-0.1 + 0.005 * np.log(1e6)) and "a" not in law.coefficients
    with pytest.raises(ValueError, match="do not tell"):
        fit(n[:2], e[:2], losses[:2])


def test_experts_saturate():
    assert saturated(1, (2.0, 100.0)) == pytest.approx(2.0)
    assert saturated(1e9, (2.0, 100.0)) == pytest.approx(100.0)


def test_laws_are_fitted_by_router_from_results():
    def study(parameters, level):
        arms = {"dense": (1, level)} | {f"hash-e{e}": (e, level * e**-0.1) for e in (2, 4, 8)}
        run = lambda loss: {"status": "done", "figures": {"bits_per_byte": loss}}  # noqa: E731
        told = {
            name: {"parameters": parameters * e, "runs": {"0": run(loss), "1": run(loss * 1.001)}}
            for name, (e, loss) in arms.items()
        }
        told["hash-e8"]["runs"]["2"] = {"status": "failed", "cause": "it fell"}
        return {"base": "dense", "metric": "bits_per_byte", "arms": told}

    law = laws([study(1e5, 3.0), study(1e6, 2.5)])["hash"]
    assert law.runs == 16 and law.coefficients["b"][0] == pytest.approx(-0.1, abs=1e-6)
    assert law.coefficients["a"][0] == pytest.approx(np.log(2.5 / 3) / np.log(10))
    assert lines({"hash": law})[-1].startswith("| `hash` | -0.0792 [")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "not the results of a study: .*No such file"),
        ("{", "not the results of a study"),
        ("[]", "it has no arms"),
        ('{"arms": {"a": {"parameters": 1, "runs": {}}}, "base": "a", "metric": "x"}', "no arm is named ROUTER-eE"),
    ],
)
def test_what_is_no_scaling_study_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        main([str(tmp_path / "x.json")])
    with pytest.raises(RequestError, match="which results"):
        main([])
