"""Slot order by hand and against the loop that fills one slot at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.assignment import (
    Pairs,
    at_pairs,
    by_token,
    choice_major_pairs,
    fill_slots,
    served_tokens,
    sum_over_pairs,
)

from reference import routing as slow

HAND_WORKED = np.array([[[0, 1], [0, 2], [1, 0]]])  # three tokens, three experts, two choices
"""Choice-major: t0→e0, t1→e0, t2→e1, then t0→e1, t1→e2, t2→e0."""


class TestChoiceMajorOrder:
    def test_every_first_choice_goes_before_any_second(self):
        scores = jnp.array([[[0.6, 0.1], [0.5, 0.2], [0.4, 0.3]]])
        pairs = choice_major_pairs(jnp.asarray(HAND_WORKED), scores, jnp.array([[True, False, True]]))
        assert np.array_equal(pairs.weight, np.float32([[0.6, 0.5, 0.4, 0.1, 0.2, 0.3]]))
        assert pairs.token.tolist() == [[0, 1, 2, 0, 1, 2]]
        assert pairs.expert.tolist() == [[0, 0, 1, 1, 2, 0]]
        assert pairs.valid.tolist() == [[True, False, True, True, False, True]]
        assert pairs.of_token.tolist() == [[[0, 3], [1, 4], [2, 5]]]
        assert {leaf.dtype for leaf in (pairs.token, pairs.expert, pairs.of_token)} == {jnp.dtype("int32")}

    def test_pairs_of_a_token_are_its_own(self):
        experts = np.random.default_rng(0).integers(0, 5, (2, 7, 3))
        pairs = choice_major_pairs(jnp.asarray(experts), jnp.asarray(experts / 5), jnp.ones((2, 7), bool))
        assert np.array_equal(by_token(pairs.expert, pairs), experts)
        assert np.array_equal(by_token(pairs.weight, pairs), np.float32(experts / 5))
        assert np.array_equal(by_token(pairs.token, pairs), np.broadcast_to(np.arange(7)[None, :, None], (2, 7, 3)))


class TestByToken:
    """Three pairs: tokens 2, 0, 2; token 1 has none."""

    PAIRS = Pairs(
        token=jnp.array([[2, 0, 2]]),
        expert=jnp.array([[0, 0, 1]]),
        weight=jnp.zeros((1, 3)),
        valid=jnp.ones((1, 3), bool),
        of_token=jnp.array([[[1, 3], [3, 3], [0, 2]]]),
    )
    VALUES = jnp.array([[5.0, 7.0, 11.0]])

    def test_a_token_without_a_pair_reads_zeros(self):
        assert by_token(self.VALUES, self.PAIRS).tolist() == [[[7, 0], [0, 0], [5, 11]]]
        assert sum_over_pairs(self.VALUES, self.PAIRS).tolist() == [[7, 0, 16]]

    def test_a_pair_reads_its_tokens_value(self):
        assert at_pairs(self.VALUES, self.PAIRS).tolist() == [[11, 5, 11]]

    def test_each_is_the_others_transpose(self):
        spread = lambda values: at_pairs(values, self.PAIRS)  # noqa: E731
        collect = lambda values: sum_over_pairs(values, self.PAIRS)  # noqa: E731
        assert np.array_equal(jax.jacobian(spread)(self.VALUES)[0, :, 0], [[0, 0, 1], [1, 0, 0], [0, 0, 1]])
        assert np.array_equal(jax.jacobian(collect)(self.VALUES)[0, :, 0], [[0, 1, 0], [0, 0, 0], [1, 0, 1]])


def fill_by_hand(num_slots, limit, mask=(True, True, True)):
    pairs = choice_major_pairs(jnp.asarray(HAND_WORKED), jnp.ones((1, 3, 2)), jnp.array([mask]))
    return fill_slots(pairs, 3, num_slots, jnp.array([limit], jnp.int32))


class TestFillSlotsByHand:
    def test_one_slot_each(self):
        slots = fill_by_hand(num_slots=1, limit=1)
        assert slots.position.tolist() == [[0, 1, 0, 1, 0, 2]]
        assert slots.keep.tolist() == [[True, False, True, False, True, False]]
        assert slots.pair.tolist() == [[[0], [2], [4]]]
        assert slots.assigned.tolist() == [3, 2, 1]
        assert slots.processed.tolist() == [1, 1, 1]

    def test_two_slots_each_leave_one_empty(self):
        slots = fill_by_hand(num_slots=2, limit=2)
        assert slots.pair.tolist() == [[[0, 1], [2, 3], [4, 6]]]
        assert slots.processed.tolist() == [2, 2, 1]

    def test_the_limit_may_be_tighter_than_the_slots(self):
        slots = fill_by_hand(num_slots=2, limit=1)
        assert slots.pair.tolist() == [[[0, 6], [2, 6], [4, 6]]]
        assert slots.processed.tolist() == [1, 1, 1]

    def test_padding_takes_no_slot_and_is_not_counted(self):
        slots = fill_by_hand(num_slots=1, limit=1, mask=(False, True, True))
        assert slots.keep.tolist() == [[False, True, True, False, True, False]]
        assert slots.pair.tolist() == [[[1], [2], [4]]]
        assert slots.assigned.tolist() == [2, 1, 1]

    def test_limit_zero_drops_everything(self):
        slots = fill_by_hand(num_slots=1, limit=0)
        assert not slots.keep.any() and slots.processed.tolist() == [0, 0, 0]
        assert slots.assigned.tolist() == [3, 2, 1]

    def test_served_tokens(self):
        pairs = choice_major_pairs(jnp.asarray(HAND_WORKED[:, :, :1]), jnp.ones((1, 3, 1)), jnp.ones((1, 3), bool))
        slots = fill_slots(pairs, 3, 1, jnp.array([1], jnp.int32))
        assert served_tokens(pairs, slots.keep).tolist() == [[True, False, True]]


def random_pairs(case: str, groups=3, size=40, num_experts=6):
    """Flat lists that no token-choice router would write, too: any expert, any validity."""
    rng = np.random.default_rng(7)
    expert = rng.integers(0, num_experts, (groups, size))
    valid = np.ones((groups, size), bool)
    if case == "one expert":
        expert[:] = num_experts - 1
    elif case == "empty experts":
        expert[:] = 2 * (expert // 2)
    elif case == "invalid pairs":
        valid = rng.random((groups, size)) < 0.6
    elif case == "nothing valid":
        valid[:] = False
    token = np.tile(np.arange(size), (groups, 1))
    return Pairs(
        token=jnp.asarray(token, jnp.int32),
        expert=jnp.asarray(expert, jnp.int32),
        weight=jnp.ones(expert.shape),
        valid=jnp.asarray(valid),
        of_token=jnp.asarray(token[..., None], jnp.int32),
    )


@pytest.fixture(scope="module")
def fill():
    return jax.jit(fill_slots, static_argnums=(1, 2))


class TestFillSlots:
    @pytest.mark.parametrize("case", ["random", "one expert", "empty experts", "invalid pairs", "nothing valid"])
    def test_against_one_slot_at_a_time(self, fill, case):
        pairs, num_experts, num_slots, limits = random_pairs(case), 6, 8, [8, 5, 0]
        slots = fill(pairs, num_experts, num_slots, jnp.array(limits, jnp.int32))
        assigned, processed = np.zeros(num_experts, int), np.zeros(num_experts, int)
        for g, limit in enumerate(limits):
            expert, valid = np.asarray(pairs.expert[g]), np.asarray(pairs.valid[g])
            positions, kept = slow.fill(list(zip(expert, valid, strict=True)), num_experts, limit)
            assert np.array_equal(slots.keep[g], kept)
            assert np.array_equal(np.asarray(slots.position[g])[valid], np.array(positions)[valid])
            assigned += np.bincount(expert[valid], minlength=num_experts)
            processed += np.bincount(expert[kept], minlength=num_experts)
        assert np.array_equal(slots.assigned, assigned) and np.array_equal(slots.processed, processed)
        assert {slots.assigned.dtype, slots.processed.dtype, slots.pair.dtype} == {jnp.dtype("int32")}

    @pytest.mark.parametrize("case", ["random", "one expert", "empty experts", "invalid pairs"])
    def test_slots_and_kept_pairs_are_one_to_one_without_holes_in_list_order(self, fill, case):
        pairs, size, limits = random_pairs(case), 40, [8, 5, 1]
        slots = fill(pairs, 6, 8, jnp.array(limits, jnp.int32))
        for g, limit in enumerate(limits):
            filled = np.asarray(slots.pair[g]) < size
            inside = np.asarray(slots.pair[g])[filled]
            assert sorted(inside) == sorted(np.flatnonzero(slots.keep[g])), "a pair has two slots, or a slot two pairs"
            for e in range(6):
                count = filled[e].sum()
                assert count <= limit and filled[e, :count].all(), "slots fill from 0 without holes"
                in_slots = np.asarray(slots.pair[g, e, :count])
                assert (np.diff(in_slots) > 0).all(), "slots fill in the order of the list"
                assert (np.asarray(pairs.expert[g])[in_slots] == e).all()
                assert np.array_equal(np.asarray(slots.position[g])[in_slots], np.arange(count))

    def test_a_group_too_large_for_the_sort_key_is_refused(self):
        wide = jax.ShapeDtypeStruct((1, 2**24), jnp.int32)
        valid = jax.ShapeDtypeStruct(wide.shape, bool)
        pairs = Pairs(token=wide, expert=wide, weight=wide, valid=valid, of_token=wide)
        with pytest.raises(ValueError, match="group_size"):
            jax.eval_shape(lambda p: fill_slots(p, 128, 4, jnp.array([4], jnp.int32)), pairs)
