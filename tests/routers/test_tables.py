"""Hash tables: builders against loops, what is read from files, and bigrams that stay within their document."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus, token_counts
from sparsejax.ops.assignment import by_token
from sparsejax.ops.hashing import balanced_table, clustered_table
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.tables import Hash, counts_by_expert
from sparsejax.routers.weights import Raw

from reference import selection as slow
from runs import arguments, here
from support import ONE_DEVICE, candidates, host_batch, on_mesh, put_batch

EXPERTS, VOCAB = 8, 300
RNG = np.random.default_rng(0)
ZIPF = (10_000 / np.arange(1, VOCAB + 1)).astype(np.int64)[RNG.permutation(VOCAB)]


def experts_of(selector, tokens, previous=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    previous = jnp.full_like(tokens, -1) if previous is None else jnp.asarray(previous, jnp.int32)
    pairs = selector(candidates(np.ones((*tokens.shape, EXPERTS)), tokens=tokens, previous=previous))
    return np.asarray(by_token(pairs.expert, pairs))


class TestBalanced:
    @pytest.mark.parametrize("k", [1, 3])
    def test_against_a_loop(self, k):
        counts = np.where(RNG.random(VOCAB) < 0.3, 0, ZIPF)  # some never occur
        table = balanced_table(counts, EXPERTS, k)
        assert table.dtype == np.int32 and table.tolist() == slow.balanced_table(counts.tolist(), EXPERTS, k)

    @pytest.mark.parametrize("k", [1, 3])
    def test_loads_differ_by_the_most_frequent_id_at_most(self, k):
        table = balanced_table(ZIPF, EXPERTS, k)
        load = np.zeros(EXPERTS)
        np.add.at(load, table, ZIPF[:, None])
        assert np.ptp(load) <= ZIPF.max() and load.max() <= max(1.01 * load.mean(), ZIPF.max())
        assert all(len(set(row)) == k for row in table.tolist())

    def test_it_is_more_even_than_a_random_one(self):
        random = experts_of(Hash(), np.arange(VOCAB)[None])[0, :, 0]
        violation = np.bincount(random, ZIPF, EXPERTS).max() / (ZIPF.sum() / EXPERTS)
        assert violation > 1.2

    def test_ids_that_never_occur_are_spread(self):
        table = balanced_table(np.zeros(VOCAB), EXPERTS, 1)
        assert np.ptp(np.bincount(table[:, 0], minlength=EXPERTS)) <= 1


class TestClustered:
    CENTRES = 20 * np.eye(EXPERTS)
    OWN = RNG.integers(0, EXPERTS, VOCAB)
    VECTORS = CENTRES[OWN] + RNG.normal(size=(VOCAB, EXPERTS))

    def test_ids_near_each_other_share_an_expert(self):
        table = clustered_table(self.VECTORS, EXPERTS, 1, seed=0)[:, 0]
        of_cluster = [set(table[c == self.OWN].tolist()) for c in range(EXPERTS)]
        assert all(len(experts) == 1 for experts in of_cluster) and len(set.union(*of_cluster)) == EXPERTS

    def test_the_nearest_centres_in_their_order(self):
        """A fixed point of k-means: centres are the means of the ids whose first expert they are."""
        vectors = RNG.normal(size=(VOCAB, 3))
        table = clustered_table(vectors, EXPERTS, 4, seed=1, rounds=300)
        centres = np.stack([vectors[table[:, 0] == e].mean(0) for e in range(EXPERTS)])
        distance = ((vectors[:, None] - centres) ** 2).sum(-1)
        assert np.array_equal(table, np.argsort(distance, axis=1)[:, :4]) and table.dtype == np.int32

    def test_the_same_seed_gives_the_same_table_and_equal_vectors_do_no_harm(self):
        first, again = (clustered_table(self.VECTORS, EXPERTS, 2, seed) for seed in (3, 3))
        assert np.array_equal(first, again)
        flat = clustered_table(np.ones((20, 2)), EXPERTS, 3, seed=0)
        assert all(len(set(row)) == 3 for row in flat.tolist())


class TestBigram:
    def test_it_is_the_hash_of_both_ids(self):
        tokens, previous = np.array([[3, 3, 3, 5]]), np.array([[-1, 5, 3, 3]])
        found = experts_of(Hash(kind="bigram", k=2, seed=7), tokens, previous)[0].tolist()
        pairs = list(zip(tokens[0].tolist(), previous[0].tolist(), strict=True))
        assert found == [slow.bigram_experts(t, p, EXPERTS, 2, 7) for t, p in pairs]

    def test_one_id_goes_to_all_experts(self):
        previous = RNG.integers(0, 10_000, (1, 4000))
        experts = experts_of(Hash(kind="bigram"), np.full((1, 4000), 9), previous)
        share = np.bincount(experts.ravel(), minlength=EXPERTS) / 4000
        assert np.abs(share - 1 / EXPERTS).max() < 5 * (1 / EXPERTS / 4000) ** 0.5

    def test_a_document_begins_with_nothing_before_it(self):
        arrays = host_batch(4, 6)
        with on_mesh(ONE_DEVICE) as mesh:
            preceding = np.asarray(put_batch(arrays, mesh).preceding())
        for b in range(4):
            for t in range(6):
                inside = t > 0 and arrays["segments"][b, t] and arrays["segments"][b, t] == arrays["segments"][b, t - 1]
                assert preceding[b, t] == (arrays["tokens"][b, t - 1] if inside else -1)


class TestDistilled:
    """A table that is what a router did, id by id."""

    TOKENS = np.where(RNG.random((40, 50)) < 0.1, -1, RNG.integers(0, 60, (40, 50)))
    DECISIONS = np.argsort(RNG.random((40, 50, EXPERTS)) + 2 * RNG.random((60, EXPERTS))[TOKENS], axis=-1)[..., :2]
    DECISIONS[RNG.random(DECISIONS.shape) < 0.1] = -1

    def selector(self, tmp_path, k=1, counts=None):
        given = counts_by_expert(self.TOKENS, self.DECISIONS, 70, EXPERTS) if counts is None else counts
        np.save(tmp_path / "counts.npy", given)
        return Hash(kind="distilled", path=str(tmp_path / "counts.npy"), k=k)

    def test_counts_against_a_loop(self):
        counts = counts_by_expert(self.TOKENS, self.DECISIONS, 70, EXPERTS)
        assert counts.tolist() == slow.counts_by_expert(self.TOKENS.ravel(), self.DECISIONS.reshape(-1, 2), 70, EXPERTS)

    @pytest.mark.parametrize("k", [1, 3])
    def test_an_id_goes_where_it_most_often_went_and_an_unseen_one_is_hashed(self, tmp_path, k):
        counts = slow.counts_by_expert(self.TOKENS.ravel(), self.DECISIONS.reshape(-1, 2), 70, EXPERTS)
        ids = np.arange(80)[None]  # 60 to 69 never occurred, 70 and on are not in the table
        found = experts_of(self.selector(tmp_path, k), ids)[0]
        expected = [sorted(range(EXPERTS), key=lambda e: (-row[e], e))[:k] for row in counts[:60]]
        assert found[:60].tolist() == expected
        assert np.array_equal(found[60:], experts_of(Hash(k=k), ids)[0, 60:])

    def test_no_other_table_agrees_more_with_the_decisions(self, tmp_path):
        first, real = self.DECISIONS[..., 0], (self.TOKENS >= 0) & (self.DECISIONS[..., 0] >= 0)
        counts = counts_by_expert(self.TOKENS, self.DECISIONS[..., :1], 60, EXPERTS)
        table = experts_of(self.selector(tmp_path, counts=counts), np.arange(60)[None])[0, :, 0]
        agreement = lambda table: (table[self.TOKENS] == first)[real].sum()  # noqa: E731
        for token in range(60):
            others = [np.where(np.arange(60) == token, e, table) for e in range(EXPERTS)]
            assert max(map(agreement, others)) <= agreement(table)

    def test_a_router_that_looks_at_the_id_alone_is_taken_over_whole(self, tmp_path):
        ids = RNG.integers(0, 70, (8, 100))
        decided = experts_of(Hash(k=2, seed=5), ids)
        selector = self.selector(tmp_path, k=2, counts=counts_by_expert(ids, decided, 70, EXPERTS))
        assert np.array_equal(np.sort(experts_of(selector, ids)), np.sort(decided))

    def test_scores_make_the_weights_and_never_the_choice(self, tmp_path):
        selector, tokens = self.selector(tmp_path), jnp.asarray(RNG.integers(0, 60, (1, 30)), jnp.int32)
        scores = RNG.random((2, 1, 30, EXPERTS)).astype(np.float32)
        first, second = (selector(candidates(each, tokens=tokens)) for each in scores)
        assert np.array_equal(first.expert, second.expert)
        for pairs, each in ((first, scores[0]), (second, scores[1])):
            assert np.array_equal(pairs.weight[0], each[0, pairs.token[0], pairs.expert[0]])

    def test_another_number_of_experts_is_refused(self, tmp_path):
        router = RouterConfig(selection=self.selector(tmp_path), weight=Raw())
        MoESpec(num_experts=EXPERTS, router=router)
        with pytest.raises(ConfigError, match="counts 8 experts; the router has 9") as error:
            MoESpec(num_experts=9, router=router)
        assert error.value.key == "router.selection.path"


class TestFiles:
    """Tables that are made from what lies in a file."""

    @pytest.mark.parametrize("kind, values", [("balanced", ZIPF), ("clustered", TestClustered.VECTORS)])
    def test_ids_are_looked_up_and_those_beyond_the_table_are_hashed(self, tmp_path, kind, values):
        np.save(tmp_path / "values.npy", values)
        selector = Hash(kind=kind, path=str(tmp_path / "values.npy"), k=2)
        table = balanced_table(values, EXPERTS, 2) if kind == "balanced" else clustered_table(values, EXPERTS, 2, 42)
        ids = np.arange(VOCAB + 20)[None]
        found = experts_of(selector, ids)[0]
        assert np.array_equal(found[:VOCAB], table)
        assert np.array_equal(found[VOCAB:], experts_of(Hash(k=2), ids)[0, VOCAB:])

    @pytest.mark.parametrize(
        "kind, content, reason",
        [
            ("balanced", None, "could not be read"),
            ("balanced", b"not an array", "is no array"),
            ("balanced", np.ones((4, 4)), r"shape \(4, 4\)"),
            ("clustered", np.ones(4), r"shape \(4,\)"),
            ("balanced", np.array([1, -1]), "negative"),
            ("distilled", np.array([[1, -1]]), "negative"),
            ("balanced", np.array([1, np.nan]), "no finite number"),
            ("clustered", np.array([["a"]]), "no finite number"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_refused_by_name(self, tmp_path, kind, content, reason):
        path = tmp_path / "values.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(ConfigError, match=rf"values\.npy.*{reason}.*\.npy file of \[V") as error:
            Hash(kind=kind, path=str(path))
        assert error.value.key == "path"

    def test_the_command_line_says_it_in_one_line(self, tmp_path):
        router = "model__blocks__moe__router__"
        hashed = {router + "selection": "hash", router + "weight": "raw"}
        kind, path = router + "selection.kind", router + "selection.path"
        key = "config.model.blocks.moe.router.selection.path"
        for given, reason in (
            ({kind: "balanced"}, "none is given, but kind=balanced is made from a .npy file"),
            ({kind: "balanced", path: "missing.npy"}, "'missing.npy' could not be read"),
            ({path: "counts.npy"}, "kind=random is made from no file"),
        ):
            error = here(*arguments("train", f"--workdir={tmp_path / 'run'}", **hashed, **given)).error
            assert f"{key}: " in error and reason in error and not (tmp_path / "run").exists()

    def test_counts_of_a_corpus_make_a_table(self, tmp_path):
        config = DataConfig(name="synthetic")
        counts = token_counts(config)
        np.save(tmp_path / "counts.npy", counts)
        tokens = open_corpus(config).train.tokens
        assert np.array_equal(counts, np.bincount(tokens, minlength=256)) and len(counts) == 256
        selector = Hash(kind="balanced", path=str(tmp_path / "counts.npy"))
        load = np.bincount(experts_of(selector, np.arange(256)[None])[0, :, 0], counts, EXPERTS)
        assert load.max() - load.min() <= counts.max()
