"""From a config to a corpus: tokenizer, tokens of both splits, and what the run's record says about them."""

import dataclasses
from pathlib import Path
from typing import Optional

import numpy as np

from sparsejax.base.devices import cache_root
from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig
from sparsejax.data.documents import Source
from sparsejax.data.local_text import LocalSource
from sparsejax.data.stdlib import StdlibSource
from sparsejax.data.store import TokenStore, cached_stores, store_in_memory
from sparsejax.data.synthetic import SyntheticSource
from sparsejax.data.tfds_source import TfdsSource
from sparsejax.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Sizes of a split; `bytes` are the text's in UTF-8."""

    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """What identifies a corpus, for `config.json`; losses compare only where `hash` and `tokenizer` are equal."""

    name: str
    hash: str  # SHA-256 of the text and its names
    python: Optional[str]  # the Python version whose library it is
    tokenizer: str  # fingerprint
    vocab_size: int
    domains: tuple[str, ...]  # domain id -> name
    train: SplitInfo
    validation: SplitInfo


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An opened corpus."""

    info: CorpusInfo
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus, building its cache if need be.

    Raises `ConfigError` for what is missing, unreadable, or too small for one row.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    folder = cache_folder(config)
    source = _source(config, folder)
    if config.name == "synthetic":
        train, validation = (store_in_memory(source.documents(split), tokenizer) for split in ("train", "validation"))
    else:
        stores = cached_stores(source, tokenizer, folder)
        train, validation = stores["train"], stores["validation"]
    if len(train.tokens) <= config.sequence_length:
        key, text = ("data.path", config.path) if config.name == "text" else ("data.name", config.name)
        row = f"a row takes {config.sequence_length + 1} (data.sequence_length + 1)"
        raise ConfigError(key, f"{text!r} has {len(train.tokens)} training tokens; {row}")
    info = CorpusInfo(
        name=source.name,
        hash=source.hash,
        python=source.python,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        domains=source.domains,
        train=_split_info(train),
        validation=_split_info(validation),
    )
    return Corpus(info, tokenizer, train, validation)


def token_counts(config: DataConfig) -> np.ndarray:
    """How often each id occurs in the training split, int64 `[vocab_size]`. What a balanced hash table is made from:

    np.save("counts.npy", token_counts(DataConfig(name="stdlib")))
    """
    corpus = open_corpus(config)
    counts_V = np.zeros(corpus.info.vocab_size, np.int64)
    for first in range(0, len(corpus.train.tokens), 2**24):  # `bincount` widens what it is given
        counts_V += np.bincount(corpus.train.tokens[first : first + 2**24], minlength=len(counts_V))
    return counts_V


def cache_folder(config: DataConfig) -> Path:
    """`data.cache`, else that of the machine."""
    return Path(config.cache).expanduser() if config.cache else cache_root()


def _source(config: DataConfig, folder: Path) -> Source:
    if config.name == "stdlib":
        return StdlibSource.installed(folder / "tfds")
    if config.name == "synthetic":
        return SyntheticSource()
    if config.name == "text":
        assert config.path is not None  # DataConfig sees to it
        return LocalSource(config.path, config.text_feature, config.validation_fraction)
    return TfdsSource(config.name, config.text_feature)


def _split_info(store: TokenStore) -> SplitInfo:
    return SplitInfo(documents=len(store.domains), tokens=len(store.tokens), bytes=store.num_bytes)
