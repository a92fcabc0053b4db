"""Names that a study asks its runs for, checked before any of them has run."""

from collections.abc import Mapping
from functools import cache

import jax
import numpy as np

from sparsejax.ablate.arms import Resolved
from sparsejax.ablate.study import TRAIN, Study
from sparsejax.base.errors import RequestError, did_you_mean
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.report.compare import TIMES
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.evaluate import evaluation_row
from sparsejax.train.state import Variables, abstract_model
from sparsejax.train.step import make_eval_step

SPENT = frozenset({"tokens", "flops", "learning_rate", "nonfinite_steps", "seconds"})
OF_TRAINING = TIMES | {"grad_norm", "window_steps"}
LATER = frozenset({"memory/churn"})
"""What only a second evaluation has."""


def check_names(study: Study, arms: Mapping[str, Resolved]) -> None:
    """Raises `RequestError` for a metric that the base does not evaluate, or a figure to show that no arm has."""
    base = evaluated_names(arms[study.base].config)
    if study.metric not in base:
        raise RequestError(
            f"metric={study.metric!r} is no figure of an evaluation of {study.base}; those: {', '.join(sorted(base))}."
            f"{did_you_mean(study.metric, base)}"
        )
    missing, known = set(study.shown), set()
    for arm in arms.values():
        if not missing:
            return
        found = evaluated_names(arm.config) | LATER
        known |= found | {TRAIN + name for name in found | OF_TRAINING}
        missing -= known
    if missing:
        name = min(missing)
        raise RequestError(f"shown={name!r} is a figure of no arm.{did_you_mean(name, known)}")


@cache
def evaluated_names(config: ExperimentConfig) -> frozenset[str]:
    """Those of a row of evaluation: from shapes alone, nothing is computed."""
    data, mesh = config.data, make_mesh(MeshConfig())
    corpus = open_corpus(data)
    rows = next(iter(eval_batches(corpus, data, config.microbatch_size, 1)))
    with jax.set_mesh(mesh):
        _, params, model_state = abstract_model(config.model)
        variables = Variables(params=params, model_state=model_state)
        shapes = jax.eval_shape(make_eval_step(config), variables, shard_batch(rows, mesh, 1))
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with np.errstate(all="ignore"):  # nothing, divided by nothing
        row = evaluation_row(config, corpus, nothing)[0]
    return frozenset(row) | SPENT
