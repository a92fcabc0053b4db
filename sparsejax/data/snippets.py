"""Sequence classification: which domain a snippet comes from, for the domains of a corpus with enough documents.

Documents, and so files, are split anew, for the corpus' own validation split leaves most domains without any: within
each class, a share of its documents is for validation, and the rest for training."""

import dataclasses
from typing import Optional

import numpy as np

from sparsejax.base.errors import ConfigError
from sparsejax.data.packing import draws, permutation
from sparsejax.data.rows import Arrays
from sparsejax.data.store import TokenStore

FEWEST = 4
"""Documents that a class needs."""


@dataclasses.dataclass(frozen=True)
class Document:
    """Where a document's tokens are."""

    store: TokenStore
    start: int
    stop: int
    domain: int

    def __len__(self) -> int:
        return self.stop - self.start


def classes_of(stores: tuple[TokenStore, ...], classes: int) -> list[list[Document]]:
    """The documents of the `classes` domains that have most, by class, in the order of the domains' ids; of domains
    with as many, those with more tokens.

    Raises `ConfigError` when the corpus has fewer such domains with at least `FEWEST` documents."""
    by_domain: dict[int, list[Document]] = {}
    for store in stores:
        for number, domain in enumerate(store.domains.tolist()):
            start, stop = store.offsets[number : number + 2].tolist()
            by_domain.setdefault(domain, []).append(Document(store, start, stop, domain))
    enough = {domain: found for domain, found in by_domain.items() if len(found) >= FEWEST}
    if len(enough) < classes:
        message = f"{classes} classes, but {len(enough)} domains of the corpus have {FEWEST} documents or more"
        raise ConfigError("data.task.classes", message)
    size = lambda domain: (-len(enough[domain]), -sum(map(len, enough[domain])), domain)  # noqa: E731
    return [enough[domain] for domain in sorted(sorted(enough, key=size)[:classes])]


def split_documents(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents of one class, at least one of each."""
    order = permutation(len(documents), documents[0].domain)
    held_out = min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    chosen = set(order[:held_out].tolist())
    train = [document for number, document in enumerate(documents) if number not in chosen]
    return train, [document for number, document in enumerate(documents) if number in chosen]


class SnippetRows:
    """Rows that begin with the id `first`, then hold consecutive tokens of one document, then padding. Position 0 alone
    has a target: the class.

    Row n is of class n modulo the number of classes, so that all are as frequent, and begins anywhere in that class'
    text with the same probability, by draws from (seed, n); without a seed, from n, and there are `count` rows."""

    def __init__(
        self, documents: list[list[Document]], length: int, first: int, count: int, seed: Optional[int] = None
    ):
        self.documents, self.length, self.first, self.count, self.seed = documents, length, first, count, seed
        self.key = (2, 0) if seed is None else (3, seed)
        self.ends = [np.cumsum([len(document) for document in of_class]) for of_class in documents]

    def __len__(self) -> int:
        return self.count

    def rows(self, numbers: np.ndarray) -> Arrays:
        shape = (len(numbers), self.length)
        arrays: Arrays = dict.fromkeys(("tokens", "targets", "segments", "positions", "domains"))  # type: ignore[assignment]
        arrays = {name: np.zeros(shape, np.int32) for name in arrays} | {"loss_mask": np.zeros(shape, bool)}
        for row, number in enumerate(numbers.tolist()):
            if self.seed is None and number >= self.count:
                continue
            label = number % len(self.documents)
            document, tokens = self._snippet(label, number)
            size = 1 + len(tokens)
            arrays["tokens"][row, :size] = [self.first, *tokens]
            arrays["segments"][row, :size] = 1
            arrays["positions"][row, :size] = np.arange(size)
            arrays["domains"][row, :size] = document.domain
            arrays["targets"][row, 0], arrays["loss_mask"][row, 0] = label, True
        return arrays

    def _snippet(self, label: int, number: int) -> tuple[Document, np.ndarray]:
        ends = self.ends[label]
        place = int(draws(1, *self.key, number)[0]) % int(ends[-1])
        which = int(np.searchsorted(ends, place, side="right"))
        document = self.documents[label][which]
        within = place - (int(ends[which]) - len(document))
        begin = document.start + max(0, min(within, len(document) - (self.length - 1)))
        return document, document.store.tokens[begin : min(begin + self.length - 1, document.stop)]
