"""Exit rules against a loop over exits, at their limits, and one example at a time."""

import dataclasses

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.infer.exit_rules import RULES, Calibrated, MaxProb, Patience, fit_temperatures, leave
from sparsejax.infer.exit_table import ExitTable, concatenate, exit_table, jensen_shannon
from sparsejax.ops.exits import decaying_threshold

from reference import exits as slow

N, E, C, D = 200, 7, 5, 6


def drawn(seed: int = 0, n: int = N):
    """Logits that settle with depth, states that turn ever less, scores."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(n, E, C)), axis=1) * rng.uniform(0.3, 2, (n, 1, 1))
    states = np.cumsum(rng.normal(size=(n, E, D)), axis=1)
    return walk, states, rng.random((n, E)), rng.integers(0, C, n)


def table_of(seed: int = 0, n: int = N) -> ExitTable:
    logits, states, scores, target = drawn(seed, n)
    given = {"cost": np.arange(1, E + 1) * 10.0, "depth": np.arange(2, E + 2), "states_NED": states, "score": scores}
    return exit_table(logits, target, **given, group=np.arange(n) // 4, keep_logits=True)


TABLE = table_of()
SETTINGS = {
    "max_prob": ("threshold", (0.0, 0.4, 0.8, 0.99)),
    "margin": ("threshold", (0.0, 0.2, 0.7)),
    "entropy": ("threshold", (1.2, 0.5, 0.05, 0.0, -1.0)),
    "state_similarity": ("threshold", (0.3, 0.8, 0.95)),
    "learned": ("threshold", (0.2, 0.9)),
    "similarity_patience": ("threshold", (0.2, 0.05)),
    "q_exit": ("quantile", (0.0, 0.5, 0.99)),
    "patience": ("patience", (1, 2, 3, 6, 7)),
}


def by_loop(name, settings, seed=0):
    logits, states, scores, _ = drawn(seed)
    narrow = scores.astype(np.float32)
    return np.array([slow.leave(name, *each, **settings) for each in zip(logits, states, narrow, strict=True)])


class TestAgainstALoop:
    @pytest.mark.parametrize("name, value", [(n, v) for n, (_, values) in SETTINGS.items() for v in values])
    def test_every_rule(self, name, value):
        field = SETTINGS[name][0]
        given = {"patience": value, "setting": 0.0} if name == "patience" else {"setting": value}
        if name == "similarity_patience":
            given |= {"patience": 2}
        np.testing.assert_array_equal(leave(RULES[name](**{field: value}), TABLE), by_loop(name, given))

    def test_normalised_entropy(self):
        found = leave(RULES["entropy"](threshold=0.4, normalised=True), TABLE)
        np.testing.assert_array_equal(found, by_loop("normalised", {"setting": 0.4}))

    def test_thresholds_by_exit_and_a_first_exit(self):
        logits = drawn()[0]
        limits = (1.0, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5)
        expected = [
            next((e for e in range(E) if max(slow.softmax(row[e])) >= limits[e] and limits[e] < 1), E - 1)
            for row in logits
        ]
        np.testing.assert_array_equal(leave(MaxProb(threshold=limits), TABLE), expected)
        late = leave(MaxProb(threshold=0.4), TABLE, first=3)
        assert late.min() == 3 and (late >= leave(MaxProb(threshold=0.4), TABLE)).all()


def example_rule(name):
    return RULES[name](temperatures=(1.0,) * E) if name == "calibrated" else RULES[name]()


class TestEveryRule:
    @pytest.mark.parametrize("name", RULES)
    def test_an_example_leaves_where_it_would_alone_and_in_any_company(self, name):
        rule = example_rule(name)
        together = leave(rule, TABLE)
        assert len(set(together)) > 1, "the test needs examples that leave at different exits"
        order = np.random.default_rng(1).permutation(N)
        np.testing.assert_array_equal(leave(rule, TABLE.take(order)), together[order])
        for i in range(0, N, 37):
            assert leave(rule, TABLE.take(np.array([i])))[0] == together[i]

    @pytest.mark.parametrize("name", RULES)
    def test_none_stops_before_its_earliest_exit(self, name):
        rule = example_rule(name)
        assert not rule.stops(TABLE)[:, : rule.earliest].any() and rule.stops(TABLE)[:, rule.earliest :].any()
        if name == "patience":
            assert rule.earliest == 3
        if name in ("max_prob", "entropy"):
            never, late = (1.0, (1.0, 1.0, 0.5)) if name == "max_prob" else (0.0, (0.0, 0.0, 0.5))
            assert dataclasses.replace(rule, threshold=never).earliest >= E
            assert dataclasses.replace(rule, threshold=late).earliest == 2

    @pytest.mark.parametrize("name", RULES)
    def test_later_exits_do_not_matter_to_who_has_left(self, name):
        rule = example_rule(name)
        logits, states, scores, target = drawn()
        others = drawn(seed=9)
        cut = 4
        join = lambda a, b: np.concatenate([a[:, :cut], b[:, cut:]], axis=1)  # noqa: E731
        changed = exit_table(
            join(logits, others[0]), target, cost=TABLE.cost, depth=TABLE.depth,
            states_NED=join(states, others[1]), score=join(scores, others[2]), keep_logits=True,
        )  # fmt: skip
        early = leave(rule, TABLE) < cut
        assert early.any()
        np.testing.assert_array_equal(leave(rule, changed)[early], leave(rule, TABLE)[early])
        assert (leave(rule, changed)[~early] >= cut).all()

    @pytest.mark.parametrize("name", ["max_prob", "margin", "state_similarity", "learned", "calibrated"])
    def test_a_threshold_of_1_is_the_full_model_and_0_the_first_exit(self, name):
        rule = example_rule(name)
        sure = dataclasses.replace(TABLE, max_prob=np.ones_like(TABLE.max_prob), score=np.ones_like(TABLE.max_prob))
        assert (leave(dataclasses.replace(rule, threshold=1), sure) == E - 1).all()
        assert (leave(dataclasses.replace(rule, threshold=0), TABLE) == 0).all()

    @pytest.mark.parametrize("name", ["max_prob", "margin", "state_similarity", "learned", "calibrated", "entropy"])
    def test_nobody_leaves_earlier_when_more_is_asked(self, name):
        asked = np.linspace(0, 1, 21) if name != "entropy" else np.linspace(2, 0, 21)
        exits = [leave(dataclasses.replace(example_rule(name), threshold=float(t)), TABLE) for t in asked]
        assert (np.diff(exits, axis=0) >= 0).all() and (exits[0] == 0).all() and (exits[-1] == E - 1).all()

    def test_patience_has_to_see_one_exit_more_than_it_is_long(self):
        agreed = dataclasses.replace(TABLE, prediction=np.zeros_like(TABLE.prediction))
        for patience in range(1, E + 2):
            assert (leave(Patience(patience=patience), agreed) == min(patience, E - 1)).all()


class TestRefusals:
    @pytest.mark.parametrize(
        "make, said",
        [
            (lambda: MaxProb(threshold=1.5), r"1\.5 is outside \[0, 1\]"),
            (lambda: Patience(patience=0), "0 is not positive"),
            (lambda: RULES["q_exit"](quantile=2), "2 is outside"),
            (lambda: leave(MaxProb(threshold=(0.5, 0.5)), TABLE), "2 numbers for 7 exits"),
            (lambda: leave(Calibrated(), TABLE), "0 for 7 exits"),
            (lambda: leave(RULES["learned"](), dataclasses.replace(TABLE, score=None)), "needs score"),
            (lambda: RULES["max_probs"], "Did you mean 'max_prob'"),
        ],
    )
    def test_in_one_line(self, make, said):
        with pytest.raises(ConfigError, match=said):
            make()


class TestTheTable:
    def test_measures_against_a_loop(self):
        logits, states, _, target = drawn()
        for n, e in [(0, 0), (3, 2), (199, 6), (50, 1)]:
            p = slow.softmax(logits[n, e])
            ordered = sorted(p)
            assert TABLE.loss[n, e] == pytest.approx(-np.log(p[target[n]]), rel=1e-5)
            assert TABLE.max_prob[n, e] == pytest.approx(ordered[-1], rel=1e-6)
            assert TABLE.margin[n, e] == pytest.approx(ordered[-1] - ordered[-2], rel=1e-5)
            assert TABLE.entropy[n, e] == pytest.approx(slow.entropy(p), rel=1e-5)
            assert TABLE.correct[n, e] == (int(np.argmax(p)) == target[n])
            if e:
                before = slow.softmax(logits[n, e - 1])
                assert TABLE.divergence[n, e] == pytest.approx(slow.jensen_shannon(p, before), rel=1e-5)
                assert TABLE.similarity[n, e] == pytest.approx(slow.cosine(states[n, e], states[n, e - 1]), rel=1e-5)

    def test_divergence_is_bounded_and_finite_where_nothing_overlaps(self):
        p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
        np.testing.assert_allclose(jensen_shannon(p, q), np.log(2))
        np.testing.assert_allclose(jensen_shannon(p, 1 * p), 0, atol=1e-15)

    def test_logits_so_large_that_the_rest_underflows(self):
        table = exit_table(np.array([[[1e4, 0.0], [0.0, 1e4]]]), np.array([1]), cost=[1, 2], depth=[1, 2])
        assert table.loss[0, 0] == 1e4 and table.entropy[0, 0] == 0 and np.isfinite(table.divergence[0, 1])

    def test_saved_and_loaded(self, tmp_path):
        TABLE.save(tmp_path / "exits.npz")
        again = ExitTable.load(tmp_path / "exits.npz")
        for field in dataclasses.fields(ExitTable):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(TABLE, field.name))
        bare = dataclasses.replace(TABLE, similarity=None, score=None, logits=None, group=None)
        bare.save(tmp_path / "bare.npz")
        assert ExitTable.load(tmp_path / "bare.npz").logits is None

    @pytest.mark.parametrize("content", [b"", b"no archive", None, {"cost": np.ones(2)}, {"surplus": np.ones(2)}])
    def test_what_is_no_table_is_refused(self, tmp_path, content):
        path = tmp_path / "exits.npz"
        if isinstance(content, dict):
            np.savez(path, **content)
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(RequestError, match=r"exits\.npz is no exit table"):
            ExitTable.load(path)

    def test_tables_of_batches_make_the_table_of_all(self):
        parts = [TABLE.take(np.arange(N) < 60), TABLE.take(np.arange(60, N))]
        joined = concatenate(parts)
        for field in dataclasses.fields(ExitTable):
            np.testing.assert_array_equal(getattr(joined, field.name), getattr(TABLE, field.name))

    def test_shapes_and_orders_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="loss has shape"):
            dataclasses.replace(TABLE, loss=TABLE.loss[:, :-1])
        with pytest.raises(ValueError, match="have to rise"):
            dataclasses.replace(TABLE, cost=TABLE.cost[::-1])


class TestTemperatures:
    def test_those_that_were_built_in_are_found(self):
        rng = np.random.default_rng(0)
        clean = 2 * rng.normal(size=(20_000, 2, 4))
        p = np.exp(clean[:, 0]) / np.exp(clean[:, 0]).sum(-1, keepdims=True)
        target = (rng.random((20_000, 1)) > np.cumsum(p, axis=-1)).sum(-1)
        sharp = np.stack([clean[:, 0] * 3, clean[:, 0] * 0.5], axis=1)
        table = exit_table(sharp, target, cost=[1, 2], depth=[1, 2], keep_logits=True)
        found = fit_temperatures(table)
        np.testing.assert_allclose(found, [3, 0.5], rtol=0.05)
        calibrated = Calibrated(temperatures=found).confidence(table)
        np.testing.assert_allclose(calibrated.mean(0), table.correct.mean(0), atol=0.01)
        assert abs(table.max_prob[:, 0].mean() - table.correct[:, 0].mean()) > 0.05


class TestDecayingThreshold:
    def test_at_both_ends(self):
        np.testing.assert_allclose(decaying_threshold(0.5, np.array([0, 20]), 20), [0.55, 0.45 + 0.1 * np.exp(-4)])
        assert decaying_threshold(0.999, 0, 10) == pytest.approx(0.9991)
        assert (np.diff(decaying_threshold(0.5, np.arange(20), 20)) < 0).all()

    def test_1_is_the_full_model_at_every_position(self):
        np.testing.assert_array_equal(decaying_threshold(1.0, np.arange(9), 9), np.ones(9))
