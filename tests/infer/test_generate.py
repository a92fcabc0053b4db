"""Decoding with caches: equal to the pass over whole rows, on one device and on a mesh; rows that ignore each other."""

import jax
import numpy as np
import pytest

from sparsejax.base.errors import RequestError
from sparsejax.infer.generate import Generator
from sparsejax.infer.prompts import SHORTEST, place_prompts
from sparsejax.infer.sampling import Sampling
from sparsejax.model.lm import init_caches

from tiny import BIGRAM, CUBE, DENSE, ONE, SPARSE, SWITCH, batch_of, forward, greedy_without_cache, mesh_of, variables

A, B, C = np.array([5, 9, 2, 7]), np.array([11]), np.arange(20) * 3 % 64
GREEDY, SAMPLED = Sampling(temperature=0), Sampling(top_k=40)


@pytest.fixture(scope="module")
def generators():
    """One Generator per (config, sampling), so that each shape is compiled once."""
    made = {}

    def generate(prompts, sampling=GREEDY, config=SPARSE, mesh=ONE, max_tokens=6, seed=0):
        with jax.set_mesh(mesh_of(mesh)):
            generator = made.setdefault((config, sampling, mesh), Generator(config, sampling))
            return np.array(generator(variables(config, mesh_of(mesh)), prompts, max_tokens, seed).tokens)

    return generate


class TestCaches:
    @pytest.mark.parametrize(("config", "shape"), [(SPARSE, ONE), (SPARSE, CUBE), (SWITCH, CUBE), (DENSE, ONE)])
    def test_decoding_step_by_step_gives_the_logits_of_the_whole_row(self, config, shape):
        length, starts = 12, np.array([3, 7, 1, 6])
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, length))
        order = np.broadcast_to(np.arange(length), tokens.shape)
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            run, model = forward(config), variables(config, mesh)
            whole = np.asarray(run(model, batch_of(tokens, np.ones_like(tokens), order, mesh)).logits)
            found = np.full_like(whole, np.nan)
            caches = jax.jit(lambda: init_caches(config, 4, length))()
            given = order[:, :8] < starts[:, None]  # prompts of different lengths, padded on the right
            out = run(model, batch_of(np.where(given, tokens[:, :8], 0), given, order[:, :8], mesh), caches)
            found[:, :8][given] = np.asarray(out.logits)[given]
            for step in range(length - starts.min()):
                at = starts + step
                live = at < length
                at = np.minimum(at, length - 1)[:, None]
                step_batch = batch_of(np.take_along_axis(tokens, at, 1), live[:, None], at, mesh)
                before = out.caches
                out = run(model, step_batch, before)
                rows = np.flatnonzero(live)
                found[rows, at[rows, 0]] = np.asarray(out.logits)[rows, 0]
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


class TestGenerator:
    @pytest.mark.parametrize(("config", "shape"), [(SPARSE, ONE), (SPARSE, CUBE), (BIGRAM, ONE)])
    def test_greedy_continuations_are_those_without_a_cache(self, generators, config, shape):
        with jax.set_mesh(mesh_of(shape)):
            want = greedy_without_cache(config, mesh_of(shape), [A, B, C], 6)
        np.testing.assert_array_equal(generators([A, B, C], config=config, mesh=shape), want)

    def test_a_sampled_continuation_does_not_depend_on_the_other_prompts(self, generators):
        together = generators([A, C, B], SAMPLED)
        np.testing.assert_array_equal(generators([B], SAMPLED)[0], together[2])
        np.testing.assert_array_equal(generators([A], SAMPLED)[0], together[0])

    def test_a_seed_repeats_its_samples_and_another_has_others(self, generators):
        first = generators([A, C, B], SAMPLED, seed=3)
        np.testing.assert_array_equal(generators([A, C, B], SAMPLED, seed=3), first)
        assert (generators([A, C, B], SAMPLED, seed=4) != first).any(axis=1).all()

    def test_a_prompt_given_twice_has_two_continuations(self, generators):
        first, _, again = generators([B, C, B], SAMPLED)
        assert (first != again).any()

    def test_only_ids_of_the_tokenizer_are_sampled_and_the_speed_is_told(self):
        mesh = mesh_of(CUBE)
        with jax.set_mesh(mesh):
            generator = Generator(DENSE, Sampling(temperature=10.0), vocab_size=5)
            result = generator(variables(DENSE, mesh), [A, B], 30)
        assert set(np.ravel(result.tokens)) == set(range(5))
        assert all(row.dtype == np.int32 and row.shape == (30,) for row in result.tokens)
        assert result.tokens_per_second == pytest.approx(60 / result.decode_seconds)

    @pytest.mark.parametrize(
        ("prompts", "max_tokens", "seed", "said"),
        [
            ([], 1, 0, "no prompt"),
            ([A, np.zeros(0, int)], 1, 0, "prompt 2 has no tokens"),
            ([np.array([1, 64])], 1, 0, "token id 64; the model has 0 … 63"),
            ([np.array([-1])], 1, 0, "token id -1"),
            ([A], 0, 0, "max_tokens=0"),
            ([A], 1, 2**32, "seed=4294967296"),
        ],
    )
    def test_bad_requests_are_told_apart(self, prompts, max_tokens, seed, said):
        with jax.set_mesh(mesh_of(ONE)), pytest.raises(RequestError, match=said):
            Generator(SPARSE, GREEDY)(None, prompts, max_tokens, seed)


class TestPlacePrompts:
    def test_the_last_token_waits_and_the_rest_is_padded(self):
        batch = place_prompts([A, B], mesh_of(ONE))
        assert batch.tokens.shape == (2, SHORTEST)
        np.testing.assert_array_equal(np.asarray(batch.tokens)[0, :4], [5, 9, 2, 0])
        np.testing.assert_array_equal(batch.lengths, [3, 0])
        np.testing.assert_array_equal(batch.last, [7, 11])

    @pytest.mark.parametrize(("length", "padded"), [(1, 16), (17, 16), (18, 32), (33, 32), (34, 64)])
    def test_lengths_are_rounded_up_to_powers_of_two(self, length, padded):
        assert place_prompts([np.ones(length)], mesh_of(ONE)).tokens.shape == (1, padded)

    def test_rows_fill_the_mesh_and_are_split_over_it(self):
        batch = place_prompts([A] * 5, mesh_of(CUBE))
        assert batch.tokens.shape[0] == 8
        np.testing.assert_array_equal(batch.real, [True] * 5 + [False] * 3)
        assert batch.tokens.addressable_shards[0].data.shape[0] == 2
