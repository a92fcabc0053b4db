"""What to train on: the corpus, its tokens, and the shape of a batch."""

import dataclasses
from typing import Optional

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.data.tasks import TASKS, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`name` is `stdlib` (the source of the Python standard library), `synthetic` (tiny, made up, no disk), `text` (the
    files at `path`) or a TFDS dataset, `name[/config][:version]`, prepared as array_record in TFDS's data folder."""

    name: str = "stdlib"
    path: Optional[str] = None  # a .txt (one document) or .jsonl file (one document a line), or a glob of them
    text_feature: str = "text"  # the feature (TFDS) or key (.jsonl) that holds a document's text
    validation_fraction: float = 0.05  # the tail of each file at `path` is kept for validation
    task: Task = choice(TASKS, "next_token")  # what is predicted
    tokenizer: Optional[str] = None  # a tokenizer.json or a SentencePiece .model; None: the bytes of UTF-8
    sequence_length: int = 128  # tokens per row
    batch_size: int = 32  # rows per step, over all hosts
    cache: Optional[str] = None  # folder for tokenised corpora; None: $SPARSEJAX_CACHE, or ~/.cache/sparsejax
    prefetch: int = 4  # batches kept ready ahead of the step; 0: read when asked
    workers: int = 1  # threads that fill them

    def __post_init__(self):
        for key in ("sequence_length", "batch_size", "workers"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"must be at least 1, not {getattr(self, key)}")
        if self.prefetch < 0:
            raise ConfigError("prefetch", f"must not be negative, is {self.prefetch}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError("validation_fraction", f"must be in [0, 1), not {self.validation_fraction}")
        if not self.name:
            raise ConfigError("name", "must not be empty; known: stdlib, synthetic, text, or a TFDS dataset")
        if self.name == "text" and not self.path:
            raise ConfigError("path", "name = 'text' reads local files: give a .txt or .jsonl file, or a glob")

    def unused(self) -> dict[str, str]:
        """Field -> why it has no effect at present."""
        reasons = {}
        if self.name != "text":
            reasons["path"] = reasons["validation_fraction"] = f"only name = 'text' reads it, not {self.name!r}"
        if self.name in ("stdlib", "synthetic"):
            reasons["text_feature"] = f"{self.name!r} has one text"
        if self.name == "text" and self.path and self.path.endswith(".txt"):
            reasons["text_feature"] = "a .txt file is one document"
        if self.name == "synthetic":
            reasons["cache"] = "'synthetic' never touches the disk"
        if self.prefetch == 0:
            reasons["workers"] = "prefetch = 0 reads in the training loop"
        return reasons
