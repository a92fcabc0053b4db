"""Batches: the global order does not depend on where one starts or on how many hosts read."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.structs import LOADED
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import batches, eval_batches, num_eval_batches, train_rows
from sparsejax.data.rows import RowSource

CONFIG = DataConfig(name="synthetic", sequence_length=32, batch_size=6)


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(CONFIG)


def take(iterator, count):
    out = list(itertools.islice(iterator, count))
    iterator.close()
    return out


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_batch_has_the_fields_of_batch_and_the_rows_of_its_step(corpus):
    source = train_rows(corpus, CONFIG, seed=0)
    batch = take(batches(source, batch_size=6, start_step=4), 1)[0]
    assert set(batch) == set(LOADED)
    assert batch["tokens"].shape == (6, 32) and batch["rows"].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(array.dtype == (bool if name == "loss_mask" else np.int32) for name, array in batch.items())
    for index in range(6):
        row = source[4 * 6 + index]
        for name in row:
            np.testing.assert_array_equal(row[name], batch[name][index])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_starting_at_a_step_continues_the_run_across_epochs(corpus, prefetch):
    steps = len(train_rows(corpus, CONFIG, 0)) // 6 + 3
    whole = take(batches(train_rows(corpus, CONFIG, 0), batch_size=6), steps + 3)
    resumed = take(
        batches(train_rows(corpus, CONFIG, 0), batch_size=6, start_step=steps - 5, prefetch=prefetch, workers=2), 8
    )
    for left, right in zip(whole[steps - 5 :], resumed, strict=True):
        assert_same(left, right)


def test_other_hosts_read_the_same_global_order_from_the_middle(corpus):
    boundary = len(train_rows(corpus, CONFIG, 3)) // 6 - 1  # the third batch read holds rows of two epochs
    one = take(batches(train_rows(corpus, CONFIG, 3), batch_size=6, start_step=boundary), 4)
    hosts = [[4, 5, 0], [2, 1, 3]]
    parts = [
        take(batches(train_rows(corpus, CONFIG, 3), batch_size=6, start_step=boundary, row_indices=rows), 4)
        for rows in hosts
    ]
    for step, batch in enumerate(one):
        for rows, part in zip(hosts, parts, strict=True):
            assert_same({name: array[rows] for name, array in batch.items()}, part[step])


def test_an_epoch_covers_the_corpus_and_the_next_has_another_order(corpus):
    source = train_rows(corpus, CONFIG, 0)
    epochs = [source.rows(np.arange(len(source)) + len(source) * epoch) for epoch in (0, 1)]
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"])
    for rows in epochs:
        assert (rows["segments"] > 0).sum() == corpus.info.train.tokens
        assert rows["loss_mask"].sum() == corpus.info.train.tokens - corpus.info.train.documents
    other = train_rows(corpus, CONFIG, 1).rows(np.arange(len(source)))
    assert not np.array_equal(epochs[0]["tokens"], other["tokens"])


def test_evaluation_counts_every_target_once_in_order(corpus):
    read = list(eval_batches(corpus, CONFIG, batch_size=7))
    assert len(read) == num_eval_batches(corpus, CONFIG, 7)
    whole = {name: np.concatenate([batch[name] for batch in read]) for name in read[0]}
    assert (whole["tokens"][whole["segments"] > 0] == corpus.validation.tokens).all()
    assert whole["loss_mask"].sum() == corpus.info.validation.tokens - corpus.info.validation.documents
    assert len(whole["rows"]) % 7 == 0 and (whole["segments"][-1] == 0).all()
    some = list(eval_batches(corpus, CONFIG, batch_size=7, batches=3, row_indices=[1, 3]))
    assert len(some) == 3 < len(read)
    for number, part in enumerate(some):  # spread over the split
        batch = read[number * len(read) // 3]
        assert_same({name: array[[1, 3]] for name, array in batch.items()}, part)


def test_evaluation_reads_the_same_rows_in_parts(corpus):
    for count in (None, 3):
        whole, parts = (list(eval_batches(corpus, CONFIG, 6, count, parts=n)) for n in (1, 3))
        for name in ("tokens", "targets", "loss_mask"):
            left, right = (np.concatenate([batch[name] for batch in read]) for read in (whole, parts))
            assert np.array_equal(left[: len(right)], right)
            assert not left[len(right) :].any(), "what parts leave out is empty"


def test_an_empty_validation_split_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words " * 50)
    config = DataConfig(name="text", path=str(path), validation_fraction=0.0, cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"data.validation_fraction: 0.0 of each file leaves nothing"):
        eval_batches(open_corpus(config), config, 4)


def test_rows_outside_the_batch_are_refused(corpus):
    with pytest.raises(ValueError, match="row_indices"):
        batches(train_rows(corpus, CONFIG, 0), batch_size=4, row_indices=[3, 4])


def test_one_long_document_shuffles_too():
    from sparsejax.data.store import TokenStore

    store = TokenStore(np.arange(1, 201, dtype=np.uint8), np.array([0, 200]), np.zeros(1, np.int32), 200)
    source = RowSource(store, 16, seed=0)
    rows = source.rows(np.arange(2 * len(source)))
    assert len({tuple(row) for row in rows["tokens"]}) == 2 * len(source)


def test_a_process_that_leaves_its_iterator_open_ends():
    code = (
        "from sparsejax.data.config import DataConfig as C; from sparsejax.data.corpus import open_corpus as o\n"
        "from sparsejax.data.loader import batches, train_rows; c = C(name='synthetic')\n"
        "i = batches(train_rows(o(c), c, 0), batch_size=8, workers=2); next(i); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr
