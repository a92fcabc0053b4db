"""Classification in which each row leaves the model at the first exit that satisfies a rule, whatever others do.

The layers run in segments, from exit to exit. After each the rule is asked about the rows that are left; who is content
keeps the answer of that exit, and the others go on, gathered into the smallest of a few batch sizes (the ladder) that
holds them: survivor compaction. So every segment is one program for each size, compiled when it is first wanted;
segments before the first exit at which the rule could stop are one program together.

Rules are those of exit tables (`infer.exit_rules`), asked on the host about what the heads have said so far."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.sharding import BATCH_AXES, shard_batch, to_numpy
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.infer.exit_rules import ExitRule
from sparsejax.infer.exit_table import exit_table
from sparsejax.model.config import ModelConfig
from sparsejax.model.partial import embedded, features_at, logits_at, run_layers
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.train.state import Variables, abstract_model


@dataclass(frozen=True, kw_only=True)
class Departures:
    """What became of the N rows of one batch. Padding has exit −1 and logits 0."""

    logits: Float[np.ndarray, "N C"]  # of the exit that each row left at
    exits: Int[np.ndarray, " N"]  # its number, from 0; the last is the whole model
    rungs: tuple[int, ...]  # rows of each segment that ran, padding included
    compiled_flops: float  # XLA's own count, of the programs that ran
    seconds: float  # from the host's arrays to the host's answers, without compilation


def ladder_of(rows: int, multiple: int = 1) -> tuple[int, ...]:
    """Batch sizes up to `rows`: that, three quarters, a half, three eighths, … of it, each a multiple of `multiple`."""
    parts = [rows * share / 2**halved for halved in range(rows.bit_length()) for share in (1, 0.75)]
    return tuple(sorted({-(-int(np.ceil(part)) // multiple) * multiple for part in parts}))


class ExitingEncoder:
    """A trained classifier, to be made and used inside `jax.set_mesh`. Every device of the mesh's batch axes holds an
    equal part of a rung's rows.

    Evaluation's routing is used, whose groups are parts of one row: nothing that a row gets depends on others."""

    def __init__(self, config: ModelConfig, variables: Variables, length: int, ladder: Sequence[int]):
        """For rows of `length` tokens, in batches of up to the last of the `ladder`'s ascending sizes. Raises
        `RequestError` when models of this config cannot leave early, or devices not share these sizes."""
        check_encoder(config, length)
        shards = jax.sharding.get_mesh().shape
        shards = shards["data"] * shards["expert"]
        wrong = [size for size in ladder if size < 1 or size % shards]
        if not ladder or wrong or list(ladder) != sorted(set(ladder)):
            raise RequestError(f"ladder {tuple(ladder)}; allowed: ascending multiples of {shards}")
        self.config, self.ladder, self.length = config, tuple(ladder), length
        self.depths = (*config.exits.depths, config.num_layers)
        self._graph = abstract_model(unrolled(config))[0]
        model = (variables.params, variables.model_state)
        self._model = jax.jit(lambda model: tuple(unrolled_variables(config, each) for each in model))(model)
        # By the exits of its first and last segment and its rows, with its FLOPs.
        self._compiled: dict[tuple[int, int, int], tuple[Compiled, float]] = {}

    def __call__(self, batch: Mapping[str, np.ndarray], rule: ExitRule) -> Departures:
        """Of host arrays by the names of `Batch`, `[N, T]` with N ≤ the ladder's last size."""
        begun, compiling, flops = time.perf_counter(), 0.0, 0.0
        rows, most = len(batch["tokens"]), self.ladder[-1]
        padded = {name: np.pad(each, ((0, most - rows),) + ((0, 0),) * (each.ndim - 1)) for name, each in batch.items()}
        mesh: Any = jax.sharding.get_mesh()
        arrays = {name: each[0] for name, each in shard_batch(padded, mesh, 1).items()}
        heard = _Heard(rows, self.depths)
        alive_N, rungs, x = np.flatnonzero(batch["segments"].any(-1)), [], None
        exits_N, first = np.full(rows, -1), 0
        while len(alive_N):
            last = min(max(first, rule.earliest), len(self.depths) - 1)
            rung = next(size for size in self.ladder if size >= len(alive_N))
            index = np.full(rung, most, np.int32)  # beyond the end: a row of padding
            index[: len(alive_N)] = alive_N
            key, operands = (first, last, rung), (*self._model, arrays, jnp.asarray(index), x)
            if key not in self._compiled:
                started = time.perf_counter()
                self._compiled[key] = self._compile(first, last, operands)
                compiling += time.perf_counter() - started
            program, cost = self._compiled[key]
            # Waited for before the next is dispatched: on CPU, two programs with collectives in flight can deadlock.
            x, said = jax.block_until_ready(program(*operands))
            for number, (logits_RC, features_RD) in enumerate(said, first):
                heard.hear(number, alive_N, to_numpy(logits_RC), to_numpy(features_RD))
                rungs.append(rung)
            content_N = heard.content(rule, last, alive_N)
            exits_N[alive_N[content_N]] = last
            alive_N, flops, first = alive_N[~content_N], flops + cost, last + 1
        logits_NC = np.where(exits_N[:, None] >= 0, heard.logits[np.arange(rows), exits_N], 0)
        seconds = time.perf_counter() - begun - compiling
        return Departures(logits=logits_NC, exits=exits_N, rungs=tuple(rungs), compiled_flops=flops, seconds=seconds)

    def _compile(self, first: int, last: int, operands: tuple) -> tuple[Compiled, float]:
        """The segments that end at the exits `first` to `last`."""
        ends = (0, *self.depths)

        def segments(params: nnx.State, model_state: nnx.State, arrays: dict[str, Array], index_R: Array, x: Any):
            """(the residual of all rows, for each exit `[R, C]` and `[R, D]`), after these layers on rows `index_R`."""
            model = nnx.merge(self._graph, params, model_state)
            batch = Batch(**{name: _taken(array, index_R) for name, array in arrays.items()})
            if x is None:
                here, context, _ = embedded(model, batch, None, "eval")
                rows = arrays["tokens"].shape[0]
                x = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype, out_sharding=P(BATCH_AXES)), here)
            else:
                here = jax.tree.map(lambda a: _taken(a, index_R), x)
                context = Context(batch=batch, mode="eval", embedded=model.embedding(batch.tokens))
            said = []
            for number in range(first, last + 1):
                depth = ends[number + 1]
                here, _ = run_layers(model, here, context, None, range(ends[number], depth))
                features_RSD = features_at(model, here, batch, depth)
                said.append((logits_at(model, features_RSD, depth)[:, 0], features_RSD[:, 0]))
            ended = last == len(self.depths) - 1
            return None if ended else jax.tree.map(lambda a, new: _put(a, index_R, new), x, here), said

        kept = () if last == len(self.depths) - 1 else (4,)
        program = jax.jit(segments, donate_argnums=kept).lower(*operands).compile()
        return program, (program.cost_analysis() or {}).get("flops") or 0.0


def check_encoder(config: ModelConfig, length: int) -> None:
    """Raises `RequestError` unless rows of so many tokens can leave models of this config early, each by itself."""
    if config.head.of_tokens:
        raise RequestError("rows leave early that have a class (model.head=classes); tokens do in generate")
    if not config.exits.depths:
        raise RequestError("the model has no exits (model.exits=none), and so no row can leave early")
    expert_axis = jax.sharding.get_mesh().shape.get("expert", 1)
    for name in dict.fromkeys(config.positions.values()):
        try:
            config.blocks[name].check_rows_apart(config.tokens_of(name).room(length), expert_axis)
        except ConfigError as error:
            raise error.below(f"model.blocks.{name}") from None


class _Heard:
    """What the heads have said of N rows so far; zeros where they have not been asked."""

    def __init__(self, rows: int, depths: tuple[int, ...]):
        self.rows, self.depths = rows, depths
        self.logits = np.zeros((rows, len(depths), 0), np.float32)
        self.states = self.logits

    def hear(self, number: int, alive_N: np.ndarray, logits_RC: np.ndarray, features_RD: np.ndarray) -> None:
        """Exit `number`, of the rows `alive_N`, which come first."""
        if number == 0:
            shape = (self.rows, len(self.depths))
            self.logits, self.states = (np.zeros((*shape, a.shape[-1]), np.float32) for a in (logits_RC, features_RD))
        self.logits[alive_N, number] = logits_RC[: len(alive_N)]
        self.states[alive_N, number] = features_RD[: len(alive_N)]

    def content(self, rule: ExitRule, number: int, alive_N: np.ndarray) -> Bool[np.ndarray, " N"]:
        """Whether the rule stops the rows `alive_N` at exit `number`; the last stops all."""
        if number == len(self.depths) - 1:
            return np.ones(len(alive_N), bool)
        order, nothing = np.arange(1, len(self.depths) + 1), np.zeros(len(alive_N), np.int32)
        more: dict[str, Any] = {"cost": order, "depth": self.depths, "keep_logits": True}
        table = exit_table(self.logits[alive_N], nothing, states_NED=self.states[alive_N], **more)
        return rule.stops(table)[:, number]


def _taken(array: Array, index_R: Int[Array, " R"]) -> Array:
    """Rows by their numbers; zeros for those beyond the end."""
    rows = jax.sharding.reshard(array, P()).at[index_R].get(mode="fill", fill_value=0)
    return jax.sharding.reshard(rows, P(BATCH_AXES))


def _put(array: Array, index_R: Int[Array, " R"], rows: Array) -> Array:
    """`array` with these rows; those beyond the end are dropped."""
    put = jax.sharding.reshard(array, P()).at[index_R].set(jax.sharding.reshard(rows, P()), mode="drop")
    return jax.sharding.reshard(put, P(BATCH_AXES))
