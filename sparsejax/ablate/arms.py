"""Arms as whole experiments, and what each costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsejax.ablate.study import Arm, Study, as_text
from sparsejax.base.config import Loaded, load, to_json
from sparsejax.base.errors import RequestError
from sparsejax.model.cost import TRAINING, mean_keys, total
from sparsejax.train.config import ExperimentConfig

Overrides = tuple[tuple[str, str], ...]
"""(config key, text) as on the command line."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """An arm as the experiment that is run."""

    name: str
    arm: Arm
    loaded: Loaded[ExperimentConfig]
    sized: Mapping[str, Any] = field(default_factory=dict)  # what was solved to match the base

    @property
    def config(self) -> ExperimentConfig:
        return self.loaded.config

    @property
    def text(self) -> str:
        """Its `config.json`, which `train --config=` takes."""
        return to_json(self.config, self.loaded.provenance, {})


def resolve(study: Study, root: Path, name: str, overrides: Overrides = (), sized: Mapping[str, Any] = {}) -> Resolved:
    """The arm's experiment: config file, the arm's edits, then `overrides`, then `sized`.

    Raises:
      RequestError: the config is refused; the line begins with the arm's name.
    """
    arm = study.arms[name]
    file = str(root / study.config) + ("" if arm.argument is None else f":{arm.argument}")
    edits = [(key, as_text(value)) for key, value in arm.edits.items()]
    solved = [(key, str(value)) for key, value in sized.items()]
    try:
        edit = arm.edit if arm.edit is not None else lambda config: None
        return Resolved(
            name=name, arm=arm, loaded=load(ExperimentConfig, file, [*edits, *overrides, *solved], edit), sized=sized
        )
    except RequestError as error:
        raise RequestError(f"arm {name}: {error}") from None


def flops_per_token(config: ExperimentConfig) -> float:
    """Of a forward pass over a row that is one document, ideal."""
    length = config.data.sequence_length
    return total(config.model).flops(mean_keys(config.model, length), length)


def tokens(config: ExperimentConfig) -> float:
    """Positions that training passes over."""
    return float(config.train.steps * config.data.batch_size * config.data.sequence_length)


def training_flops(config: ExperimentConfig) -> float:
    """Of the whole training, ideal."""
    return TRAINING * config.train.passes * flops_per_token(config) * tokens(config)


def costs(config: ExperimentConfig) -> dict[str, float]:
    """What `results.json` says of an arm's size."""
    whole = total(config.model)
    return {
        "flops_per_token": flops_per_token(config),
        "training_flops": training_flops(config),
        "parameters": whole.parameters,
        "active_parameters": whole.active,
        "steps": config.train.steps,
        "tokens": tokens(config),
    }
