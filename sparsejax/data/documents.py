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

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """SHA-256, hexadecimal."""
        ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def python(self) -> Optional[str]:
        """The Python version whose library the text is, or None when the text does not depend on it."""
        ...

    def documents(self, split: Split) -> Iterator[Document]: ...
