"""What a model is to predict of a corpus: a registry of tasks, each of which turns stored text into rows."""

import abc
from dataclasses import dataclass
from typing import Protocol

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.data.masking import MaskedRows
from sparsejax.data.rows import Rows, RowSource
from sparsejax.data.snippets import SnippetRows, classes_of, split_documents
from sparsejax.data.store import TokenStore
from sparsejax.data.tokenizers import Tokenizer


class Splits(Protocol):
    """Of a corpus, what a task reads."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def train(self) -> TokenStore: ...
    @property
    def validation(self) -> TokenStore: ...


class Task(abc.ABC):
    """A config's description of what is predicted: the base of the frozen dataclasses in `TASKS`."""

    own_ids = 0
    """Ids after those of the tokenizer that its rows hold."""

    every_token = False
    """Whether a loss in nats per target is one of all the text."""

    sees_targets = False
    """Whether a token's input tells the target of the one before it, so that only a causal model has to predict it."""

    whole_rows = False
    """Whether a row is one document with one target, at its first position."""

    @abc.abstractmethod
    def train(self, corpus: Splits, length: int, seed: int) -> Rows: ...

    @abc.abstractmethod
    def evaluation(self, corpus: Splits, length: int) -> Rows: ...


@dataclass(frozen=True, kw_only=True)
class NextToken(Task):
    """Every token of a document from those before it."""

    every_token = True
    sees_targets = True

    def train(self, corpus: Splits, length: int, seed: int) -> Rows:
        return RowSource(corpus.train, length, seed)

    def evaluation(self, corpus: Splits, length: int) -> Rows:
        return RowSource(corpus.validation, length)


@dataclass(frozen=True, kw_only=True)
class Masked(Task):
    """Tokens that are hidden, from all others of their document (BERT, arXiv:1810.04805). The mask is the first id
    after those of the tokenizer. Evaluation hides the same tokens every time."""

    rate: float = 0.15  # of tokens that are to be predicted: 80 % of them are masked, 10 % random, 10 % as they were

    own_ids = 1

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ConfigError("rate", f"{self.rate} is outside (0, 1]")

    def train(self, corpus: Splits, length: int, seed: int) -> Rows:
        rows = RowSource(corpus.train, length, seed)
        return MaskedRows(rows, self.rate, corpus.tokenizer.vocab_size, seed)

    def evaluation(self, corpus: Splits, length: int) -> Rows:
        return MaskedRows(RowSource(corpus.validation, length), self.rate, corpus.tokenizer.vocab_size)


@dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """Which domain a snippet comes from: of `stdlib`, which package. A row is a class token, the second id after those
    of the tokenizer, and a snippet. All classes are as frequent."""

    classes: int = 12  # the domains with most documents
    validation_fraction: float = 0.25  # of the documents of each class, at least one
    validation_rows: int = 64  # snippets of each class

    own_ids = 2  # that of `Masked` stays free, so that one vocabulary serves both
    whole_rows = True

    def __post_init__(self):
        if self.classes < 2:
            raise ConfigError("classes", f"{self.classes} is less than 2")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError("validation_fraction", f"{self.validation_fraction} is outside (0, 1)")
        if self.validation_rows < 1:
            raise ConfigError("validation_rows", f"{self.validation_rows} is less than 1")

    def _rows(self, corpus: Splits, length: int, split: int, count: int, seed: int | None) -> SnippetRows:
        documents = classes_of((corpus.train, corpus.validation), self.classes)
        chosen = [split_documents(of_class, self.validation_fraction)[split] for of_class in documents]
        return SnippetRows(chosen, length, corpus.tokenizer.vocab_size + 1, count, seed)

    def train(self, corpus: Splits, length: int, seed: int) -> Rows:
        tokens = len(corpus.train.tokens) + len(corpus.validation.tokens)
        return self._rows(corpus, length, 0, -(-tokens // length), seed)

    def evaluation(self, corpus: Splits, length: int) -> Rows:
        return self._rows(corpus, length, 1, self.classes * self.validation_rows, None)


TASKS = Registry("task", {"next_token": NextToken, "masked": Masked, "classify": Classify})
