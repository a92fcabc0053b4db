"""Training steps of several experiments, timed in turn in one process."""

import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import Variables, make_optimizer, new_state
from sparsejax.train.step import EvalReport, StepReport, make_eval_step, make_train_step


def interleaved(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, np.ndarray]:
    """Seconds `[rounds]` of each competitor, called in turn, so that what slows the machine slows all of them.

    Every call is waited for, and one uncounted round comes first. `warm`: what to call, uncounted, before each of a
    competitor's turns."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, call in competitors.items():
            if warm is not None:
                jax.block_until_ready(warm[name]())
            begun = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


class Step:
    """An experiment's step on one batch of random tokens, from a state that it keeps; on the mesh that is set.

    Called, it trains: forward, backward, optimizer, the state updated in place."""

    def __init__(self, config: ExperimentConfig):
        tx, data = make_optimizer(config), config.data
        self.state = new_state(config, tx)
        self.step = jax.jit(make_train_step(config, tx), donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(config))
        parts = config.train.accumulation
        shape = (parts, data.batch_size // parts, data.sequence_length)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
        places = jnp.broadcast_to(jnp.arange(data.sequence_length), shape)
        fields = {"tokens": tokens, "targets": tokens, "segments": tokens * 0 + 1, "positions": places}
        fields |= {"loss_mask": tokens >= 0, "domains": tokens * 0}
        fields["rows"] = jnp.arange(data.batch_size).reshape(shape[:2])
        self.batch = {name: jax.sharding.reshard(array, P(None, BATCH_AXES)) for name, array in fields.items()}

    def __call__(self) -> StepReport:
        self.state, report = self.step(self.state, self.batch)
        return report

    def forward(self) -> EvalReport:
        """The loss alone."""
        return self.eval_step(Variables(params=self.state.params, model_state=self.state.model_state), self.batch)
