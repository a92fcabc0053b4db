"""Decoding with exits that pays back what it owes: every token sees the keys and values of the full model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.blocks.altup import AltUp
from sparsejax.infer import decode_cost, exit_recompute
from sparsejax.infer.decode_cost import decode_flops
from sparsejax.infer.early_exit import EarlyExit, begun, exit_step
from sparsejax.infer.exit_recompute import caught_up
from sparsejax.model.cost import layer_cost
from sparsejax.model.exits import ExitHeads
from sparsejax.model.lm import init_caches
from sparsejax.model.partial import logits_at
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.train.state import abstract_model

from tiny import BIGRAM, CUBE, ONE, SPARSE, batch_of, mesh_of, variables

MODELS = {
    "mixed": dataclasses.replace(SPARSE, repeats=2, tied_head=False, exits=ExitHeads(layers=(2, 3))),
    "bigram": dataclasses.replace(BIGRAM, repeats=2, exits=ExitHeads(layers=(1, 2, 3))),
    "altup": dataclasses.replace(SPARSE, repeats=2, tied_head=False, exits=ExitHeads(layers=(1,)), streams=AltUp()),
}
ROWS, LENGTH = 4, 14
HOW = EarlyExit(keys="recompute")
TOKENS = np.random.default_rng(3).integers(0, 64, (ROWS, LENGTH))
TOKENS_BEFORE = np.pad(TOKENS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


@functools.cache
def whole(name: str):
    """(logits of every exit `[E, B, T, V]`, caches) of one full pass over the rows."""
    config = unrolled(MODELS[name])
    with jax.set_mesh(mesh_of(ONE)):
        mesh = mesh_of(ONE)
        graph, model = abstract_model(config)[0], variables(MODELS[name], mesh)
        order = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)

        @jax.jit
        def run(params, model_state, batch):
            lm = nnx.merge(graph, *(unrolled_variables(MODELS[name], each) for each in (params, model_state)))
            out = lm(batch, mode="generate", caches=init_caches(config, ROWS, LENGTH))
            depths, features = (*config.exits.depths, config.num_layers), (*out.exits, out.features)
            return [logits_at(lm, x, depth) for x, depth in zip(features, depths, strict=True)], out.caches

        batch = batch_of(TOKENS, np.ones_like(TOKENS), order, mesh)
        logits, caches = jax.tree.map(np.asarray, run(model.params, model.model_state, batch))
        return np.stack(logits), caches


@functools.cache
def decoded(name: str, threshold: float, shape=ONE, rows=tuple(range(ROWS)), how=HOW):
    """(logits `[T, B, V]`, depths `[T, B]`, what is left, that after all is paid) of the rows, token by token."""
    config, chosen = unrolled(MODELS[name]), np.array(rows)
    with jax.set_mesh(mesh_of(shape)):
        mesh = mesh_of(shape)
        graph, model = abstract_model(config)[0], variables(MODELS[name], mesh)
        order = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
        put = lambda a: batch_of(a[chosen], np.ones_like(a[chosen]), order[chosen], mesh)  # noqa: E731
        batch = dataclasses.replace(put(TOKENS), previous=put(TOKENS_BEFORE).tokens)

        @jax.jit
        def run(params, model_state, batch):
            lm = nnx.merge(graph, *(unrolled_variables(MODELS[name], each) for each in (params, model_state)))
            state = begun(lm, how, init_caches(config, len(rows), LENGTH), jnp.zeros_like(batch.tokens[:, 0]))

            def step(state, number):
                one = lambda a: jax.lax.dynamic_slice_in_dim(a, number, 1, axis=1) if a.ndim > 1 else a  # noqa: E731
                found = exit_step(lm, how, jax.tree.map(one, batch), state, jnp.float32(threshold), number, LENGTH)
                return found[2], found[:2]

            state, found = jax.lax.scan(step, state, jnp.arange(LENGTH))
            paid = state
            everyone_B = batch.tokens[:, 0] >= 0
            for number in range(1, len(config.exits.depths) + 1) if how.keys == "recompute" else ():
                paid = caught_up(lm, paid, number, everyone_B, jnp.full_like(batch.tokens[:, 0], LENGTH))
            return found, state, paid

        (logits, depths), state, paid = jax.tree.map(np.asarray, run(model.params, model.model_state, batch))
    return logits, depths, state, paid


def threshold_of(name: str) -> float:
    """With which tokens leave at several exits, and which no confidence is near."""
    logits = whole(name)[0][:-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    confidences = np.sort((p.max(-1) / p.sum(-1)).ravel())
    gaps = np.diff(confidences[len(confidences) // 2 : -len(confidences) // 5])
    at = len(confidences) // 2 + int(gaps.argmax())
    return float(confidences[at : at + 2].mean())


def wanted(name: str, threshold: float):
    """(logits `[T, B, V]`, depths `[T, B]`) by the rule on the full pass."""
    logits, config = whole(name)[0], MODELS[name]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    stops = (p.max(-1) / p.sum(-1) >= threshold) & (threshold < 1)
    stops[-1] = True
    exits = stops.argmax(0)
    chosen = np.take_along_axis(logits, exits[None, :, :, None], axis=0)[0]
    return chosen.swapaxes(0, 1), np.array([*config.exits.depths, config.num_layers])[exits].T


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", MODELS)
def test_tokens_leave_and_answer_as_on_the_full_models_keys(name):
    threshold = threshold_of(name)
    logits, depths, state, _ = decoded(name, threshold)
    want_logits, want_depths = wanted(name, threshold)
    np.testing.assert_array_equal(depths, want_depths)
    assert_near(logits, want_logits)
    assert len(set(depths.ravel())) > 1
    # What was kept of a token is what the layers up to the exit after a later one need, and no more.
    exits = np.array([*MODELS[name].exits.depths, MODELS[name].num_layers])
    for number, exit in enumerate(exits):
        last = [max(np.flatnonzero(of_row >= exit) + 1, default=0) for of_row in depths.T]
        np.testing.assert_array_equal(state.done[:, number], last)


@pytest.mark.parametrize("name", MODELS)
def test_keys_are_those_of_the_full_pass_where_a_later_token_has_been_and_everywhere_once_all_is_paid(name):
    _, _, state, paid = decoded(name, threshold_of(name))
    exits, caches = np.array([*MODELS[name].exits.depths, MODELS[name].num_layers]), whole(name)[1]
    missing = 0
    for layer in range(MODELS[name].num_layers):
        position, number = f"prefix_{layer}", int(np.searchsorted(exits, layer, side="right"))
        want = caches[position].attention
        there = np.arange(LENGTH) < state.done[:, number, None]
        got, after = state.caches[position].attention, paid.caches[position].attention
        np.testing.assert_array_equal(got.segments, there)
        np.testing.assert_array_equal(after.segments, want.segments)
        for field in ("k", "v"):
            assert_near(
                np.where(there[..., None, None], getattr(got, field), getattr(want, field)), getattr(want, field)
            )
            assert_near(getattr(after, field), getattr(want, field))
        missing += int((~there).sum())
    assert missing > 0


def test_at_threshold_1_logits_and_caches_are_those_of_decoding_with_all_layers():
    logits, depths, state, _ = decoded("mixed", 1.0)
    want_logits, want_depths, want, _ = decoded("mixed", 1.0, how=EarlyExit(keys="propagate"))
    np.testing.assert_array_equal(depths, want_depths)
    np.testing.assert_array_equal(logits, want_logits)
    jax.tree.map(np.testing.assert_array_equal, state.caches, want)


def test_smaller_chunks_and_other_rows_change_nothing(monkeypatch):
    threshold = threshold_of("mixed")
    want = decoded("mixed", threshold)
    alone = decoded("mixed", threshold, rows=(2,))
    np.testing.assert_array_equal(alone[1][:, 0], want[1][:, 2])
    assert_near(alone[0][:, 0], want[0][:, 2])
    monkeypatch.setattr(exit_recompute, "CHUNK", 2)
    decoded.cache_clear()
    small = decoded("mixed", threshold)
    np.testing.assert_array_equal(small[1], want[1])
    assert_near(small[0], want[0])
    decoded.cache_clear()


def test_a_mesh_changes_nothing():
    threshold = threshold_of("mixed")
    found, want = decoded("mixed", threshold, shape=CUBE), decoded("mixed", threshold)
    np.testing.assert_array_equal(found[1], want[1])
    assert_near(found[0], want[0])
    np.testing.assert_array_equal(found[2].done, want[2].done)


def test_flops_count_the_layers_that_pay_back(monkeypatch):
    monkeypatch.setattr(decode_cost, "CHUNK", 2)
    config = dataclasses.replace(MODELS["altup"], pattern=("dense",), repeats=2, exits=ExitHeads(layers=(1,)))
    layer, head = layer_cost(config, "dense"), 2 * 64 * 16
    depths = np.array([[1, 1, 1, 2, 1], [1, 1, 1, 1, 1]])
    found = decode_flops(config, HOW, depths, [4, 4])
    of = lambda layers, token: layers * (layer.per_token + layer.per_key * (4 + token))  # noqa: E731
    asked = 11 * head
    # The first row's first four tokens run both layers in the end, the second row's none.
    assert found["ideal"] == sum(of(2, t) for t in range(4)) + of(1, 4) + sum(of(1, t) for t in range(5)) + asked
    # All rows run the second layer for the fourth token; three tokens owe it, in two chunks of two for each row.
    padded = 2 * sum(of(2 if t == 3 else 1, t) for t in range(5)) + 12 * head + 2 * 2 * 2 * of(1, 2.5)
    assert found["padded"] == pytest.approx(padded)
