"""Readers that skip: what they are when nothing is skipped, and their gradients against counting every way to read."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def skimmers():
    sys.path.insert(0, str(EXPERIMENTS))
    yield __import__("recurrent_skim")
    sys.path.remove(str(EXPERIMENTS))


def setup(skimmers, length=12, **settings):
    reader = skimmers.Reader(width=8, **settings)
    p = skimmers.init(jax.random.key(0), reader)
    p["jump"]["b"] = jnp.zeros_like(p["jump"]["b"])
    tokens = jax.random.randint(jax.random.key(1), (5, length), 0, skimmers.VOCABULARY)
    return reader, p, tokens


def test_every_jump_to_the_next_token_is_a_plain_lstm(skimmers):
    reader, p, tokens = setup(skimmers)
    plain = skimmers.read_only(p, tokens, jnp.ones(tokens.shape, bool))
    jumping = skimmers.jump(p, reader, tokens, None, jnp.ones(tokens.shape, jnp.int32))
    np.testing.assert_array_equal(jumping.state, plain.state)
    assert (jumping.read == 1).all()


def test_a_skim_as_wide_as_the_reader_with_its_weights_is_a_plain_lstm(skimmers):
    _, p, tokens = setup(skimmers, kind="skim", skim_width=8)
    plain = skimmers.read_only(p, tokens, jnp.ones(tokens.shape, bool))
    same = p | {"small": p["full"]}
    np.testing.assert_allclose(skimmers.skim(same, tokens, jax.random.key(2)).state, plain.state, atol=1e-6)
    assert not np.allclose(skimmers.skim(p, tokens, jax.random.key(2)).state, plain.state, atol=1e-2)
    all_full = skimmers.skim(p, tokens, None, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(all_full.state, plain.state, atol=1e-6)


def test_what_is_skimmed_keeps_the_other_dimensions(skimmers):
    _, p, tokens = setup(skimmers, kind="skim", skim_width=3)
    half = jnp.arange(12) < 6
    early = skimmers.skim(p, tokens[:, :6], None, jnp.ones((5, 6), bool)).state
    late = skimmers.skim(p, tokens, None, jnp.broadcast_to(half, tokens.shape)).state
    np.testing.assert_array_equal(late[:, 3:], early[:, 3:])
    assert not np.allclose(late[:, :3], early[:, :3])


def test_jumps_land_where_they_say_and_end_after_so_many(skimmers):
    reader, p, tokens = setup(skimmers, longest=4, read=2, jumps=2)
    taken = jnp.array([[3] * 12, [1] * 12, [0] * 12, [4] * 12, [2] * 12])
    read = skimmers.jump(p, reader, tokens, None, taken).read
    expected = [{0, 1, 4, 5, 8, 9}, {0, 1, 2, 3, 4, 5}, {0, 1}, {0, 1, 5, 6, 10, 11}, {0, 1, 3, 4, 6, 7}]
    assert [set(np.flatnonzero(row)) for row in read] == expected


def test_what_is_jumped_over_does_not_matter(skimmers):
    reader, p, tokens = setup(skimmers)
    one = skimmers.jump(p, reader, tokens, jax.random.key(3))
    others = jnp.where(one.read > 0, tokens, (tokens + 1) % skimmers.VOCABULARY)
    again = skimmers.jump(p, reader, others, jax.random.key(3))
    assert 0 < one.read.mean() < 1
    np.testing.assert_array_equal(again.state, one.state)


@pytest.mark.parametrize("settings", [{}, {"read": 2}, {"jumps": 2}])
def test_touching_only_what_is_read_gives_the_masked_state(skimmers, settings):
    reader, p, _ = setup(skimmers, **settings)
    p["jump"]["w"] = 3 * p["jump"]["w"]  # so that texts are read differently
    tokens = jax.random.randint(jax.random.key(4), (40, 12), 0, skimmers.VOCABULARY)
    masked = skimmers.jump(p, reader, tokens, None)
    assert len({tuple(row) for row in np.asarray(masked.read)}) > 3
    touched = jax.jit(jax.vmap(lambda t: skimmers.jump_one(p, reader, t)))(tokens)
    np.testing.assert_allclose(touched, masked.state, atol=1e-6)


@pytest.mark.parametrize("kind", ["skim", "jump"])
def test_without_a_key_nothing_is_drawn(skimmers, kind):
    reader, p, tokens = setup(skimmers, kind=kind)
    first, again = (skimmers.read_text(p, reader, tokens, None) for _ in range(2))
    np.testing.assert_array_equal(first.state, again.state)
    assert set(np.unique(np.asarray(first.read))) <= {0.0, 1.0}
    drawn = [skimmers.read_text(p, reader, tokens, jax.random.key(i)).read for i in range(2)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("settings", [{"length": 5}, {"length": 6, "read": 2}, {"length": 4, "jumps": 2}])
def test_the_reinforce_gradient_is_that_of_the_expected_loss(skimmers, settings):
    """Both by counting all jumps at all places; those where none is due are counted as often as there are actions."""
    reader, p, tokens = setup(skimmers, longest=2, price=0.7, **settings)
    p["baseline"] = {"w": 0.3 * jnp.ones(8), "b": jnp.float32(-0.5)}
    tokens, labels = tokens[:1], jnp.array([2])
    length = tokens.shape[1]
    paths = jnp.asarray(list(itertools.product(range(3), repeat=length)), jnp.int32)

    def read(p):
        many = jnp.broadcast_to(tokens, paths.shape)
        reading = skimmers.jump(p, reader, many, None, paths)
        loss, surrogate = skimmers.loss_terms(p, reader, reading, jnp.broadcast_to(labels, (len(paths),)))
        idle = (reading.log_probability == 0).sum(-1)
        weight = jnp.exp(reading.log_probability.sum(-1)) / 3.0**idle
        return loss, surrogate, weight

    def expected(p):
        loss, _, weight = read(p)
        return (weight * loss).sum()

    def estimated(p):
        loss, surrogate, weight = read(p)
        return (jax.lax.stop_gradient(weight) * (loss + surrogate)).sum()

    np.testing.assert_allclose(read(p)[2].sum(), 1, rtol=1e-5)
    exact, found = jax.jit(jax.grad(expected))(p), jax.jit(jax.grad(estimated))(p)
    assert np.abs(exact["jump"]["w"]).max() > 1e-3
    for name in ("embedding", "full", "jump", "head"):
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(exact[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())), err_msg=name)
    assert np.abs(found["baseline"]["b"]) > 1e-3  # of its own error
    assert (exact["baseline"]["b"] == 0).all()


def test_blind_readers_read_the_share_that_they_are_given(skimmers):
    for blind in ("random", "fixed"):
        reader = dataclasses.replace(skimmers.Reader(), blind=blind, share=0.3)
        keep = skimmers.kept(reader, (500, 40), jax.random.key(0))
        assert float(keep.mean()) == pytest.approx(0.3, abs=0.01)
    assert skimmers.kept(skimmers.Reader(blind="fixed", share=1.0), (2, 40), jax.random.key(0)).all()


def test_texts_are_evidence_and_quotes(skimmers):
    tokens, labels = map(np.asarray, skimmers.draw_texts(jax.random.key(0), 2000))
    place, right, evidence = np.zeros(2000, int), 0, 0
    for text, label in zip(tokens, labels, strict=True):
        place = 0
        while place < len(text):
            token = text[place]
            assert token < skimmers.CLASSES + skimmers.LONGEST_QUOTE
            if token < skimmers.CLASSES:
                right, evidence = right + (token == label), evidence + 1
            place += 1 if token < skimmers.CLASSES else token - skimmers.CLASSES + 2
    assert right / evidence == pytest.approx(0.6 + 0.4 / skimmers.CLASSES, abs=0.01)


def test_the_committed_page_is_that_of_its_figures(skimmers):
    results = skimmers.json.loads((EXPERIMENTS / "recurrent_skim.json").read_text())
    text = (EXPERIMENTS / "recurrent_skim.md").read_text()
    command = text.split("`")[1]
    assert skimmers.page(results, command) == text.partition("\n## Reading")[0]


def test_a_page_is_written_and_keeps_its_reading(skimmers, tmp_path, monkeypatch):
    runs = [{"accuracy": a, "read": 0.25, "multiply_adds": 9.0} for a in (0.4, 0.6)]
    seconds = [{"plain": 2e-6, "jump": 1e-6}] * 2
    monkeypatch.setattr(skimmers, "study", lambda seeds, steps: {"plain LSTM": runs, "seconds": seconds})
    arguments = ["--seeds=0,1", "--steps=1", f"--out={tmp_path}"]
    skimmers.main(arguments)
    page = tmp_path / "recurrent_skim.md"
    assert "| plain LSTM | 50.0% ± 14.14% | 25.0% | 9 |" in page.read_text()
    page.write_text(page.read_text() + "\n## Reading\n\nSo it is.\n")
    skimmers.main(arguments)
    assert page.read_text().endswith("## Reading\n\nSo it is.\n") and page.read_text().count("## Reading") == 1
