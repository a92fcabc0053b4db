"""What is predicted: hidden tokens, and the classes of snippets."""

import dataclasses

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.structs import LOADED
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches, num_eval_batches, train_rows
from sparsejax.data.snippets import classes_of, split_documents
from sparsejax.data.tasks import TASKS, Classify, Masked

PLAIN = DataConfig(name="synthetic", sequence_length=64, batch_size=6)
MASK, FIRST = 256, 257


def data(task):
    return dataclasses.replace(PLAIN, task=task)


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(PLAIN)


@pytest.fixture(params=TASKS, scope="module")
def config(request):
    return data(Classify(classes=3) if request.param == "classify" else TASKS[request.param]())


class TestEveryTask:
    def test_rows_are_a_function_of_seed_and_number(self, corpus, config):
        numbers = np.array([40, 3, 17])
        first, again, other = (train_rows(corpus, config, seed).rows(numbers) for seed in (1, 1, 2))
        alone = train_rows(corpus, config, 1).rows(numbers[1:2])
        assert {*first, "rows"} == set(LOADED)
        for name, array in first.items():
            assert array.shape == (3, 64) and array.dtype == (bool if name == "loss_mask" else np.int32)
            assert np.array_equal(array, again[name]) and np.array_equal(array[1:2], alone[name])
        assert not np.array_equal(first["tokens"], other["tokens"])

    def test_evaluation_is_the_same_every_time_and_ends_in_empty_rows(self, corpus, config):
        passes = [list(eval_batches(corpus, config, 7)) for _ in range(2)]
        assert len(passes[0]) == num_eval_batches(corpus, config, 7)
        for left, right in zip(*passes, strict=True):
            assert all(np.array_equal(left[name], right[name]) for name in left)
        last = config.task.evaluation(corpus, 64).rows(np.array([10**6]))
        assert not any(array.any() for array in last.values())

    def test_padding_has_no_target(self, corpus, config):
        for batch in eval_batches(corpus, config, 7):
            assert not batch["loss_mask"][batch["segments"] == 0].any()
            assert not batch["targets"][~batch["loss_mask"]].any()


class TestMasked:
    ROWS = np.arange(200)

    def test_the_original_tokens_are_the_targets_and_nothing_else_changes(self, corpus):
        plain = train_rows(corpus, PLAIN, 5).rows(self.ROWS)
        masked = train_rows(corpus, data(Masked()), 5).rows(self.ROWS)
        chosen = masked["loss_mask"]
        assert np.array_equal(masked["targets"][chosen], plain["tokens"][chosen])
        assert np.array_equal(masked["tokens"][~chosen], plain["tokens"][~chosen])
        for name in ("segments", "positions", "domains"):
            assert np.array_equal(masked[name], plain[name])

    @pytest.mark.parametrize("rate", [0.15, 0.5])
    def test_shares(self, corpus, rate):
        rows = train_rows(corpus, data(Masked(rate=rate)), 0).rows(np.arange(400))
        chosen, real = rows["loss_mask"], (rows["segments"] > 0).sum()
        hidden, given = rows["tokens"][chosen], rows["targets"][chosen]
        near = lambda share, expected, of: abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / of)  # noqa: E731
        assert near(chosen.sum() / real, rate, real)
        assert near((hidden == MASK).mean(), 0.8, len(hidden))
        assert near((hidden == given).mean(), 0.1 + 0.1 / 256, len(hidden))
        other = hidden[(hidden != MASK) & (hidden != given)]
        assert len(np.unique(other)) > 100 and other.max() < MASK, "any other token"

    def test_an_epoch_hides_others_than_the_one_before(self, corpus):
        rows = train_rows(corpus, data(Masked()), 0)
        first, second = (rows.rows(np.arange(len(rows)) + len(rows) * epoch)["loss_mask"] for epoch in (0, 1))
        assert 0.01 < (first & second).mean() / first.mean() < 0.3

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
    def test_a_rate_that_is_none(self, rate):
        with pytest.raises(ConfigError, match="rate"):
            Masked(rate=rate)


class TestClassify:
    CONFIG = data(Classify(classes=3, validation_fraction=0.2, validation_rows=5))

    def test_a_row_is_a_class_token_and_a_snippet_of_a_document_of_its_class(self, corpus):
        rows = train_rows(corpus, self.CONFIG, 0).rows(np.arange(60))
        classes = classes_of((corpus.train, corpus.validation), 3)
        for row in range(60):
            label, size = rows["targets"][row, 0], rows["segments"][row].sum()
            assert label == row % 3 and rows["loss_mask"][row].nonzero()[0].tolist() == [0]
            assert rows["tokens"][row, 0] == FIRST and np.array_equal(rows["positions"][row, :size], np.arange(size))
            snippet = rows["tokens"][row, 1:size].astype(np.uint8).tobytes()
            texts = [d.store.tokens[d.start : d.stop].tobytes() for d in classes[label]]
            assert any(snippet in text for text in texts)
            assert size == 64 or any(snippet == text for text in texts), "shorter than a row, and whole"
            assert set(rows["domains"][row, :size]) == {classes[label][0].domain}
            assert not rows["tokens"][row, size:].any()

    def test_no_document_is_in_both_splits(self, corpus):
        for documents in classes_of((corpus.train, corpus.validation), 3):
            train, validation = split_documents(documents, 0.2)
            assert len(train) + len(validation) == len(documents) and len(validation) == round(0.2 * len(documents))
            assert not set(map(id, train)) & set(map(id, validation))
            assert split_documents(documents, 0.001)[1] and split_documents(documents, 0.999)[0]

    def test_every_class_is_evaluated_as_often(self, corpus):
        batches = list(eval_batches(corpus, self.CONFIG, 4))
        labels = np.concatenate([batch["targets"][batch["loss_mask"]] for batch in batches])
        assert np.bincount(labels).tolist() == [5, 5, 5]

    def test_text_is_read_from_everywhere(self, corpus):
        rows = train_rows(corpus, self.CONFIG, 0)
        first = {tuple(row[1:9]) for row in rows.rows(np.arange(300))["tokens"]}
        assert len(first) > 150

    def test_more_classes_than_the_corpus_has(self, corpus):
        with pytest.raises(ConfigError, match="5 classes, but 4 domains of the corpus have 4 documents") as error:
            train_rows(corpus, data(Classify(classes=5)), 0)
        assert error.value.key == "data.task.classes"

    @pytest.mark.parametrize("settings", [{"classes": 1}, {"validation_fraction": 1.0}, {"validation_rows": 0}])
    def test_settings_that_make_no_sense(self, settings):
        with pytest.raises(ConfigError) as error:
            Classify(**settings)
        assert error.value.key == next(iter(settings))


def test_the_largest_domains_are_the_classes():
    corpus = open_corpus(PLAIN)
    half = dataclasses.replace(corpus.train, domains=np.where(np.arange(240) % 4 == 1, 3, corpus.train.domains))
    kept = classes_of((half,), 2)
    tokens = {domain: np.diff(half.offsets)[half.domains == domain].sum() for domain in (0, 2)}
    larger = max(tokens, key=lambda domain: tokens[domain])
    assert [documents[0].domain for documents in kept] == [larger, 3], "in the order of their ids; 3 took those of 1"
    assert [len(documents) for documents in kept] == [60, 120]
