"""Sending on what finds its expert full: against a loop, at the settings where the answer is known, and its ledger."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import by_token
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import ExpertThreshold, NoController
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.orders import ByScore
from sparsejax.routers.overflow import Drop, NextBest
from sparsejax.routers.router import decide, report
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.top_k import Positive, Threshold, TopK
from sparsejax.routers.weights import Constant, Raw

from reference import selection as slow
from support import known, to_numpy

GROUPS, SIZE, EXPERTS, SLOTS = 3, 24, 6, 6
MASK = np.ones((GROUPS, SIZE), bool)
MASK[1, 17:] = False
MASK[2, ::2] = False
SKEW = 1.5 * np.arange(EXPERTS)[::-1] / EXPERTS
LOGITS = (np.random.default_rng(0).normal(size=(GROUPS, SIZE, EXPERTS)) + SKEW).astype(np.float32)
TOP_1 = RouterConfig(selection=TopK(k=1), weight=Raw(), allow_leak=True)


@functools.cache
def compiled(config):
    def run(logits, limit):
        inputs = dataclasses.replace(known(MASK, SLOTS), limit=jnp.full(GROUPS, limit))
        decision = decide(logits, inputs, config)
        return decision, report(decision, jnp.asarray(MASK))

    return jax.jit(run)


def decided(overflow, slots, **fields):
    """(decision, report) where an expert has so many slots."""
    return to_numpy(compiled(dataclasses.replace(TOP_1, overflow=overflow, **fields))(jnp.asarray(LOGITS), slots))


def by_tokens(values, decision):
    return np.asarray(by_token(jnp.asarray(values), decision.pairs))[..., 0]


@pytest.mark.parametrize("rounds", [1, 2, EXPERTS])
@pytest.mark.parametrize("limit", [2, 3, 4])
def test_against_a_loop(rounds, limit):
    decision, _ = decided(NextBest(rounds=rounds), limit)
    scores = np.asarray(jax.nn.softmax(LOGITS, axis=-1))
    for g in range(GROUPS):
        experts, served = slow.next_best(LOGITS[g], MASK[g], limit, rounds)
        assert np.array_equal(by_tokens(decision.slots.keep, decision)[g], served)
        assert np.array_equal(by_tokens(decision.pairs.expert, decision)[g][MASK[g]], np.array(experts)[MASK[g]])
        weights = by_tokens(decision.pairs.weight, decision)[g]
        np.testing.assert_allclose(weights[served], scores[g, np.arange(SIZE), experts][served], rtol=1e-6)


def test_a_score_that_was_sent_on_has_the_gradient():
    inputs = known(MASK, 3)
    config = dataclasses.replace(TOP_1, overflow=NextBest(rounds=EXPERTS))

    def total(logits):
        decision = decide(logits, inputs, config)
        return jnp.where(decision.slots.keep, jnp.log(decision.pairs.weight), 0).sum(), decision

    grad, decision = jax.grad(total, has_aux=True)(jnp.asarray(LOGITS))
    taken = jax.nn.one_hot(by_tokens(decision.pairs.expert, decision), EXPERTS)
    served = by_tokens(decision.slots.keep, decision)[..., None]
    np.testing.assert_allclose(grad, np.where(served, taken - jax.nn.softmax(LOGITS, axis=-1), 0), atol=1e-6)


@pytest.mark.parametrize("slots", [2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [EXPERTS - 1, EXPERTS])
def test_with_a_round_for_every_expert_only_missing_slots_drop(slots, rounds):
    """The drop fraction is max(0, 1 − E · C / S)."""
    _, moe = decided(NextBest(rounds=rounds), slots)
    assert moe.dropped.sum() == np.maximum(0, MASK.sum(-1) - EXPERTS * slots).sum()


def test_more_rounds_never_drop_more():
    dropped = [decided(Drop(), 3)[1].dropped.sum()]
    dropped += [decided(NextBest(rounds=rounds), 3)[1].dropped.sum() for rounds in (1, 2, EXPERTS)]
    assert dropped == sorted(dropped, reverse=True) and dropped[0] > dropped[-1]


@pytest.mark.parametrize("order", [TOP_1.order, ByScore()])
def test_first_choices_that_had_a_slot_keep_it(order):
    plain, sent = (decided(overflow, 3, order=order)[0] for overflow in (Drop(), NextBest(rounds=EXPERTS)))
    kept = by_tokens(plain.slots.keep, plain)
    assert by_tokens(sent.slots.keep, sent)[kept].all()
    assert np.array_equal(by_tokens(sent.pairs.expert, sent)[kept], by_tokens(plain.pairs.expert, plain)[kept])


def test_the_ledger_goes_by_the_first_choice():
    plain, sent = (decided(overflow, 3)[1] for overflow in (Drop(), NextBest(rounds=EXPERTS)))
    assert np.array_equal(sent.assigned, plain.assigned), "sending on must not flatter the load"
    assert np.array_equal(sent.assigned, sent.processed + sent.dropped)
    assert sent.processed.sum() > plain.processed.sum()
    first = LOGITS.argmax(-1)
    decision, _ = decided(NextBest(rounds=EXPERTS), 3)
    served = by_tokens(decision.slots.keep, decision)
    assert np.array_equal(sent.processed, np.bincount(first[served], minlength=EXPERTS))
    assert np.array_equal(by_tokens(decision.chosen_GP, decision)[MASK], first[MASK])


def test_it_sends_nobody_where_a_limit_forbids():
    limit = GroupLimit(groups=3, kept=1, best=1)
    decision, moe = decided(NextBest(rounds=EXPERTS), 3, limit=limit)
    served, expert = by_tokens(decision.slots.keep, decision), by_tokens(decision.pairs.expert, decision)
    assert (expert // 2 == LOGITS.argmax(-1) // 2)[served].all() and moe.dropped.sum() > 0


@pytest.mark.parametrize("selection", [Positive(k=1), Positive(k=1, most=2), Threshold(k=1)], ids=repr)
def test_a_single_expert_in_the_mean_is_not_a_single_one(selection):
    """A second pair could be sent on to where the first one is."""
    controller = ExpertThreshold() if selection.traits.thresholds else NoController()
    given = {"weight": Raw(), "controller": controller, "overflow": NextBest(), "allow_leak": True}
    with pytest.raises(ConfigError, match="next_best sends on single experts, and a token may have several") as error:
        RouterConfig(selection=selection, **given)
    assert error.value.key == "overflow"
    assert RouterConfig(selection=dataclasses.replace(selection, most=1), **given).overflow == NextBest()


@pytest.mark.parametrize("name", SELECTORS)
def test_other_selections_than_of_one_expert_are_refused(name):
    entry = SELECTORS[name]()
    if entry.experts_per_token == 1 and not (entry.traits.fixed or entry.traits.fits):
        return
    weight = Constant() if entry.traits.fixed else Raw()
    controller = ExpertThreshold() if entry.traits.thresholds else NoController()
    with pytest.raises(ConfigError, match="next_best") as error:
        RouterConfig(selection=entry, weight=weight, controller=controller, overflow=NextBest(), allow_leak=True)
    assert error.value.key == "overflow"
