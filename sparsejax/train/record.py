"""`config.json`: what a run is, and whether a folder's run may go on under a config."""

import importlib.metadata
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from sparsejax.base.config import Loaded, diff, from_json, to_json
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.writers import write_atomically
from sparsejax.data.corpus import Corpus, CorpusInfo
from sparsejax.train.config import ExperimentConfig

FREE = ("mesh.", "eval.", "checkpoint.", "train.log_every", "train.profile", "train.tensorboard", "data.cache", "data.prefetch", "data.workers")
"""Settings that may differ when a run resumes: they change where and what is written, not what is learned."""


def environment(corpus: CorpusInfo) -> dict[str, Any]:
    """What a run depends on beside its config: corpus, versions, devices."""
    packages = ("sparsejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "corpus": asdict(corpus),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "platform": jax.default_backend(),
        "devices": [jax.device_count(), jax.devices()[0].device_kind],
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_corpus(config: ExperimentConfig, corpus: Corpus) -> None:
    """Raises `ConfigError` when the model has fewer embeddings than the tokenizer has tokens."""
    if config.model.vocab_size < corpus.tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            f"{config.model.vocab_size} is less than the tokenizer's {corpus.tokenizer.vocab_size} tokens (data.tokenizer)",
        )


def enter(workdir: Path, loaded: Loaded[ExperimentConfig], corpus: CorpusInfo, *, resuming: bool, allow_change: bool) -> list[str]:
    """Writes `config.json`, and returns lines that say what changed since the run began.

    Raises:
      RequestError: the folder holds a checkpoint of a run that learns something else, and `allow_change` is False. Nothing is
        written then.
    """
    path = workdir / "config.json"
    changes: list[str] = []
    if resuming and path.is_file():
        changes, binding = _changes(path, loaded, corpus)
        if binding and not allow_change:
            raise RequestError(
                f"{workdir} holds a run with another config: {'; '.join(binding)}. Use another --workdir, or --allow-config-change"
            )
    write_atomically(path, to_json(loaded.config, loaded.provenance, environment(corpus)).encode())
    return changes


def _changes(path: Path, loaded: Loaded[ExperimentConfig], corpus: CorpusInfo) -> tuple[list[str], list[str]]:
    """(all changes since `path` was written, those of them that change what is learned)."""
    before = from_json(ExperimentConfig, path.read_text(), str(path))
    pairs = diff(before.config, loaded.config)
    text = {key: f"config.{key} was {old!r}, is {new!r}" for key, old, new in pairs}
    binding = [line for key, line in text.items() if not key.startswith(FREE)]
    lines = list(text.values())
    old_hash = before.environment["corpus"]["hash"]
    if old_hash != corpus.hash:
        line = f"the corpus was {old_hash[:12]}, is {corpus.hash[:12]}: losses before and after do not compare"
        return [*lines, line], [*binding, line]
    return lines, binding
