"""What given continuations lose, token by token: against one pass over whole rows, and with early exits."""

import dataclasses

import jax
import numpy as np
import pytest

from sparsejax.base.errors import RequestError
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.infer.self_speculation import SelfSpeculation
from sparsejax.model.exits import ExitHeads

from tiny import CUBE, ONE, SPARSE, batch_of, forward, mesh_of, variables

CONFIG = dataclasses.replace(SPARSE, repeats=2, tied_head=False, exits=ExitHeads(layers=(2, 3)))
PROMPTS = [np.array([1, 2, 3]), np.array([9]), np.array([5, 5, 8, 13, 40])]
TEXTS = [np.array([7, 8, 9, 10, 3, 3]), np.array([2, 60, 1]), np.array([4, 4, 4, 4, 11])]
MIXED = EarlyExit(threshold=0.025)
SAMPLING = Sampling(temperature=0)


def scored(how=None, shape=ONE, prompts=PROMPTS, texts=TEXTS, threshold=None):
    with jax.set_mesh(mesh_of(shape)):
        model = variables(CONFIG, mesh_of(shape))
        return Generator(CONFIG, SAMPLING, decoding=how).score(model, prompts, texts, threshold)


def test_a_continuation_loses_what_one_pass_over_the_row_says():
    mesh = mesh_of(ONE)
    with jax.set_mesh(mesh):
        model, run = variables(CONFIG, mesh), forward(CONFIG)
        for prompt, text, nll in zip(PROMPTS, TEXTS, scored().nll, strict=True):
            row = np.concatenate([prompt, text])[None]
            order = np.arange(row.shape[1])[None]
            logits = np.asarray(run(model, batch_of(row, order * 0 + 1, order, mesh)).logits, np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            wanted = [-log_p[len(prompt) + n - 1, token] for n, token in enumerate(text)]
            np.testing.assert_allclose(nll, wanted, rtol=2e-5)


def test_an_exit_that_is_never_taken_changes_no_bit():
    plain, never = scored(), scored(MIXED, threshold=1.0)
    assert all(np.array_equal(*pair) for pair in zip(plain.nll, never.nll, strict=True))
    assert all((depths == 4).all() for depths in never.depths) and plain.depths is None


def test_given_tokens_leave_where_the_same_samples_left():
    with jax.set_mesh(mesh_of(ONE)):
        drawn = Generator(CONFIG, SAMPLING, decoding=MIXED)(variables(CONFIG, mesh_of(ONE)), PROMPTS, 8)
    found = scored(MIXED, texts=drawn.tokens)
    assert len(np.unique(drawn.depths)) > 1
    np.testing.assert_array_equal(np.stack(found.depths), drawn.depths)
    plain = scored(texts=drawn.tokens)
    left_early = drawn.depths < 4
    assert (np.stack(found.nll) != np.stack(plain.nll))[left_early].all()


def test_a_mesh_and_other_rows_change_nothing():
    together, split = scored(MIXED), scored(MIXED, CUBE)
    alone = scored(MIXED, prompts=PROMPTS[1:2], texts=TEXTS[1:2])
    for one, other in zip(together.nll, split.nll, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(alone.nll[0], together.nll[1], rtol=1e-5)
    assert np.array_equal(alone.depths[0], together.depths[1])


@pytest.mark.parametrize(
    "how, texts, said",
    [
        (SelfSpeculation(layers=2, length=2), TEXTS, "drafts change no probability"),
        (None, TEXTS[:2], "2 continuations of 3 prompts"),
        (None, [*TEXTS[:2], np.array([64])], "64"),
    ],
)
def test_what_cannot_be_scored_is_refused(how, texts, said):
    with pytest.raises(RequestError, match=said):
        scored(how, texts=texts)
