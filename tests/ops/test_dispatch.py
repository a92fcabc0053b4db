"""Movements against a loop over pairs, and against each other in every gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparsejax.ops.assignment import Pairs, choice_major_pairs, fill_slots
from sparsejax.ops.dispatch import MOVEMENTS, slot_weights

from support import assert_close, to_numpy

GROUPS, SIZE, WIDTH, EXPERTS, SLOTS = 2, 6, 3, 4, 3
CASES = {
    "k=1 with drops": (1, "random"),
    "k=2 with drops": (2, "random"),
    "k=3 with drops": (3, "random"),
    "all to the same two": (2, "collapsed"),
    "padding": (2, "padded"),
    "only padding": (1, "empty"),
    "0 to E pairs a token": (1, "uneven"),
}


def setting(case: str):
    """(x, expert outputs, pairs, slots) of a case; group 1 has a tighter limit than group 0."""
    k, kind = CASES[case]
    rng = np.random.default_rng(3)
    experts = np.argsort(rng.random((GROUPS, SIZE, EXPERTS)), axis=-1)[..., :k]
    if kind == "collapsed":
        experts[:] = [1, 3]
    mask = np.ones((GROUPS, SIZE), bool)
    if kind in ("padded", "empty"):
        mask[:, 0 if kind == "empty" else 4 :] = False
    weights = jnp.asarray(rng.random((GROUPS, SIZE, k)) + 0.1, jnp.float32)
    pairs = choice_major_pairs(jnp.asarray(experts), weights, jnp.asarray(mask))
    if kind == "uneven":  # as an expert's choice has it: a token appears in any number of pairs, in any order
        pairs = uneven_pairs(rng)
    slots = fill_slots(pairs, EXPERTS, SLOTS, jnp.array([SLOTS, SLOTS - 1], jnp.int32))
    x, out = rng.normal(size=(GROUPS, SIZE, WIDTH)), rng.normal(size=(EXPERTS, GROUPS, SLOTS, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(out, jnp.float32), pairs, slots


def uneven_pairs(rng) -> Pairs:
    """Token s is in s of the P pairs, up to one with every expert."""
    each = [[(s, e) for s in range(SIZE) for e in rng.permutation(EXPERTS)[:s]] for _ in range(GROUPS)]
    lists = np.array([rng.permutation(group) for group in each])
    of_token = np.full((GROUPS, SIZE, EXPERTS), lists.shape[1])
    for g, s in np.ndindex(GROUPS, SIZE):
        mine = np.flatnonzero(lists[g, :, 0] == s)
        of_token[g, s, : len(mine)] = mine
    return Pairs(
        token=jnp.asarray(lists[..., 0], jnp.int32),
        expert=jnp.asarray(lists[..., 1], jnp.int32),
        weight=jnp.asarray(rng.random(lists.shape[:2]) + 0.1, jnp.float32),
        valid=jnp.ones(lists.shape[:2], bool),
        of_token=jnp.asarray(of_token, jnp.int32),
    )


def by_hand(x, out, pairs, slots):
    """(dispatched, combined, the slots' weights), one pair at a time."""
    x, out, pairs, slots = to_numpy((x, out, pairs, slots))
    z, y = np.zeros(out.shape, np.float32), np.zeros(x.shape, np.float32)
    scale = np.zeros(out.shape[:3], np.float32)
    for g in range(GROUPS):
        for pair in np.flatnonzero(slots.keep[g]):
            s, e, c = pairs.token[g, pair], pairs.expert[g, pair], slots.position[g, pair]
            z[e, g, c] += x[g, s]
            y[g, s] += out[e, g, c]
            scale[e, g, c] = pairs.weight[g, pair]
    return z, y, scale


@jax.jit(static_argnums=0)
def move(movement, x, out, pairs, slots):
    """(dispatched where a slot is filled, combined, the slots' weights)."""
    z, scale = MOVEMENTS[movement].dispatch(x, pairs, slots), slot_weights(pairs, slots)
    filled = (slots.pair < pairs.token.shape[1]).transpose(1, 0, 2)
    return jnp.where(filled[..., None], z, 0), MOVEMENTS[movement].combine(out, pairs, slots), scale


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("movement", MOVEMENTS)
def test_moves_what_a_loop_over_pairs_moves(movement, case):
    setup = setting(case)
    assert_close(move(movement, *setup), by_hand(*setup))


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_a_token_without_a_slot_gets_exactly_zero(movement):
    x, out, pairs, slots = setting("k=1 with drops")
    dropped = ~np.asarray(slots.keep)
    assert 0 < dropped.sum() < dropped.size
    y = np.asarray(move(movement, x, out + 7, pairs, slots)[1])
    assert (y[dropped] == 0).all() and (y[~dropped] != 0).all()


def test_empty_slots_weigh_exactly_nothing():
    _, _, pairs, slots = setting("all to the same two")
    scale = np.asarray(slot_weights(pairs, slots))
    empty = np.asarray(slots.pair).transpose(1, 0, 2) == 2 * SIZE
    assert empty[0].all() and (scale[empty] == 0).all() and (scale[~empty] != 0).all()


def moved(movement, pairs, slots):
    """Dispatch, an expert that doubles what it gets, its weight, and combine: as a function of tokens and weights."""

    def function(x, weight):
        weighted = dataclasses.replace(pairs, weight=weight)
        scale = slot_weights(weighted, slots)[..., None].astype(x.dtype)
        out = 2 * MOVEMENTS[movement].dispatch(x, weighted, slots) * scale
        return MOVEMENTS[movement].combine(out, weighted, slots)

    return function


@jax.jit(static_argnums=0)
def gradients(movement, x, pairs, slots, dy):
    """Of tokens to experts and back, in x and in the pairs' weights."""
    _, pull = jax.vjp(moved(movement, pairs, slots), x, pairs.weight)
    return pull(dy)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("movement", [name for name in MOVEMENTS if name != "einsum"])
def test_gradients_are_those_of_the_one_hot_products(movement, case):
    x, _, pairs, slots = setting(case)
    dy = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), jnp.float32)
    operands = (x, pairs, slots, dy)
    assert_close(gradients(movement, *operands), gradients("einsum", *operands))


@pytest.mark.parametrize("case", ["k=3 with drops", "padding"])
def test_gather_gradients_are_those_of_finite_differences(case):
    x, _, pairs, slots = setting(case)
    # Wide steps: float32, and the function is bilinear.
    options = {"order": 1, "modes": ["rev"], "atol": 5e-3, "rtol": 5e-3, "eps": 1e-2}
    check_grads(jax.jit(moved("gather", pairs, slots)), (x, pairs.weight), **options)


def test_bfloat16_rows_keep_their_dtype_and_weights_get_float32_gradients():
    x, out, pairs, slots = setting("k=2 with drops")
    x, out = x.astype(jnp.bfloat16), out.astype(jnp.bfloat16)
    for movement in MOVEMENTS:
        z, y, scale = move(movement, x, out, pairs, slots)
        assert (z.dtype, y.dtype, scale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        dx, dweights = gradients(movement, x, pairs, slots, jnp.ones_like(y))
        assert (dx.dtype, dweights.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_bfloat16_rows_of_four_pairs_are_rounded_once(movement):
    rng = np.random.default_rng(4)
    experts = jnp.asarray(np.tile(np.arange(EXPERTS), (GROUPS, 64, 1)))
    pairs = choice_major_pairs(experts, jnp.ones(experts.shape), jnp.ones((GROUPS, 64), bool))
    slots = fill_slots(pairs, EXPERTS, 64, jnp.full(GROUPS, 64, jnp.int32))
    out = jnp.asarray(rng.normal(size=(EXPERTS, GROUPS, 64, 16)), jnp.bfloat16)
    exact = MOVEMENTS[movement].combine(out.astype(jnp.float32), pairs, slots)
    y = MOVEMENTS[movement].combine(out, pairs, slots)
    assert y.dtype == jnp.bfloat16
    wrong = np.abs(np.asarray(y, np.float32) - np.asarray(exact))
    assert (wrong <= 2**-8 * np.abs(np.asarray(exact))).all()  # half a step of the last of its bits
