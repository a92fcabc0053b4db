"""Any TFDS dataset with a text feature, read from array_record files that were prepared before; never through TensorFlow."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Optional

from sparsejax.base.errors import ConfigError, did_you_mean
from sparsejax.data.documents import Document, Split

HELD_OUT = 5  # percent of the training split that serves for validation when a dataset has no split for it


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """`name` is TFDS's `name[/config][:version]`. The dataset is one domain."""

    name: str
    text_feature: str
    python: Optional[str] = None

    def __post_init__(self):
        features = self._builder.info.features
        import tensorflow_datasets as tfds

        texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
        if self.text_feature not in texts:
            known = f"its text features: {', '.join(texts) or 'none'}.{did_you_mean(self.text_feature, texts)}"
            raise ConfigError("data.text_feature", f"{self.name!r} has no text feature {self.text_feature!r}; {known}")
        if "train" not in self._builder.info.splits:
            raise ConfigError("data.name", f"{self.name!r} has no split 'train'; it has: {', '.join(self._builder.info.splits)}")

    @property
    def domains(self) -> tuple[str, ...]:
        return (self.name,)

    @functools.cached_property
    def _builder(self) -> Any:
        """Raises `ConfigError` for a name TFDS does not know, or data that is not there as array_record."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.name, try_gcs=False)
        except tfds.core.DatasetNotFoundError as error:
            known = ["stdlib", "synthetic", "text", *tfds.list_builders(with_community_datasets=False)]
            near = did_you_mean(self.name, known)
            raise ConfigError(
                "data.name", f"unknown dataset {self.name!r}; known: stdlib, synthetic, text, or a TFDS dataset.{near}"
            ) from error
        except Exception as error:  # a builder's own code runs here: missing config, version or optional package
            raise ConfigError("data.name", f"TFDS cannot open {self.name!r}: {_first_line(error)}") from error
        if not builder.info.splits or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise ConfigError(
                "data.name",
                f"{self.name!r} is not prepared as array_record in {builder.data_dir}; prepare it with "
                f"`python -c \"import tensorflow_datasets as t; t.builder('{self.name}', file_format='array_record')"
                '.download_and_prepare()"`',
            )
        return builder

    @functools.cached_property
    def hash(self) -> str:
        """Of the dataset's full name with its version, the sizes of its shards and the feature read."""
        info = self._builder.info
        shards = {name: [split.num_bytes, *split.shard_lengths] for name, split in sorted(info.splits.items())}
        return hashlib.sha256(json.dumps([info.full_name, shards, self.text_feature]).encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """In the order of the files. Without a split 'validation' or 'test', the end of 'train' is held out."""
        splits = self._builder.info.splits
        held_out = next((name for name in ("validation", "test") if name in splits), f"train[-{HELD_OUT}%:]")
        kept = f"train[:-{HELD_OUT}%]" if held_out.startswith("train") else "train"
        for example in self._builder.as_data_source(split=kept if split == "train" else held_out):
            yield Document(text=example[self.text_feature].decode("utf-8", errors="replace"), domain=0)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
