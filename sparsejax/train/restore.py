"""A trained model from the folder of its run."""

from pathlib import Path
from typing import Any, Optional

import jax

from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import Variables, abstract_state, make_optimizer


def restore_variables(
    config: ExperimentConfig, workdir: Path, mesh: jax.sharding.Mesh, step: Optional[int] = None
) -> tuple[Variables, dict[str, Any], int]:
    """(variables on `mesh`, progress, step) of the newest good checkpoint or that of `step`; the optimizer's state is
    not read. Needs the mesh to be set.

    Raises:
      RequestError: there is no such checkpoint, or it is of another model.
      RunError: it is damaged.
    """
    saving = config.checkpoint
    checkpoints = Checkpoints(workdir / "checkpoints", saving.every, saving.keep, saving.keep_every)
    target = abstract_state(config, make_optimizer(config), mesh).variables
    return checkpoints.restore(target, step, partial=True)
