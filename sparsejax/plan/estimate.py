"""The plan of an experiment: its work, and its layout on every mesh that is asked about."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.base.config import unused
from sparsejax.base.errors import ConfigError
from sparsejax.plan.activations import NOT_MODELLED
from sparsejax.plan.layout import Layout, layout
from sparsejax.plan.work import Work, work
from sparsejax.train.config import ExperimentConfig

FLOPS = "FLOPs are 2 × the multiply-adds of matrix products; a token counts (T + 1) / 2 keys if causal, else T."


@dataclass(frozen=True, kw_only=True)
class Plan:
    work: Work
    tokens_per_step: int
    flops_per_step: float  # training, ideal, over all devices
    layouts: tuple[Layout, ...]
    unused: dict[str, str]  # config leaf that has no effect → why
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Of plain types, for JSON. The tensors of every layout are included."""
        record = dataclasses.asdict(self)
        return record.pop("work") | record


def plan(config: ExperimentConfig, meshes: Sequence[tuple[int, int, int]] = ()) -> Plan:
    """The plan of `config` on `meshes` (data, expert, tensor); none: on its own mesh.

    Nothing is allocated and no device is looked at: a mesh is a shape.

    Raises:
      ConfigError: the config does not fit on one of the meshes.
    """
    per_token = work(config.model, config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    return Plan(
        work=per_token,
        tokens_per_step=tokens,
        flops_per_step=tokens * config.train.passes * per_token.flops_per_token["training"],
        layouts=tuple(layout(each) for each in on_meshes(config, meshes)),
        unused=unused(config),
        notes=what_is_left_out(config),
    )


def on_meshes(config: ExperimentConfig, meshes: Sequence[tuple[int, int, int]]) -> list[ExperimentConfig]:
    """`config` on each mesh; none: on its own."""
    return [on_mesh(config, mesh) for mesh in meshes or (config.mesh.shape,)]


def on_mesh(config: ExperimentConfig, shape: tuple[int, int, int]) -> ExperimentConfig:
    """`config` on a mesh of this shape (data, expert, tensor). Raises `ConfigError` when it does not go there."""
    data, expert, tensor = shape
    try:
        mesh = dataclasses.replace(config.mesh, data=data, expert=expert, tensor=tensor)
    except ConfigError as error:
        raise error.below("mesh") from None
    if data == -1:
        raise ConfigError(
            "mesh.data", "-1 is filled in from a run's devices, and a plan looks at none: give --mesh=D,E,T"
        )
    return dataclasses.replace(config, mesh=mesh)


def what_is_left_out(config: ExperimentConfig) -> tuple[str, ...]:
    """Sentences about what the numbers of `config` do not count."""
    model, parts = config.model, config.train.accumulation
    notes = [NOT_MODELLED, FLOPS]
    if model.remat != "none":
        notes.append(f"model.remat={model.remat} computes parts of the forward pass twice; FLOPs do not count that.")
    if config.train.passes > 1:
        notes.append(
            f"With train.consistency={config.train.consistency} a step goes over its tokens twice; FLOPs a step count "
            "both passes, FLOPs per token one."
        )
    if parts > 1 and any(model.blocks[name].counts_first for name in model.positions.values()):
        notes.append(
            f"With train.accumulation={parts} the global balance loss costs one more forward pass; not counted."
        )
    return tuple(notes)
