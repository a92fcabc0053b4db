"""Packing against a slow reference, and the properties that training relies on."""

import functools

import numpy as np
import pytest

from sparsejax.data.packing import pack, permutation, sequential_plan, shuffled_plan

CASES = [
    ([5, 3, 9, 1, 12], 4),  # several documents, some shorter than a row
    ([30], 7),  # one document: the ring's seam must still end it
    ([1, 1, 1, 1], 3),  # nothing to predict
    ([2, 40, 2, 2, 17, 1], 8),  # N is a multiple of T
    ([4, 3], 16),  # a row longer than the corpus
]


def corpus(lengths):
    """Tokens that are all different, so that a token tells where it comes from."""
    offsets = np.cumsum([0, *lengths])
    return np.arange(1, offsets[-1] + 1).astype(np.uint16), offsets, np.arange(len(lengths), dtype=np.int32) + 10


def reference(order, phase, windows, tokens, offsets, domains, length):
    """Rows written token by token."""
    ring = [(document, place) for document in order for place in range(offsets[document], offsets[document + 1])]
    ring = ring[phase:] + ring[:phase] + ring[phase : phase + 1]  # the token after the last is the first one
    first_of_stream = len(ring) - 1 - phase  # where the seam is in `ring`
    rows = []
    for window in windows:
        row = {name: [] for name in ("tokens", "targets", "segments", "positions", "loss_mask", "domains")}
        segment, position = 0, 0
        for at in range(window * length, (window + 1) * length):
            if at >= len(ring) - 1:
                values = (0, 0, 0, 0, False, 0)
            else:
                (document, place), (next_document, next_place) = ring[at], ring[at + 1]
                new = at == window * length or at == first_of_stream or ring[at - 1][0] != document
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
                predicts = (
                    next_document == document
                    and at + 1 != first_of_stream
                    and not (at + 1 == len(ring) - 1 and not phase)
                )
                target = tokens[next_place] if predicts else 0
                values = (tokens[place], target, segment, position, predicts, domains[document])
            for name, value in zip(row, values, strict=True):
                row[name].append(value)
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(("lengths", "length"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_equal_the_reference(lengths, length, seed):
    tokens, offsets, domains = corpus(lengths)
    plan = shuffled_plan(offsets, domains, length, seed, epoch=3)
    got = pack(plan, tokens, np.arange(plan.num_rows))
    order = plan.domains - 10
    want = reference(order, plan.phase, plan.windows, tokens, offsets, domains, length)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].dtype == (bool if name == "loss_mask" else np.int32), name


@pytest.mark.parametrize(("lengths", "length"), CASES)
@pytest.mark.parametrize("make", [sequential_plan, functools.partial(shuffled_plan, seed=5, epoch=0)])
def test_every_token_is_seen_once_and_is_a_target_once_unless_it_begins_a_document(lengths, length, make):
    tokens, offsets, domains = corpus(lengths)
    plan = make(offsets, domains, length)
    rows = pack(plan, tokens, np.arange(plan.num_rows))
    assert sorted(rows["tokens"][rows["segments"] > 0]) == list(tokens)
    assert sorted(rows["targets"][rows["loss_mask"]]) == sorted(set(tokens) - set(tokens[offsets[:-1]]))
    np.testing.assert_array_equal(rows["targets"][rows["loss_mask"]], rows["tokens"][rows["loss_mask"]] + 1)


def test_a_row_does_not_depend_on_which_rows_are_made_with_it():
    tokens, offsets, domains = corpus([13, 7, 22, 5, 41])
    plan = shuffled_plan(offsets, domains, 6, 0, 0)
    together = pack(plan, tokens, np.array([7, 2, 2, 11]))
    for place, row in enumerate([7, 2, 2, 11]):
        alone = pack(plan, tokens, np.array([row]))
        for name in together:
            np.testing.assert_array_equal(together[name][place], alone[name][0])


def test_the_plan_is_a_function_of_seed_and_epoch():
    _, offsets, domains = corpus(np.arange(1, 60))
    plans = {key: shuffled_plan(offsets, domains, 8, *key) for key in [(0, 0), (0, 1), (1, 0), (-1, 0)]}
    again = shuffled_plan(offsets, domains, 8, 0, 0)
    np.testing.assert_array_equal(plans[0, 0].domains, again.domains)
    np.testing.assert_array_equal(plans[0, 0].windows, again.windows)
    for field in ("starts", "domains", "windows"):
        assert len({tuple(getattr(plan, field)) for plan in plans.values()}) == 4, field
    assert len({plan.phase for plan in (shuffled_plan(offsets, domains, 8, 0, epoch) for epoch in range(40))}) == 8


def test_the_permutation_never_changes():
    """A resumed run may have another NumPy: these numbers are part of the format."""
    assert permutation(10, 0, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    counts = np.bincount([permutation(4, seed)[0] for seed in range(400)], minlength=4)
    assert counts.min() > 70  # 100 expected, standard deviation 8.7


def test_sequential_rows_past_the_end_are_empty():
    tokens, offsets, domains = corpus([5, 4])
    rows = pack(sequential_plan(offsets, domains, 4), tokens, np.array([2, 3, 1000]))
    assert rows["segments"].tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4]
    for array in rows.values():
        assert not array[1:].any()


def test_seams_of_documents_inside_a_row():
    """By hand: documents [1 2 3] [4 5] [6 7 8 9], T = 5."""
    tokens, offsets, domains = corpus([3, 2, 4])
    rows = pack(sequential_plan(offsets, domains, 5), tokens, np.arange(2))
    assert rows["tokens"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert rows["targets"].tolist() == [[2, 3, 0, 5, 0], [7, 8, 9, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert rows["domains"].tolist() == [[10, 10, 10, 11, 11], [12, 12, 12, 12, 0]]
