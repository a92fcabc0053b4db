"""How much the losses of a trained model's tokens depend on later tokens, which a causal model does not see."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.base.config import load
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.base.structs import Batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables
from sparsejax.train.state import Variables, abstract_model
from sparsejax.train.step import Microbatches


def leak(run: Path) -> float:
    """Mean over targets of |change of the loss|, in nats, where the second half of every row becomes another row's: of
    the targets in the first half, in the first batch of the validation split. Capacity leaks, too, where groups are
    whole batches: a later token may take an earlier one's slot."""
    config = load(ExperimentConfig, str(run / "config.json")).config
    mesh, data = make_mesh(config.mesh), config.data
    with jax.set_mesh(mesh):
        variables = restore_variables(config, run, mesh)[0]
        batch = next(iter(eval_batches(open_corpus(data), data, config.microbatch_size, 1)))
        half = data.sequence_length // 2
        other = dict(batch)
        for name in ("tokens", "targets"):
            changed = batch[name].copy()
            changed[:, half:] = np.roll(batch[name], 1, axis=0)[:, half:]
            other[name] = changed
        losses = jax.jit(_losses_of(config))
        before, after = (np.asarray(losses(variables, shard_batch(each, mesh, 1))) for each in (batch, other))
    # The last target of the first half is the first token of the second.
    counted = batch["loss_mask"][:, : half - 1].astype(bool)
    return float(np.abs(after - before)[:, : half - 1][counted].mean())


def _losses_of(config: ExperimentConfig):
    graph, _, _ = abstract_model(config.model)

    def losses(variables: Variables, microbatches: Microbatches) -> Float[Array, "B T"]:
        batch = Batch(**{name: rows[0] for name, rows in microbatches.items()})
        model = nnx.merge(graph, variables.params, variables.model_state)
        return model.losses([model(batch, mode="eval")], batch).nll[-1].astype(jnp.float32)

    return losses
