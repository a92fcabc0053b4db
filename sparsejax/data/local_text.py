"""Local files: a `.txt` is one document, a `.jsonl` holds one a line. The tail of each file is for validation."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from sparsejax.base.errors import ConfigError
from sparsejax.data.documents import Document, Split

SUFFIXES = (".txt", ".jsonl")


def _error(message: str) -> ConfigError:
    return ConfigError("data.path", message)


def find_files(path: str) -> list[Path]:
    """The files that `path`, a file or a glob, names, sorted. Raises `ConfigError` unless all are .txt or .jsonl."""
    path = os.path.expanduser(path)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise _error(f"{path!r} is no file and matches none (relative to {os.getcwd()})")
    for name in found:
        if os.path.isdir(name):
            raise _error(f"{name!r} is a folder; give a file, or a glob such as '{name.rstrip('/')}/*.txt'")
        if not name.endswith(SUFFIXES):
            raise _error(f"{name!r} is neither .txt (one document) nor .jsonl (one document a line)")
    return [Path(name) for name in found]


def split_bytes(content: bytes, fraction: float) -> tuple[bytes, bytes]:
    """`content` cut in two after `int(size * (1 - fraction))` bytes, or a few less to keep a character whole."""
    cut = int(len(content) * (1 - fraction))
    while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return content[:cut], content[cut:]


class LocalSource:
    """The files that match `path`; each is a domain, called by its path below their common folder."""

    name: str = "text"
    python: Optional[str] = None

    def __init__(self, path: str, text_feature: str, validation_fraction: float):
        self.text_feature, self.validation_fraction = text_feature, validation_fraction
        self._files = find_files(path)
        common = os.path.commonpath([file.absolute().parent for file in self._files])
        self.domains = tuple(file.absolute().relative_to(common).as_posix() for file in self._files)
        self.hash = self._digest()

    def _digest(self) -> str:
        """Of the names, the contents and the settings that make the documents; not of where the files lie."""
        digest = hashlib.sha256(f"{self.validation_fraction}\0{self.text_feature}\0".encode())
        for name, path in zip(self.domains, self._files, strict=True):
            try:
                with open(path, "rb") as file:
                    digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
            except OSError as error:
                raise _error(f"cannot read {str(path)!r}: {error.strerror}") from error
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """In the order of the files. Raises `ConfigError` at text that is not UTF-8 or a line that is no document."""
        for domain, path in enumerate(self._files):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _error(f"cannot read {str(path)!r}: {error.strerror}") from error
            texts = self._lines(content, split, path) if path.suffix == ".jsonl" else self._whole(content, split, path)
            for text in texts:
                yield Document(text, domain)

    def _whole(self, content: bytes, split: Split, path: Path) -> Iterator[str]:
        part = split_bytes(content, self.validation_fraction)[split == "validation"]
        try:
            yield part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _error(f"{str(path)!r} is not UTF-8 (byte {error.object[error.start]:#04x})") from error

    def _lines(self, content: bytes, split: Split, path: Path) -> Iterator[str]:
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        cut = int(len(lines) * (1 - self.validation_fraction))
        for number, line in lines[cut:] if split == "validation" else lines[:cut]:
            place = f"{str(path)!r} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _error(f"{place} is not JSON: {error}") from error
            if not isinstance(row, dict) or self.text_feature not in row:
                have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise _error(f"{place} has no key {self.text_feature!r} (data.text_feature); it has: {have}")
            if not isinstance(row[self.text_feature], str):
                raise _error(f"{place}: {self.text_feature!r} is not a string")
            yield row[self.text_feature]
