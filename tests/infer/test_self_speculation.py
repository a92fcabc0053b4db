"""Self-speculative decoding says what the full model says, whatever it drafts with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from sparsejax.base.errors import RequestError
from sparsejax.blocks import HALTINGS
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.infer.self_speculation import DRAFT, SelfSpeculation, _draw, accepted
from sparsejax.model.exits import ExitHeads

from tiny import CUBE, DENSE, ONE, SPARSE, SWITCH, batch_of, forward, mesh_of, variables

A, B, C = np.array([5, 9, 2, 7]), np.array([11]), np.arange(20) * 3 % 64
GREEDY = Sampling(temperature=0)
DEEP = dataclasses.replace(SPARSE, repeats=2, tied_head=False)
EXITS = dataclasses.replace(DEEP, exits=ExitHeads(layers=(2,), head="own"))
TOKENS = 11


@functools.cache
def generated(config, how, shape=ONE):
    with jax.set_mesh(mesh_of(shape)):
        generator = Generator(config, GREEDY, decoding=how)
        return generator(variables(config, mesh_of(shape)), [A, B, C], TOKENS)


def ties(config, tokens, shape=ONE):
    """Places of sampled tokens whose two largest logits in the full model lie within 1e-4."""
    mesh, found = mesh_of(shape), []
    with jax.set_mesh(mesh):
        run, model = forward(config), variables(config, mesh)
        rows = np.zeros((4, len(C) + TOKENS), np.int32)
        for row, (prompt, said) in enumerate(zip((A, B, C), tokens, strict=True)):
            rows[row, : len(prompt) + TOKENS] = [*prompt, *said]
        order = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        best = np.sort(np.asarray(run(model, batch_of(rows, np.ones_like(rows), order, mesh)).logits))[..., -2:]
        for row, prompt in enumerate((A, B, C)):
            gaps = np.diff(best[row, len(prompt) - 1 : len(prompt) - 1 + TOKENS])[:, 0]
            found.append(np.flatnonzero(gaps < 1e-4).tolist())
    return found


@pytest.mark.parametrize(
    ("config", "layers", "length", "shape"),
    [(DEEP, 1, 4, ONE), (DEEP, 3, 2, ONE), (EXITS, 2, 3, ONE), (SWITCH, 1, 2, CUBE)],
    ids=["one layer", "all but one", "own head", "mesh"],
)
def test_greedy_text_is_that_of_the_full_model(config, layers, length, shape):
    full = np.array(generated(config, None, shape).tokens)
    assert ties(config, full, shape) == [[], [], []]
    found = generated(config, SelfSpeculation(layers=layers, length=length), shape)
    np.testing.assert_array_equal(np.array(found.tokens), full)
    # Rounds of 1, 2, … m + 1 tokens; the last one may go beyond what was asked for.
    kept = found.kept @ np.arange(1, length + 2)
    assert found.kept.shape == (3, length + 1) and ((kept >= TOKENS) & (kept < TOKENS + length + 1)).all()


def test_a_good_draft_is_kept_whole_and_a_bad_one_is_not():
    good, bad = (generated(DEEP, SelfSpeculation(layers=layers, length=length)) for layers, length in ((3, 2), (1, 4)))
    mean = lambda found: (found.kept @ np.arange(1, found.kept.shape[1] + 1)).sum() / found.kept.sum()  # noqa: E731
    assert mean(good) > 1 and mean(bad) >= 1


class TestAccepted:
    P = np.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32)
    Q = np.array([[0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0]], np.float32)

    def sampled(self, p, q, draws=20_000):
        """(drafts accepted, first two tokens said) of so many rounds with drafts of two tokens."""

        def one(key):
            drafts = jnp.stack([_draw(key, jnp.int32(at), DRAFT, q[at]) for at in range(2)])
            number, last = accepted(key, jnp.int32(0), jnp.concatenate([jnp.zeros(1, jnp.int32), drafts]), p, q)
            said = jnp.where(jnp.arange(2) < number, drafts, jnp.where(jnp.arange(2) == number, last, -1))
            return number, said, last

        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), draws)))

    def test_what_is_said_has_the_distribution_of_the_full_model(self):
        number, said, last = self.sampled(jnp.asarray(self.P), jnp.asarray(self.Q))
        of = lambda counts, p: chisquare(counts, counts.sum() * np.float64(p) / np.float64(p).sum()).pvalue  # noqa: E731
        first = np.bincount(said[:, 0], minlength=4)
        assert of(first, self.P[0]) > 1e-3
        second = said[number > 0, 1]
        assert of(np.bincount(second, minlength=4), self.P[1]) > 1e-3
        third = last[number == 2]
        assert len(third) > 1000 and of(np.bincount(third, minlength=4), self.P[2]) > 1e-3
        # The draft's own distribution is far away.
        assert of(first, self.Q[0]) < 1e-9

    def test_drafts_are_accepted_as_often_as_the_two_agree(self):
        number, *_ = self.sampled(jnp.asarray(self.P), jnp.asarray(self.Q))
        share = np.minimum(self.P[0], self.Q[0]).sum()
        assert abs((number > 0).mean() - share) < 4 * (share * (1 - share) / len(number)) ** 0.5

    def test_equal_distributions_accept_everything(self):
        number, *_ = self.sampled(jnp.asarray(self.P), jnp.asarray(self.P), draws=500)
        assert (number == 2).all()


@pytest.mark.parametrize(("layers", "length"), [(0, 1), (1, 0)])
def test_numbers_are_positive(layers, length):
    with pytest.raises(RequestError, match="allowed: 1 or more"):
        SelfSpeculation(layers=layers, length=length)


def test_tokens_that_halt_have_no_draft():
    with pytest.raises(RequestError, match="halting=none"):
        SelfSpeculation(layers=1).check(dataclasses.replace(DENSE, repeats=2, halting=HALTINGS["act"]()))


def test_a_draft_takes_fewer_layers_than_the_model_has():
    with pytest.raises(RequestError, match="draft layers 1; allowed: 1 … 0"):
        Generator(dataclasses.replace(DENSE, repeats=1), GREEDY, decoding=SelfSpeculation(layers=1))
