"""Text <-> token ids: the bytes of UTF-8, a Hugging Face `tokenizer.json`, or a SentencePiece `.model`."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np

from sparsejax.base.errors import ConfigError


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size). No tokens are added at a document's ends."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_bytes(self) -> bool:
        """Whether a token is a byte, so that nats per token / ln 2 are bits per byte."""
        ...

    @property
    def fingerprint(self) -> str:
        """'bytes', or the SHA-256 of the tokenizer's file."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """[n], uint8 for bytes, int32 otherwise."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    vocab_size = 256
    is_bytes = True
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, without the special tokens, truncation and padding it may ask for."""

    is_bytes = False

    def __init__(self, path: Path):
        import tokenizers

        self._model, self.fingerprint = _open(path, "Hugging Face tokenizer.json", tokenizers.Tokenizer.from_file)
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = (
            max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )  # ids may have holes

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece model, without the marks of begin and end."""

    is_bytes = False

    def __init__(self, path: Path):
        import sentencepiece

        def load(name: str) -> Any:
            return sentencepiece.SentencePieceProcessor(model_file=name)

        self._model, self.fingerprint = _open(path, "SentencePiece model", load)
        self.vocab_size: int = self._model.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_bos=False, add_eos=False), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(np.asarray(ids).tolist())


def _open(path: Path, kind: str, load: Callable[[str], Any]) -> tuple[Any, str]:
    """(model, SHA-256 of its file)."""
    try:
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        return load(str(path)), fingerprint
    except OSError as error:
        raise ConfigError("data.tokenizer", f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # both libraries raise exceptions of their own for a file they cannot parse
        raise ConfigError("data.tokenizer", f"{str(path)!r} is no {kind}: {' '.join(str(error).split())}") from error


def load_tokenizer(path: Optional[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. Raises `ConfigError` when there is none in that file."""
    if path is None:
        return ByteTokenizer()
    for suffix, kind in ((".json", JsonTokenizer), (".model", SentencePieceTokenizer)):
        if path.endswith(suffix):
            return kind(Path(path).expanduser())
    raise ConfigError("data.tokenizer", f"{path!r} is neither a tokenizer.json nor a SentencePiece .model")
