"""A tokenised corpus: flat arrays, mapped from a cache folder that is built once, whole or not at all.

A folder holds, for each split, `SPLIT.tokens.bin`, `SPLIT.offsets.bin` and `SPLIT.domains.bin`, and `info.json` with
their types, lengths and checksums. It is written beside its place under a lock and then renamed: readers need no lock.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np

from sparsejax.base.errors import ConfigError
from sparsejax.data.documents import SPLITS, Document, Source
from sparsejax.data.tokenizers import Tokenizer

FORMAT = 1
CHECKED_BYTES = 2**28  # a larger array is checked by its size alone: reading it would hold up the start for seconds
ARRAYS = ("tokens", "offsets", "domains")


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The documents of one split, end to end; none is empty."""

    tokens: np.ndarray  # [N] uint8, uint16 or uint32, by the size of the vocabulary
    offsets: np.ndarray  # [D + 1] int64: document d is tokens[offsets[d]:offsets[d + 1]]
    domains: np.ndarray  # [D] int32
    num_bytes: int  # of the text in UTF-8


class _Unusable(Exception):
    """The cache folder is missing, damaged, or of another format."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens, domain, bytes) of each document that has a token."""
    dtype = token_dtype(tokenizer.vocab_size)
    for document in documents:
        tokens = tokenizer.encode(document.text)
        if len(tokens):
            yield tokens.astype(dtype), document.domain, len(document.text.encode("utf-8", errors="replace"))


def store_in_memory(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    parts = list(encoded(documents, tokenizer))
    return TokenStore(
        tokens=np.concatenate([np.zeros(0, token_dtype(tokenizer.vocab_size)), *(tokens for tokens, _, _ in parts)]),
        offsets=np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)], dtype=np.int64),
        domains=np.array([domain for _, domain, _ in parts], np.int32),
        num_bytes=sum(size for _, _, size in parts),
    )


def cached_stores(source: Source, tokenizer: Tokenizer, folder: Path) -> dict[str, TokenStore]:
    """The splits of `source` as tokens, from the cache below `folder`; built if missing, rebuilt if damaged.

    Of several processes one builds and the others wait. Raises `ConfigError` when the folder cannot be written.
    """
    place = folder / "tokens" / f"{source.hash[:16]}-{tokenizer.fingerprint[:16]}"
    with contextlib.suppress(_Unusable):
        return _load(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            with contextlib.suppress(_Unusable):
                return _load(place)  # another process built it while this one waited
            _build(source, tokenizer, place)
    except OSError as error:
        raise ConfigError("data.cache", f"cannot write {str(place)!r}: {error.strerror or error}") from error
    return _load(place)


def _build(source: Source, tokenizer: Tokenizer, place: Path) -> None:
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        info = {split: _write_split(partial, split, encoded(source.documents(split), tokenizer)) for split in SPLITS}
        (partial / "info.json").write_text(json.dumps({"format": FORMAT, "splits": info}, indent=1))
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _ArrayFile:
    """Appends to a raw array on disk; keeps its type, length and checksum."""

    def __init__(self, file: BinaryIO):
        self.file, self.dtype, self.length, self.crc = file, "uint8", 0, 0

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if len(values) else b""
        self.file.write(data)
        self.dtype, self.length, self.crc = values.dtype.str, self.length + len(values), zlib.crc32(data, self.crc)

    def info(self) -> dict[str, str | int]:
        return {"dtype": self.dtype, "length": self.length, "crc32": self.crc}


def _write_split(folder: Path, split: str, parts: Iterable[tuple[np.ndarray, int, int]]) -> dict[str, object]:
    """Writes one document at a time, so that a corpus larger than memory can be built."""
    num_bytes = 0
    with contextlib.ExitStack() as stack:
        files = {name: _ArrayFile(stack.enter_context(open(folder / f"{split}.{name}.bin", "wb"))) for name in ARRAYS}
        files["offsets"].append(np.zeros(1, np.int64))
        for tokens, domain, size in parts:
            files["tokens"].append(tokens)
            files["offsets"].append(np.array([files["tokens"].length], np.int64))
            files["domains"].append(np.array([domain], np.int32))
            num_bytes += size
    return {"bytes": num_bytes, **{name: file.info() for name, file in files.items()}}


def _load(place: Path) -> dict[str, TokenStore]:
    try:
        info = json.loads((place / "info.json").read_text())
        if info["format"] != FORMAT:
            raise _Unusable(f"format {info['format']}")
        return {split: _load_split(place, split, info["splits"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Unusable(str(error)) from error


def _load_split(place: Path, split: str, info: dict) -> TokenStore:
    arrays = {name: _map(place / f"{split}.{name}.bin", **info[name]) for name in ARRAYS}
    return TokenStore(**arrays, num_bytes=info["bytes"])


def _map(path: Path, dtype: str, length: int, crc32: int) -> np.ndarray:
    size = length * np.dtype(dtype).itemsize
    if os.path.getsize(path) != size:
        raise _Unusable(f"{path} has {os.path.getsize(path)} bytes, not {size}")
    array = np.memmap(path, np.dtype(dtype), mode="r", shape=(length,)) if length else np.zeros(0, dtype)
    if size <= CHECKED_BYTES and zlib.crc32(array.data.cast("B") if length else b"") != crc32:
        raise _Unusable(f"{path} does not have its checksum")
    return array
