"""Traces: what routers decided, token by token, in a file, to be taken again or to be asked what would have been.

A file holds the config (`about`), the rows (`tokens`, `[rows, T]`, −1 for padding) and for every mixture-of-experts
layer the fields of `Decisions`, `LAYER/FIELD`, over all rows in their order."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.base.config import from_json, to_json
from sparsejax.base.errors import ConfigError, RequestError, RunError
from sparsejax.base.reports import Decisions
from sparsejax.blocks.context import Mode
from sparsejax.model.config import EMBEDDING, ModelConfig
from sparsejax.train.config import ExperimentConfig

FIELDS = tuple(Decisions.__dataclass_fields__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The decisions of a pass over some rows. `layers` is by `Layer.name`, its arrays `[rows, T, …]`."""

    config: ExperimentConfig
    mode: Mode
    step: int
    tokens: np.ndarray
    layers: dict[str, Decisions]

    @property
    def mask(self) -> np.ndarray:
        """False for padding."""
        return self.tokens >= 0

    def save(self, path: Path) -> None:
        """Writes the file. Raises `RunError` when the disk refuses it."""
        about = {"mode": self.mode, "step": self.step, "config": to_json(self.config, {}, {})}
        arrays = {f"{name}/{field}": getattr(layer, field) for name, layer in self.layers.items() for field in FIELDS}
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, about=np.asarray(json.dumps(about)), tokens=self.tokens, **arrays)
        except OSError as error:
            raise RunError(f"{path} could not be written: {error.strerror}") from error

    def experts(self) -> np.ndarray:
        """Of every layer the experts chosen, int32 `[rows, T, L, K]`, −1 for none: `Batch.experts`."""
        rows, length = self.mask.shape
        most = max(layer.experts.shape[-1] for layer in self.layers.values())
        layers = self.config.model.layers
        experts = np.full((rows, length, len(layers), most), -1, np.int32)
        for layer in layers:
            if layer.name in self.layers:
                chosen = self.layers[layer.name].experts
                experts[:, :, layer.index, : chosen.shape[-1]] = chosen
        return experts


def token_ids(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows of a batch, by its fields, as a trace has them."""
    return np.where(batch["segments"] > 0, batch["tokens"], -1)


def by_layer(config: ModelConfig, by_position: Mapping[str, Any]) -> dict[str, Any]:
    """Trees by position in the model, those of the pattern stacked → trees by `Layer.name`, in the order of the depth;
    what comes before the first layer keeps its name."""
    found = {} if EMBEDDING not in by_position else {EMBEDDING: by_position[EMBEDDING]}
    for layer in config.layers:
        if layer.position in by_position:
            stacked = by_position[layer.position]
            one = stacked if layer.repeat is None else jax.tree.map(lambda a: a[layer.repeat], stacked)
            found[layer.name] = one
    return found


class Recording:
    """Collects the decisions of batch after batch."""

    def __init__(self):
        self._tokens: list[np.ndarray] = []
        self._layers: dict[str, list[Decisions]] = {}

    def append(self, config: ModelConfig, batch: Mapping[str, np.ndarray], decisions: dict[str, Decisions]) -> None:
        """Takes the decisions of one batch by position, waiting for them."""
        self._tokens.append(token_ids(batch))
        for name, one in by_layer(config, jax.tree.map(np.asarray, decisions)).items():
            self._layers.setdefault(name, []).append(one)

    def trace(self, config: ExperimentConfig, mode: Mode, step: int) -> Trace:
        join = lambda *parts: np.concatenate(parts)  # noqa: E731
        whole = {name: jax.tree.map(join, *parts) for name, parts in self._layers.items()}
        return Trace(config=config, mode=mode, step=step, tokens=np.concatenate(self._tokens), layers=whole)


def load_trace(path: Path) -> Trace:
    """What `save` wrote. Raises `RequestError` when the file is no trace."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        about: dict[str, Any] = json.loads(str(arrays.pop("about")))
        tokens = arrays.pop("tokens")
        config = from_json(ExperimentConfig, about["config"], str(path)).config
        names = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        fields: dict[str, dict[str, Any]] = {
            name: {each: arrays[f"{name}/{each}"] for each in FIELDS} for name in names
        }
        layers = {name: Decisions(**each) for name, each in fields.items()}
    except OSError as error:
        raise RequestError(f"{path}: could not be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: not a trace that eval --trace or train.trace wrote: {error}") from None
    return Trace(config=config, mode=about["mode"], step=about["step"], tokens=tokens, layers=layers)


def check_replay(trace: Trace, config: ExperimentConfig) -> None:
    """Raises `RequestError` when models of `config` cannot take the decisions of `trace` again."""
    model = config.model
    blocks = {layer.name: layer.block for layer in model.layers}
    lacking = [name for name in trace.layers if name not in blocks]
    if lacking:
        raise RequestError(f"--replay: it has decisions of {lacking[0]}, which the model lacks: {', '.join(blocks)}")
    for name in trace.layers:
        try:
            model.blocks[blocks[name]].check_replay(int(trace.layers[name].experts.max(initial=-1)))
        except ConfigError as error:
            raise error.below(f"model.blocks.{blocks[name]}") from None
