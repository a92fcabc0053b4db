"""Decoding with exits: full depth where nothing leaves, savings that change nothing, rows that ignore each other, and
what skipped layers remember."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import RequestError
from sparsejax.blocks.altup import AltUp
from sparsejax.infer.early_exit import EarlyExit, Seen, exit_step, schedule, stops, threshold_at
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.memory.config import MEMORIES
from sparsejax.model.exits import ExitHeads
from sparsejax.model.lm import init_caches
from sparsejax.model.partial import embedded, run_layers
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.train.state import abstract_model

from tiny import CUBE, DENSE, ONE, SPARSE, batch_of, mesh_of, variables

A, B, C = np.array([5, 9, 2, 7]), np.array([11]), np.arange(20) * 3 % 64
GREEDY = Sampling(temperature=0)
CONFIG = dataclasses.replace(SPARSE, repeats=2, tied_head=False, exits=ExitHeads(layers=(2, 3)))
MIXED = EarlyExit(threshold=0.025)
"""With which rows leave at every exit."""


OTHERS = {
    "altup": dataclasses.replace(CONFIG, streams=AltUp(streams=2)),
    "lookup": dataclasses.replace(CONFIG, memory={"lookup": MEMORIES["lookup"](blocks=("dense",))}),
}


@functools.cache
def generated(how, prompts=(0, 1, 2), config=CONFIG, shape=ONE):
    with jax.set_mesh(mesh_of(shape)):
        model, chosen = variables(config, mesh_of(shape)), [(A, B, C)[n] for n in prompts]
        found = Generator(config, GREEDY, decoding=how)(model, chosen, 12)
    return np.array(found.tokens), found.depths


class TestGenerator:
    def test_saving_changes_nothing(self):
        tokens, depths = generated(MIXED)
        assert set(np.unique(depths)) == {2, 3, 4}
        assert (tokens != generated(None)[0]).any()
        for got, want in zip(generated(dataclasses.replace(MIXED, compact=False)), (tokens, depths), strict=True):
            np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("name", OTHERS)
    def test_it_does_neither_with_streams_nor_with_tables(self, name):
        found, masked = (
            generated(dataclasses.replace(MIXED, compact=compact), config=OTHERS[name]) for compact in (True, False)
        )
        assert len(np.unique(found[1])) > 1
        for got, want in zip(found, masked, strict=True):
            np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("keys", ["propagate", "recompute"])
    def test_a_mesh_changes_nothing(self, keys):
        how = dataclasses.replace(MIXED, keys=keys)
        for got, want in zip(generated(how, shape=CUBE), generated(how), strict=True):
            np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("keys", ["propagate", "recompute", "evict", "share"])
    def test_a_row_leaves_where_it_would_alone(self, keys):
        how = dataclasses.replace(MIXED, keys=keys)
        together, alone = generated(how), generated(how, prompts=(1,))
        for got, want in zip(alone, together, strict=True):
            np.testing.assert_array_equal(got[0], want[1])

    def test_on_a_schedule_the_depth_falls(self):
        tokens, depths = generated(EarlyExit(keys="monotone"))
        want = [int(schedule((2, 3, 4), jnp.int32(t), 12)) for t in range(12)]
        assert want[0] == 4 and want[-1] == 2 and want == sorted(want, reverse=True)
        np.testing.assert_array_equal(depths, [want] * 3)
        np.testing.assert_array_equal(tokens[:, 0], generated(None)[0][:, 0])


LENGTH = 6


@functools.cache
def one_step(how, threshold):
    """(model, residual, caches, what `exit_step` returns) of the token at place 5, on caches of the five before."""
    config = CONFIG
    flat = unrolled(config)
    with jax.set_mesh(mesh_of(ONE)):
        mesh = mesh_of(ONE)
        model, graph = variables(config, mesh), abstract_model(flat)[0]
        tokens = np.random.default_rng(1).integers(0, 64, (4, LENGTH))
        order = np.broadcast_to(np.arange(LENGTH), tokens.shape)
        before = batch_of(tokens[:, :-1], np.ones_like(tokens[:, :-1]), order[:, :-1], mesh)
        batch = batch_of(tokens[:, -1:], np.ones_like(tokens[:, -1:]), order[:, -1:], mesh)

        @jax.jit
        def run(params, model_state, before, batch, threshold):
            state = (unrolled_variables(config, params), unrolled_variables(config, model_state))
            lm = nnx.merge(graph, *state)
            caches = lm(before, mode="generate", caches=init_caches(flat, 4, LENGTH)).caches
            x, context, _ = embedded(lm, batch, caches)
            states = [x]
            for layer in range(4):
                states.append(run_layers(lm, states[-1], context, caches, [layer])[0])
            norm = lambda n, x: lm.stack.prefix[n].attention_norm(x)  # noqa: E731
            keys = [[lm.stack.prefix[n].attention.keys(norm(n, x), batch.positions) for x in states] for n in range(4)]
            return exit_step(lm, how, batch, caches, threshold, jnp.int32(0), 8), states, keys, caches

        @jax.jit
        def plain(params, model_state, batch, caches):
            lm = nnx.merge(graph, unrolled_variables(config, params), unrolled_variables(config, model_state))
            out = lm(batch, mode="generate", caches=caches)
            return out.logits[:, 0], out.caches

        found = run(model.params, model.model_state, before, batch, jnp.float32(threshold))
        return jax.tree.map(np.asarray, (found, plain(model.params, model.model_state, batch, found[-1])))


def at_place(cache):
    """Keys `[B, M, H]` and segments of the token."""
    return cache.attention.k[:, LENGTH - 1], cache.attention.segments[:, LENGTH - 1]


class TestStep:
    def test_at_threshold_1_logits_and_caches_are_those_of_the_full_model(self):
        ((logits, depth, caches), *_), (want, want_caches) = one_step(MIXED, 1.0)
        np.testing.assert_array_equal(depth, 4)
        np.testing.assert_array_equal(logits, want)
        jax.tree.map(np.testing.assert_array_equal, caches, want_caches)

    def test_skipped_layers_remember_the_state_of_the_exit(self):
        ((_, depth, caches), _, keys, _), _ = one_step(MIXED, 0.025)
        assert len(set(depth)) > 1
        for layer in range(4):
            got, segments = at_place(caches[f"prefix_{layer}"])
            want = np.stack([keys[layer][min(layer, d)][0][row, 0] for row, d in enumerate(depth)])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
            assert segments.all()

    def test_evicted_tokens_are_not_seen_and_shared_ones_are_those_below(self):
        (_, depth, evicted), *_ = one_step(dataclasses.replace(MIXED, keys="evict"), 0.025)[0]
        (_, _, shared), _, keys, _ = one_step(dataclasses.replace(MIXED, keys="share"), 0.025)[0]
        assert len(set(depth)) > 1
        for layer in range(4):
            np.testing.assert_array_equal(at_place(evicted[f"prefix_{layer}"])[1], layer < depth)
            got, segments = at_place(shared[f"prefix_{layer}"])
            last = np.minimum(layer, depth - 1)
            want = np.stack([keys[n][n][0][row, 0] for row, n in enumerate(last)])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
            assert segments.all()


class TestRules:
    LOGITS = np.log([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]).astype(np.float32)

    @pytest.mark.parametrize(
        ("rule", "threshold", "want"),
        [
            ("max_prob", 0.69, [True, False]),
            ("max_prob", 0.39, [True, True]),
            ("margin", 0.49, [True, False]),
            ("margin", 0.04, [True, True]),
            ("entropy", 0.81, [True, False]),  # 0.8018 and 1.0805 nats
            ("entropy", 1.09, [True, True]),
            ("entropy", 0.0, [False, False]),
            ("state_similarity", 0.7, [True, False]),
            ("patience", 3, [True, False]),
            ("max_prob", 1.0, [False, False]),
        ],
    )
    def test_what_stops(self, rule, threshold, want):
        features = np.array([[1.0, 1.0], [1.0, 0.0]], np.float32)
        before = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
        seen = Seen(prediction=jnp.array([0, 1]), agreeing=jnp.array([2, 5]), features=jnp.asarray(before))
        stopped, now = stops(rule, jnp.float32(threshold), jnp.asarray(self.LOGITS), jnp.asarray(features), seen)
        np.testing.assert_array_equal(stopped, want)
        np.testing.assert_array_equal(now.agreeing, [3, 0])

    def test_certainty_itself_does_not_stop_at_1(self):
        sure = jnp.array([[0.0, -200.0]])
        seen = Seen(prediction=jnp.array([0]), agreeing=jnp.array([0]), features=jnp.ones((1, 2)))
        for rule in ("max_prob", "margin", "state_similarity"):
            assert not stops(rule, jnp.float32(1), sure, jnp.ones((1, 2)), seen)[0].any()

    def test_the_threshold_decays(self):
        how = EarlyExit(threshold=0.8, decay=4.0)
        at = lambda number, threshold=0.8: float(threshold_at(how, jnp.float32(threshold), jnp.int32(number), 10))  # noqa: E731
        np.testing.assert_allclose([at(0), at(10)], [0.82, 0.72 + 0.1 * np.exp(-4)], rtol=1e-6)
        assert at(5, 1.0) == 1.0
        assert float(threshold_at(EarlyExit(), jnp.float32(0.8), jnp.int32(5), 10)) == pytest.approx(0.8)


def test_what_evicts_cannot_have_tables():
    with pytest.raises(RequestError, match="exit keys evict with lookup layers"):
        Generator(OTHERS["lookup"], GREEDY, decoding=EarlyExit(keys="evict"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "max_probs"}, "exit rule 'max_probs'; known: .*Did you mean 'max_prob'"),
        ({"keys": "keep"}, "exit keys 'keep'; known: propagate"),
        ({"threshold": 1.2}, "exit threshold 1.2; allowed with max_prob: 0 to 1"),
        ({"rule": "entropy", "threshold": -1.0}, "0 to inf"),
        ({"rule": "entropy", "decay": 4.0}, "exit decay 4.0"),
        ({"keys": "evict", "compact": False}, "propagate alone"),
    ],
)
def test_bad_settings_are_told_apart(settings, said):
    with pytest.raises(RequestError, match=said):
        EarlyExit(**settings)


def test_a_model_without_exits_is_refused():
    with pytest.raises(RequestError, match="the model has no exits"):
        Generator(DENSE, GREEDY, decoding=EarlyExit())
