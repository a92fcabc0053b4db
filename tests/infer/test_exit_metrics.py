"""Curves, fronts and diagnostics of early exits, by hand and by chance."""

import dataclasses

import numpy as np
import pytest

from sparsejax.infer import exit_anytime as anytime
from sparsejax.infer import exit_metrics as metrics
from sparsejax.infer.exit_rules import MaxProb, leave
from sparsejax.infer.exit_table import ExitTable, exit_table


def table_of(correct, cost=(1.0, 2.0, 4.0)) -> ExitTable:
    """Of two classes, right where it is said so."""
    correct = np.asarray(correct, bool)
    logits = np.where(correct[..., None], [2.0, 0.0], [0.0, 1.0])
    return exit_table(logits, np.zeros(len(correct), int), cost=cost, depth=np.arange(1, correct.shape[1] + 1) * 2)


TABLE = table_of([[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]])


class TestSummary:
    def test_by_hand(self):
        found = metrics.summary(TABLE, np.array([0, 1, 2, 0]))
        assert found.accuracy == 0.5
        assert found.depth == (2 + 4 + 6 + 2) / 4
        assert found.cost == (1 + 2 + 4 + 1) / 4 and found.saved == 1 - 2 / 4
        assert found.agreement == 1.0
        assert found.histogram == (2, 1, 1)
        right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(1))
        assert found.loss == pytest.approx((2 * right + 2 * wrong) / 4, rel=1e-6)

    def test_the_mean_depth_is_the_histogram_s(self):
        rng = np.random.default_rng(0)
        logits, target = rng.normal(size=(500, 5, 3)) * 2, rng.integers(0, 3, 500)
        table = exit_table(logits, target, cost=np.arange(1, 6), depth=[1, 3, 4, 8, 12])
        exits = leave(MaxProb(threshold=0.8), table)
        found = metrics.summary(table, exits)
        assert sum(found.histogram) == 500
        assert found.depth == pytest.approx(np.dot(found.histogram, table.depth) / 500)

    def test_the_full_model_saves_nothing_and_none_is_refused(self):
        found = metrics.sweep(TABLE, [MaxProb(threshold=1), MaxProb(threshold=0)])
        assert found[0].saved == 0 and found[0].agreement == 1 and found[0].histogram == (0, 0, 4)
        assert found[1].saved == 0.75
        with pytest.raises(ValueError, match="without examples"):
            metrics.summary(TABLE.take(np.zeros(4, bool)), np.zeros(0, int))


class TestFront:
    def test_what_no_other_point_beats(self):
        cost = np.array([1.0, 2.0, 2.0, 3.0, 4.0, 4.0])
        quality = np.array([0.1, 0.5, 0.4, 0.5, 0.9, 0.9])
        np.testing.assert_array_equal(metrics.pareto_front(cost, quality), [0, 1, 4])

    def test_against_all_pairs(self):
        rng = np.random.default_rng(0)
        cost, quality = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
        beaten = [
            any((cost[j] <= cost[i] and quality[j] >= quality[i]) and (cost[j], quality[j]) != (cost[i], quality[i])
                for j in range(60)) for i in range(60)
        ]  # fmt: skip
        unbeaten = {(cost[i], quality[i]) for i in range(60) if not beaten[i]}
        front = metrics.pareto_front(cost, quality)
        assert {(cost[i], quality[i]) for i in front} == unbeaten and len(front) == len(unbeaten)

    def test_its_area_is_a_mean_over_octaves(self):
        cost, quality = np.array([1.0, 2.0, 3.0, 8.0]), np.array([0.2, 0.6, 0.5, 0.9])
        assert metrics.pareto_area(cost, quality, 1, 16) == pytest.approx((0.2 + 0.6 + 0.6 + 0.9) / 4)
        assert metrics.pareto_area(cost, quality, 2, 4) == pytest.approx(0.6)
        assert metrics.pareto_area(cost, quality, 8, 9) == pytest.approx(0.9)
        with pytest.raises(ValueError, match="cheapest point costs 1"):
            metrics.pareto_area(cost, quality, 0.5, 16)
        with pytest.raises(ValueError, match="no area"):
            metrics.pareto_area(cost, quality, 4, 4)


class TestDiagnostics:
    def test_oracle_and_overthinking(self):
        np.testing.assert_array_equal(metrics.oracle_exits(TABLE), [0, 1, 1, 0])
        assert metrics.overthinking(TABLE) == 0.25
        assert metrics.oracle_gap(TABLE, np.full(4, 2)) == 0.25
        assert metrics.oracle_gap(TABLE, metrics.oracle_exits(TABLE)) == 0

    def test_no_rule_is_better_than_the_oracle(self):
        rng = np.random.default_rng(0)
        table = table_of(rng.random((300, 3)) < 0.5)
        assert all(metrics.oracle_gap(table, leave(MaxProb(threshold=t), table)) >= 0 for t in (0, 0.8, 1))

    def test_calibration_error(self):
        confidence = np.array([0.95, 0.95, 0.55, 0.55])
        correct = np.array([True, True, True, False])
        assert metrics.calibration_error(confidence, correct, bins=10) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
        rng = np.random.default_rng(0)
        p = rng.random(100_000)
        assert metrics.calibration_error(p, rng.random(100_000) < p) < 0.01
        assert metrics.calibration_error(p, rng.random(100_000) < p / 2) == pytest.approx(0.25, abs=0.01)
        assert metrics.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0

    def test_the_largest_fall(self):
        quality = np.array([[0.1, 0.5, 0.4, 0.45], [0.1, 0.2, 0.2, 0.3], [0.9, 0.1, 0.8, 0.0]])
        np.testing.assert_allclose(metrics.monotonicity_gap(quality), [0.1, 0, 0.9])


class TestProductAnytime:
    def test_by_hand(self):
        logits = np.array([[[1.0, 2.0, -1.0], [3.0, 1.0, 5.0]]])
        p = anytime.product_anytime(logits)
        first = np.sqrt([1, 2, 0])
        np.testing.assert_allclose(p[0, 0], first / first.sum())
        second = first * np.array([3, 1, 5])
        np.testing.assert_allclose(p[0, 1], second / second.sum())

    def test_the_softmax_where_no_class_is_left(self):
        logits = np.array([[[-1.0, 2.0], [3.0, -1.0], [4.0, 0.5]]])
        p = anytime.product_anytime(logits)
        np.testing.assert_allclose(p[0, 1], np.exp([3, -1]) / np.exp([3, -1]).sum())
        np.testing.assert_allclose(p.sum(-1), 1)

    def test_it_makes_true_classes_fall_less(self):
        rng = np.random.default_rng(0)
        target = rng.integers(0, 5, 400)
        logits = rng.normal(size=(400, 6, 5)) * 1.5
        logits[np.arange(400), :, target] += np.linspace(0.5, 4, 6)
        of_target = lambda p: p[np.arange(400), :, target]  # noqa: E731
        plain = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        falls = [metrics.monotonicity_gap(of_target(p)).mean() for p in (plain, anytime.product_anytime(logits))]
        assert falls[1] < 0.7 * falls[0]


class TestSets:
    def draw(self, seed, n=400):
        rng = np.random.default_rng(seed)
        target = rng.integers(0, 8, n)
        logits = rng.normal(size=(n, 4, 8))
        logits[np.arange(n), :, target] += np.array([0.5, 1.0, 2.0, 3.0])
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), target

    def test_conformal_sets_keep_their_promise_at_every_exit(self):
        missed = []
        for seed in range(300):
            thresholds = anytime.conformal_thresholds(*self.draw(2 * seed, 99), 0.1)
            p, target = self.draw(2 * seed + 1, 200)
            missed.append(1 - anytime.coverage(anytime.prediction_sets(p, thresholds), target))
        # Exactly (n + 1) · miss over n + 1 for continuous scores: neither more nor much less.
        np.testing.assert_allclose(np.mean(missed, axis=0), 0.1, atol=4 * np.std(missed) / 300**0.5)

    def test_they_are_not_nested_and_their_running_intersection_is_for_some_coverage(self):
        thresholds = anytime.conformal_thresholds(*self.draw(0, 999), 0.1)
        p, target = self.draw(1)
        sets = anytime.prediction_sets(p, thresholds)
        nested = anytime.running_intersection(sets)
        assert (sets[:, 1:] & ~sets[:, :-1]).any()
        assert not (nested[:, 1:] & ~nested[:, :-1]).any() and not (nested & ~sets).any()
        lost = anytime.coverage(sets, target) - anytime.coverage(nested, target)
        assert lost[0] == 0 and (np.diff(lost) >= -0.02).all() and lost[-1] > 0.05

    def test_too_few_examples_calibrate_nothing(self):
        p, target = self.draw(0, 8)
        assert anytime.prediction_sets(p, anytime.conformal_thresholds(p, target, 0.1)).all()
        np.testing.assert_array_equal(
            anytime.conformal_thresholds(p[:, :, :], target, 0.12),
            np.take_along_axis(p, target[:, None, None], -1)[..., 0].min(0),
        )
        with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
            anytime.conformal_thresholds(p, target, 0)


def test_a_table_without_states_can_be_asked_for_everything_else():
    assert TABLE.similarity is None and dataclasses.replace(TABLE).exits == 3
