"""TFDS datasets by name: read when they are prepared as array_record, refused in one line otherwise."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.tfds_source import TfdsSource


class GardenNotes(tfds.core.GeneratorBasedBuilder):
    """Forty notes with a text, a title and a number; no split but 'train'."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "note": tfds.features.Text(),
            "title": tfds.features.Text(),
            "stars": tfds.features.Scalar(dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((n, {"note": f"note {n:02} grün\n", "title": "a title", "stars": n}) for n in range(40))


class UnsownNotes(GardenNotes):
    """A dataset that TFDS knows and that nobody prepared."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    tfds.disable_progress_bar()
    GardenNotes(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return folder


def config(tmp_path, name, **settings):
    return DataConfig(name=name, cache=str(tmp_path), sequence_length=8, **settings)


@pytest.mark.parametrize("name", ["garden_notes", "garden_notes:1.2.0"])
def test_a_prepared_dataset_is_read(prepared, tmp_path, name):
    corpus = open_corpus(config(tmp_path, name, text_feature="note"))
    assert corpus.train.tokens.tobytes().decode() == "".join(f"note {n:02} grün\n" for n in range(38))
    assert corpus.info.validation.documents == 2 and corpus.info.domains == (name,)
    other = open_corpus(config(tmp_path, name, text_feature="title"))
    assert other.info.hash != corpus.info.hash and other.train.tokens.tobytes().startswith(b"a titlea title")


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damaged_files_are_named(prepared, tmp_path, damage):
    builder = GardenNotes(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    (shard,) = Path(builder.data_dir).glob("*array_record*")
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    source = TfdsSource("garden_notes", "note")
    source._builder = builder
    with pytest.raises(ConfigError, match=r"data\.name: the files of 'garden_notes' in .* cannot be read: ."):
        list(source.documents("train"))


@pytest.mark.parametrize(
    ("name", "feature", "key", "message"),
    [
        ("lm1bb", "text", "data.name", "unknown dataset 'lm1bb'; known: stdlib, .* Did you mean 'lm1b'"),
        ("stdlibb", "text", "data.name", "Did you mean 'stdlib'"),
        ("unsown_notes", "note", "data.name", "'unsown_notes' is not prepared as array_record in .*; prepare it with"),
        ("garden_notes:9.9.9", "note", "data.name", "'garden_notes:9.9.9'"),
        ("garden_notes/tall", "note", "data.name", "'garden_notes/tall'"),
        (
            "garden_notes",
            "titel",
            "data.text_feature",
            "no text feature 'titel'; .*: note, title. Did you mean 'title'",
        ),
        ("garden_notes", "stars", "data.text_feature", "no text feature 'stars'"),
        ("no such/name!", "text", "data.name", "'no such/name!'"),
    ],
)
def test_what_cannot_be_read_is_a_one_line_error(prepared, tmp_path, name, feature, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_corpus(config(tmp_path, name, text_feature=feature))
    assert error.value.key == key and "\n" not in str(error.value)
