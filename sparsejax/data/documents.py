"""A source of text: named, hashed, and read as two streams of documents."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Optional, Protocol

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and the index of its domain in the source's `domains`."""

    text: str
    domain: int


class Source(Protocol):
    """Where documents come from. Two sources with one `hash` give the same documents in the same order."""

    name: str
    hash: str  # SHA-256, hexadecimal
    domains: tuple[str, ...]  # domain id -> name
    python: Optional[str]  # the Python version whose library the text is; None: it does not depend on it

    def documents(self, split: Split) -> Iterator[Document]: ...
