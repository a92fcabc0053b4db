"""Any TFDS dataset with a text feature, read without TensorFlow from array_record files that were prepared before."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Optional

from sparsejax.base.errors import ConfigError, did_you_mean
from sparsejax.data.documents import Document, Split

HELD_OUT = 5  # percent of the training split that serves for validation when a dataset has no split for it


class TfdsSource:
    """`name` is TFDS's `name[/config][:version]`. The dataset is one domain."""

    python: Optional[str] = None

    def __init__(self, name: str, text_feature: str):
        self.name, self.text_feature = name, text_feature
        self.domains = (name,)
        self._builder = _open_builder(name)
        info = self._builder.info
        _check(name, info, text_feature)
        shards = {split: [found.num_bytes, *found.shard_lengths] for split, found in sorted(info.splits.items())}
        identity = json.dumps([info.full_name, shards, text_feature])  # the full name holds the version
        self.hash = hashlib.sha256(identity.encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """In the order of the files. Without a split 'validation' or 'test', the end of 'train' is held out.

        Raises `ConfigError` when a file is missing or damaged.
        """
        splits = self._builder.info.splits
        held_out = next((name for name in ("validation", "test") if name in splits), f"train[-{HELD_OUT}%:]")
        kept = f"train[:-{HELD_OUT}%]" if held_out.startswith("train") else "train"
        try:
            for example in self._builder.as_data_source(split=kept if split == "train" else held_out):
                yield Document(text=example[self.text_feature].decode("utf-8", errors="replace"), domain=0)
        except Exception as error:  # the readers below TFDS have no common class of error
            where = f"the files of {self.name!r} in {self._builder.data_dir} cannot be read"
            raise ConfigError("data.name", f"{where}: {_first_line(error)}") from error


def _open_builder(name: str) -> Any:
    """Raises `ConfigError` for a name TFDS does not know, or data that is not there as array_record."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        near = did_you_mean(name, ["stdlib", "synthetic", "text", *tfds.list_builders(with_community_datasets=False)])
        known = f"known: stdlib, synthetic, text, or a TFDS dataset.{near}"
        raise ConfigError("data.name", f"unknown dataset {name!r}; {known}") from error
    except Exception as error:  # a builder's own code runs here: missing config, version or optional package
        raise ConfigError("data.name", f"TFDS cannot open {name!r}: {_first_line(error)}") from error
    if not builder.info.splits or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        code = (
            f"import tensorflow_datasets as t; t.builder('{name}', file_format='array_record').download_and_prepare()"
        )
        raise ConfigError(
            "data.name",
            f'{name!r} is not prepared as array_record in {builder.data_dir}; prepare it with `python -c "{code}"`',
        )
    return builder


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _check(name: str, info: Any, text_feature: str) -> None:
    import tensorflow_datasets as tfds

    texts = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
    if text_feature not in texts:
        known = f"its text features: {', '.join(texts) or 'none'}.{did_you_mean(text_feature, texts)}"
        raise ConfigError("data.text_feature", f"{name!r} has no text feature {text_feature!r}; {known}")
    if "train" not in info.splits:
        raise ConfigError("data.name", f"{name!r} has no split 'train'; it has: {', '.join(info.splits)}")
