"""TFDS builder of the embedded corpus: one example per file, with its path and its domain."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from sparsejax.data.documents import SPLITS, Split
from sparsejax.data.stdlib import domain_of, read_source, split_of, stdlib_files


@dataclasses.dataclass
class FolderConfig(tfds.core.BuilderConfig):
    """`root` is the folder whose `*.py` become the examples."""

    root: str = ""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Features: `text` and `path` (relative to the root), UTF-8 bytes; `domain`, the index of the package's name."""

    VERSION = tfds.core.Version("1.0.0")

    @property
    def _root(self) -> Path:
        assert isinstance(self.builder_config, FolderConfig)  # without one there is no folder to read
        return Path(self.builder_config.root)

    def _info(self) -> tfds.core.DatasetInfo:
        domains = sorted({domain_of(path) for path in stdlib_files(self._root)})
        return tfds.core.DatasetInfo(
            builder=self,
            description="The source of the Python standard library, one example per file, in the order of their paths.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "path": tfds.features.Text(),
                    "domain": tfds.features.ClassLabel(names=domains),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        present = {split_of(path) for path in stdlib_files(self._root)}
        return {split: self._generate_examples(split) for split in SPLITS if split in present}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        files = (path for path in stdlib_files(self._root) if split_of(path) == split)
        for number, path in enumerate(files):
            yield number, {"text": read_source(self._root / path), "path": path, "domain": domain_of(path)}
