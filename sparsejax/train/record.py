"""`config.json`: what a run is, and whether a folder's run may go on under a config."""

import hashlib
import importlib.metadata
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import jax

from sparsejax.base.config import Loaded, diff, load, to_json
from sparsejax.base.cost import CONVENTION
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.processes import check_same, is_first, num_processes
from sparsejax.base.writers import write_atomically
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.corpus import Corpus, CorpusInfo
from sparsejax.data.loader import num_eval_batches
from sparsejax.data.tasks import TASKS
from sparsejax.model.config import ModelConfig
from sparsejax.ops.attention import SPLASH_BLOCK
from sparsejax.routers.tables import Hash
from sparsejax.train.config import ExperimentConfig

FREE = (
    "mesh.",
    "eval.",
    "checkpoint.",
    "train.log_every",
    "train.max_nonfinite",
    "train.profile",
    "train.trace",
    "train.tensorboard",
    "data.cache",
    "data.prefetch",
    "data.workers",
)
"""Settings that may differ when a run resumes: they change where and what is written, not what is learned."""


def environment(config: ExperimentConfig, corpus: CorpusInfo) -> dict[str, Any]:
    """What a run depends on beside its config: corpus, tables, versions, devices."""
    packages = (
        "sparsejax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
        "numpy",
    )
    return {
        "corpus": asdict(corpus),
        "tables": tables(config.model),
        "flops_convention": CONVENTION,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "platform": jax.default_backend(),
        "devices": [jax.device_count(), jax.devices()[0].device_kind],
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def tables(model: ModelConfig) -> dict[str, str]:
    """By the key of its path, the fingerprint of every file that says where tokens go. No checkpoint has it."""
    found = {}
    for name in sorted(set(model.positions.values())):
        spec = model.blocks[name]
        selection = spec.router.selection if isinstance(spec, MoESpec) else None
        if isinstance(selection, Hash) and selection.fingerprint is not None:
            found[f"model.blocks.{name}.router.selection.path"] = selection.fingerprint
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_corpus(config: ExperimentConfig, corpus: Corpus) -> None:
    """Raises `ConfigError` when the model lacks embeddings for some tokens, or there is no text to evaluate on;
    `RequestError` when this process does not have the text of the first."""
    check_same("corpus", f"{corpus.info.hash} {corpus.info.tokenizer}")
    num_eval_batches(corpus, config.data, config.microbatch_size)
    size, tokens = config.model.vocab_size, corpus.tokenizer.vocab_size
    if size < tokens:
        raise ConfigError("model.vocab_size", f"{size} is less than the tokenizer's {tokens} tokens (data.tokenizer)")
    own = config.data.task.own_ids
    if size < tokens + own:
        name = TASKS.name_of(config.data.task)
        message = f"{size} leaves no room for the ids of data.task={name} after the tokenizer's {tokens}"
        raise ConfigError("model.vocab_size", f"{message}; allowed: {tokens + own} or more")


def check_platform(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """What the blocks leave to the platform, as sentences. Raises `RequestError` when the devices are not those that
    model and trainer need."""
    count, unused = jax.process_count(), jax.device_count() - mesh.size
    if count > num_processes():  # the TPU runtime finds its hosts by itself, but nothing that they could talk through
        raise RequestError(f"this is one of {count} processes that have not been made one job: --distributed=tpu does")
    if count > 1 and unused:
        sizes = "×".join(map(str, config.mesh.shape))
        told = f"{sizes} uses {mesh.size} of the {jax.device_count()} devices that {count} processes have; allowed: all"
        raise ConfigError("mesh", told)
    check_same("config", hashlib.sha256(to_json(config, {}, {}).encode()).hexdigest())
    check_same("version of jax", jax.__version__)
    return check_devices(config, mesh)


def check_devices(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """`check_platform` for devices that may only be described."""
    _check_attention(config, mesh)
    decided = []
    for name in sorted(set(config.model.positions.values())):
        try:
            told = config.model.blocks[name].decided_for(mesh.devices.flat[0].platform, mesh.shape["expert"])
        except ConfigError as error:
            raise error.below(f"model.blocks.{name}") from None
        decided += [f"block {name}: {sentence}" for sentence in told]
    return decided


def _check_attention(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> None:
    if config.model.attention != "splash":
        return
    platform, length = mesh.devices.flat[0].platform, config.data.sequence_length
    if platform != "tpu":
        message = f"'splash' is a kernel for TPU and this is a {platform}; allowed here: auto, xla"
        raise ConfigError("model.attention", message)
    if length % SPLASH_BLOCK:
        raise ConfigError(
            "model.attention", f"'splash' takes rows of a multiple of {SPLASH_BLOCK} tokens, not {length}"
        )
    for name in config.model.positions.values():
        slots = config.model.tokens_of(name).room(length)
        if slots % SPLASH_BLOCK:
            message = f"'splash' takes rows of a multiple of {SPLASH_BLOCK} tokens, and {name} has {slots} slots of"
            raise ConfigError("model.attention", f"{message} {length} tokens; allowed: other sequence.documents, xla")


def changes_since(workdir: Path, loaded: Loaded[ExperimentConfig], corpus: CorpusInfo, allowed: bool) -> list[str]:
    """Lines that say what changed since the run in `workdir`, which is to be resumed, wrote its `config.json`.

    Raises:
      RequestError: something changed that the run learns from, and that is not `allowed`.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return []
    changes, binding = _changes(path, loaded, corpus)
    if binding and not allowed:
        what = "; ".join(binding)
        advice = "Use another --workdir, or --allow-config-change"
        raise RequestError(f"{workdir} holds a run with another config: {what}. {advice}")
    return changes


def write_config(workdir: Path, loaded: Loaded[ExperimentConfig], corpus: CorpusInfo) -> None:
    """Writes `config.json`. Raises `RunError` when the disk refuses it."""
    text = to_json(loaded.config, loaded.provenance, environment(loaded.config, corpus))
    if is_first():
        write_atomically(workdir / "config.json", text.encode())


def other_corpus(workdir: Path, corpus: CorpusInfo) -> Optional[str]:
    """How `corpus` differs from the one that the run in `workdir` was trained on; None if it does not, or is
    unknown."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    recorded, now = load(ExperimentConfig, str(path)).environment, asdict(corpus)
    if "corpus" not in recorded:
        return None
    before = recorded["corpus"]
    differs = [key for key in ("hash", "tokenizer") if before[key] != now[key]]
    described = ", ".join(f"{key} was {before[key][:12]}, is {now[key][:12]}" for key in differs)
    return f"the corpus is another one: {described}; losses do not compare" if differs else None


def check_tokenizer(workdir: Path, fingerprint: str) -> None:
    """Raises `RequestError` when the run in `workdir` was trained with another tokenizer than that of `fingerprint`."""
    path = workdir / "config.json"
    recorded = load(ExperimentConfig, str(path)).environment if path.is_file() else {}
    before = recorded["corpus"]["tokenizer"] if "corpus" in recorded else fingerprint
    if before != fingerprint:
        raise RequestError(
            f"the tokenizer (data.tokenizer) is not the one of the run in {workdir}: its fingerprint was "
            f"{before[:12]}, is {fingerprint[:12]}; the ids mean other text"
        )


def _changes(path: Path, loaded: Loaded[ExperimentConfig], corpus: CorpusInfo) -> tuple[list[str], list[str]]:
    """(all changes since `path` was written, those of them that change what is learned)."""
    before = load(ExperimentConfig, str(path))
    text = {key: f"config.{key} was {old!r}, is {new!r}" for key, old, new in diff(before.config, loaded.config)}
    binding = [line for key, line in text.items() if not key.startswith(FREE)]
    flagged = other_corpus(path.parent, corpus)
    more = [] if flagged is None else [flagged]
    recorded, now = before.environment.get("tables", {}), tables(loaded.config.model)
    more += [
        f"the file of config.{key} is another one: it was {recorded[key][:12]}, is {now[key][:12]}"
        for key in recorded
        if key in now and recorded[key] != now[key]
    ]
    return [*text.values(), *more], [*binding, *more]
