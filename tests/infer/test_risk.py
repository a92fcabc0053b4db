"""Guarantees of calibrated exits: by simulation, at the limits, and against values worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.infer import risk
from sparsejax.infer.exit_calibration import GAPS, Calibration, brier_gap, consistency_gap, group_means, prediction_gap
from sparsejax.infer.exit_metrics import at_exit
from sparsejax.infer.exit_rules import MaxProb, leave
from sparsejax.infer.exit_table import exit_table

RISKS = np.array([0.0, 0.01, 0.03, 0.06, 0.09, 0.105, 0.12, 0.2, 0.5])
"""Of nine rules: tolerated are those up to 0.1."""
TOLERANCE, FAILURE, REPEATS = 0.1, 0.1, 1000


def drawn(rng, n=200, risks=RISKS, shape="bernoulli"):
    """Losses of rules whose means are `risks`. A rule that errs errs where all faster ones do."""
    bernoulli = (rng.random(n) < risks[:, None]).astype(float)
    return bernoulli if shape == "bernoulli" else bernoulli * (1 - 0.2 * rng.random((len(risks), n))) / 0.9


METHODS = {
    "ltt": lambda losses, bound=1.0: risk.learn_then_test(losses, TOLERANCE, FAILURE, bound=bound),
    "ucb": lambda losses, bound=1.0: risk.upper_bound(losses, TOLERANCE, FAILURE, bound=bound),
    "crc": lambda losses, bound=1.0: risk.conformal_risk(losses, TOLERANCE, bound=bound),
}


def true_risks(method, risks=RISKS, shape="bernoulli", bound=1.0):
    rng = np.random.default_rng(0)
    found = [METHODS[method](drawn(rng, risks=risks, shape=shape), bound) for _ in range(REPEATS)]
    return np.array([0.0 if index is None else risks[index] for index in found])


def most_violations():
    return FAILURE + 3 * math.sqrt(FAILURE * (1 - FAILURE) / REPEATS)


class TestGuarantees:
    @pytest.mark.parametrize("method", ["ltt", "ucb"])
    @pytest.mark.parametrize("shape, bound", [("bernoulli", 1.0), ("spread", 1.2)])
    def test_a_violated_tolerance_is_as_rare_as_promised(self, method, shape, bound):
        found = true_risks(method, shape=shape, bound=bound)
        assert (found > TOLERANCE).mean() <= most_violations()
        assert found.mean() > 0.02, "a method that vouches for nothing keeps every promise"

    @pytest.mark.parametrize("method", ["ltt", "ucb"])
    def test_it_needs_no_monotone_risk(self, method):
        risks = np.array([0.05, 0.01, 0.11, 0.02, 0.15, 0.0])
        assert (true_risks(method, risks) > TOLERANCE).mean() <= most_violations()

    def test_the_first_row_that_is_not_rejected_is_not_the_answer(self):
        rng, risks = np.random.default_rng(0), np.array([0.01, 0.02, 0.3])
        for method in ("ltt", "ucb"):
            assert {METHODS[method](drawn(rng, risks=risks)) for _ in range(100)} == {1}

    @pytest.mark.parametrize("method", METHODS)
    def test_a_row_beyond_one_that_fails_is_never_reached(self, method):
        losses = np.zeros((4, 500))
        losses[2, :250] = 1
        assert METHODS[method](losses) == 1

    def test_conformal_risk_control_holds_in_the_mean_and_is_not_idle(self):
        found = true_risks("crc")
        assert found.mean() <= TOLERANCE + 3 * found.std() / math.sqrt(REPEATS)
        assert found.mean() > 0.5 * TOLERANCE and (found > TOLERANCE).any()

    def test_conformal_risk_control_of_losses_that_do_not_rise(self):
        """Many rules that err at places of their own: the luckiest of them would be a bad choice."""
        rng, chosen = np.random.default_rng(0), []
        for _ in range(REPEATS):
            index = risk.conformal_risk(rng.random((40, 30)) < 0.14, TOLERANCE)
            chosen.append(0.0 if index is None else 0.14)
        assert np.mean(chosen) <= TOLERANCE


class TestLimits:
    @pytest.mark.parametrize("method", METHODS)
    def test_many_examples_find_what_the_means_say(self, method):
        losses = drawn(np.random.default_rng(0), n=40_000)
        assert METHODS[method](losses) == 4 == np.flatnonzero(losses.mean(1) <= TOLERANCE)[-1]

    @pytest.mark.parametrize("few", [1, 5])
    def test_few_examples_leave_the_full_model_even_without_an_error(self, few):
        losses = np.zeros((3, few))
        assert risk.conformal_risk(losses, 0.1) is None
        assert risk.learn_then_test(losses, 0.1, 0.1) is None
        assert risk.upper_bound(losses, 0.1, 0.1) is None

    @pytest.mark.parametrize("tolerance, expected", [(0.0, None), (1.0, 8)])
    def test_no_tolerance_is_the_full_model_and_all_of_it_the_fastest_rule(self, tolerance, expected):
        losses = drawn(np.random.default_rng(0))
        assert risk.conformal_risk(losses, tolerance) == expected
        assert risk.learn_then_test(losses, tolerance, 0.1) == expected
        assert risk.upper_bound(losses, tolerance if tolerance < 1 else 0.999, 0.1) == expected

    @pytest.mark.parametrize("method", METHODS)
    def test_more_tolerance_never_means_slower_and_more_certainty_never_faster(self, method):
        losses = drawn(np.random.default_rng(1))
        number = lambda index: -1 if index is None else index  # noqa: E731
        of = {
            "crc": lambda t, f: risk.conformal_risk(losses, t),
            "ltt": lambda t, f: risk.learn_then_test(losses, t, f),
            "ucb": lambda t, f: risk.upper_bound(losses, t, f),
        }[method]
        by_tolerance = [number(of(t, 0.1)) for t in np.linspace(0, 0.6, 40)]
        assert (np.diff(by_tolerance) >= 0).all() and len(set(by_tolerance)) > 4
        by_failure = [number(of(0.1, f)) for f in (1e-6, 1e-3, 0.01, 0.1, 0.3)]
        assert (np.diff(by_failure) >= 0).all()

    def test_a_bound_is_a_unit(self):
        losses = drawn(np.random.default_rng(2))
        for method in (risk.learn_then_test, risk.upper_bound):
            assert method(8 * losses, 0.8, 0.1, bound=8) == method(losses, 0.1, 0.1)
        assert risk.conformal_risk(8 * losses, 0.8, bound=8) == risk.conformal_risk(losses, 0.1)

    @pytest.mark.parametrize(
        "losses, settings, said",
        [
            (np.full((2, 9), 1.5), {}, "leave"),
            (np.full((2, 9), -0.5), {}, "leave"),
            (np.zeros((0, 9)), {}, "one of each"),
            (np.zeros(9), {}, "rules × examples"),
            (np.zeros((2, 9)), {"failure": 0.0}, "failure of 0"),
            (np.zeros((2, 9)), {"tolerance": -0.1}, "tolerance of -0"),
        ],
    )
    def test_input_without_sense_is_refused(self, losses, settings, said):
        with pytest.raises(ValueError, match=said):
            risk.learn_then_test(losses, **({"tolerance": 0.1, "failure": 0.1} | settings))


class TestPieces:
    def test_p_values_by_hand(self):
        n, eps = 50, 0.1
        for errors in (0, 1, 3, 5, 9):
            tail = sum(math.comb(n, i) * eps**i * (1 - eps) ** (n - i) for i in range(errors + 1))
            r = min(errors / n, eps)
            kl = (r * math.log(r / eps) if r else 0) + (1 - r) * math.log((1 - r) / (1 - eps))
            expected = min(math.exp(-n * kl), math.e * tail, 1)
            assert risk.hoeffding_bentkus(np.array([errors / n]), n, eps)[0] == pytest.approx(expected)

    def test_p_values_are_super_uniform_where_the_hypothesis_is_just_true(self):
        rng = np.random.default_rng(0)
        p = risk.hoeffding_bentkus((rng.random((20_000, 100)) < 0.1).mean(1), 100, 0.1)
        for level in (0.01, 0.05, 0.2):
            assert (p <= level).mean() <= level + 3 * math.sqrt(level / 20_000)

    def test_the_betting_bound_covers_and_is_what_upper_bound_tests(self):
        rng = np.random.default_rng(0)
        losses = rng.beta(0.5, 4.5, size=(300, 150))  # of mean 0.1
        bounds = np.array([risk.betting_bound(row, 0.1) for row in losses])
        assert (bounds < 0.1).mean() <= 0.1 + 3 * math.sqrt(0.09 / 300)
        assert np.median(bounds) < 0.15
        hoeffding = losses.mean(1) + math.sqrt(math.log(10) / 300)
        assert (bounds < hoeffding).all(), "it knows that the variance is small"
        for row, bound in zip(losses[:20], bounds[:20], strict=True):
            assert risk.upper_bound(row[None], bound + 1e-6, 0.1) == 0
            assert risk.upper_bound(row[None], bound - 1e-6, 0.1) is None

    def test_bounds_of_extreme_losses(self):
        assert risk.betting_bound(np.ones(50), 0.1) == 1.0
        assert 0 < risk.betting_bound(np.zeros(50), 0.1) < 0.1
        assert risk.betting_bound(np.zeros(1), 0.01) == 1.0


def table_of(n: int, seed: int = 0):
    """Logits that grow towards the target from exit to exit."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 4, n)
    logits = np.cumsum(rng.normal(size=(n, 5, 4)), axis=1)
    logits[np.arange(n), :, target] += 1.2 * np.arange(5)
    return exit_table(
        logits, target, cost=np.arange(1, 6), depth=np.arange(1, 6), group=np.arange(n) // 10, keep_logits=True
    )


RULES = [MaxProb(threshold=float(t)) for t in np.linspace(1, 0.3, 29)]


class TestCalibration:
    @pytest.mark.parametrize("gap", GAPS)
    def test_gaps_against_a_loop_and_none_at_the_full_model(self, gap):
        table = table_of(60)
        exits = leave(MaxProb(threshold=0.6), table)
        expected = []
        for n, e in enumerate(exits):
            p = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in table.logits[n].astype(float)]
            right = [int(np.argmax(q)) == table.target[n] for q in (p[e], p[-1])]
            score = [0.5 * sum((v - (c == table.target[n])) ** 2 for c, v in enumerate(q)) for q in (p[e], p[-1])]
            expected.append(
                {
                    "consistency": float(np.argmax(p[e]) != np.argmax(p[-1])),
                    "prediction": float(right[1] and not right[0]),
                    "brier": max(0.0, score[0] - score[1]),
                }[gap]
            )
        assert sum(expected) > 0
        np.testing.assert_allclose(GAPS[gap](table, exits), expected, atol=1e-6)
        assert (GAPS[gap](table, np.full(60, 4)) == 0).all()

    def test_losing_the_full_model_s_right_answer_is_to_differ_from_it(self):
        table = table_of(500)
        exits = np.zeros(500, int)
        assert (prediction_gap(table, exits) <= consistency_gap(table, exits)).all()
        assert brier_gap(table, exits).max() <= 1

    @pytest.mark.parametrize("method", ["crc", "ltt", "ucb"])
    @pytest.mark.parametrize("gap", GAPS)
    def test_what_is_chosen_keeps_its_promise_on_new_examples(self, method, gap):
        calibration = Calibration(gap=gap, method=method, tolerance=0.05, failure=0.1)
        new = table_of(20_000, seed=1)
        index = calibration.choose(RULES, table_of(1000, seed=2))
        assert index is not None and index > 0
        exits = leave(RULES[index], new)
        assert calibration.losses(new, exits).mean() <= 0.05 + (0.01 if method == "crc" else 0)
        assert at_exit(new.cost, exits).mean() < 0.95 * new.cost[-1]

    def test_sequences_count_as_one_example_each(self):
        table = table_of(1000)
        each = consistency_gap(table, np.zeros(1000, int))
        np.testing.assert_allclose(group_means(each, table), each.reshape(100, 10).mean(1))
        shuffled = np.random.default_rng(0).permutation(1000)
        np.testing.assert_allclose(group_means(each[shuffled], table.take(shuffled)), group_means(each, table))
        one, all_of_them = Calibration(tolerance=0.08), Calibration(tolerance=0.08, level="group")
        assert (all_of_them.choose(RULES, table) or -1) < (one.choose(RULES, table) or -1)

    @pytest.mark.parametrize(
        "make, said",
        [
            (lambda: Calibration(gap="consistent"), "Did you mean 'consistency'"),
            (lambda: Calibration(method="lt"), "allowed: crc, ltt, ucb"),
            (lambda: Calibration(tolerance=-1), "-1 is negative"),
            (lambda: Calibration(failure=1), "1 is outside"),
            (lambda: brier_gap(dataclasses.replace(table_of(5), logits=None), np.zeros(5, int)), "needs logits"),
            (
                lambda: group_means(np.zeros(5), dataclasses.replace(table_of(5), group=None)),
                "needs the examples' groups",
            ),
        ],
    )
    def test_bad_requests_are_one_line(self, make, said):
        with pytest.raises(ConfigError, match=said):
            make()
