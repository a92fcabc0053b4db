"""One optimizer step and one evaluation batch, as pure functions to be jitted."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.reports import Decisions, Report, add, split_recorded
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.sharding import sum_over as over_devices
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import Totals
from sparsejax.model.config import ModelConfig
from sparsejax.model.exits import kept
from sparsejax.model.lm import (
    LanguageModel,
    ModelOutput,
    auxiliary_losses,
    next_model_state,
    scored,
    settle,
    without_measured,
)
from sparsejax.model.tables import Into, Reads, row_gradients, row_zeros
from sparsejax.nn.table import RowGradients, joined
from sparsejax.ops.head_loss import HeadLosses, Weighting
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.optimizer import clip_scale
from sparsejax.train.state import TrainState, Variables, abstract_model, split_tables, with_tables
from sparsejax.train.table_step import apply_rows, collect

PROBE_TOKENS = 32
"""Tokens of each row whose addresses an evaluation returns."""

Microbatches = dict[str, Array]
"""The fields of `Batch`, each `[A, B, …]`."""


@struct
class TableReport:
    """Of a lookup table in one step."""

    touched: Int[Array, ""]  # rows that were read, and so updated
    rounds: Int[Array, ""]  # of exchange, until all gradients were delivered


@struct
class ExitSums:
    """Over targets, of the exits but the last."""

    cross_entropy: Float[Array, " E"]
    correct: Int[Array, " E"]


@struct
class StepReport:
    """Of one step. `terms` are the auxiliary losses as they entered `loss`, by name."""

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    correct: Int[Array, ""]  # targets that a pass finds likeliest
    terms: dict[str, Float[Array, ""]]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    step: Int[Array, ""]  # its number, from 1
    nonfinite_streak: Int[Array, ""]  # steps skipped in a row, up to this one
    targets: Int[Array, ""]
    tokens: Int[Array, ""]
    rows: Int[Array, ""]  # that are not all padding
    keys: Float[Array, ""]  # (query, key) pairs of one attention layer
    exits: ExitSums
    passes: Int[Array, ""]  # over each of the tokens; reports are sums over them
    reports: dict[str, Report]
    tables: dict[str, TableReport]  # of the lookup tables, by memory


@struct
class EvalReport:
    """Sums of one evaluation batch."""

    cross_entropy_sum: Float[Array, ""]
    correct: Int[Array, ""]
    targets: Int[Array, ""]
    tokens: Int[Array, ""]
    rows: Int[Array, ""]
    exits: ExitSums
    reports: dict[str, Report]
    by_token: Optional[tuple[Float[Array, " V"], Int[Array, " V"]]] = None  # of a model with memories: Σ loss, targets
    decisions: Optional[dict[str, Decisions]] = None  # by position, when they are recorded; no sum
    reads: Optional[Reads] = None  # of memories whose addresses change with the parameters (`probe_of`); no sum


def make_train_step(
    config: ExperimentConfig, tx: optax.GradientTransformation
) -> Callable[[TrainState, Microbatches], tuple[TrainState, StepReport]]:
    """The step of `config`. Needs the mesh to be set, here and where the step is traced.

    Loss and gradient are those of the whole batch, whatever `train.accumulation`: sums over microbatches, divided by
    totals that are counted before the first forward pass. (With a balance scope of `device` or `microbatch` the
    balance loss is by definition another one for another accumulation.) A step whose loss or gradient is not finite
    leaves parameters and optimizer untouched."""
    grads_of_step = make_grads_of_step(config)

    def train_step(state: TrainState, microbatches: Microbatches) -> tuple[TrainState, StepReport]:
        (loss, found), grads = grads_of_step(state.params, state.model_state, microbatches, state.step)
        nll, correct, terms, reports, exits = found
        totals = _totals(microbatches)
        frozen = config.model.exits.freezes(state.step, config.train.steps)
        only = lambda tree: tree if frozen is None else kept(config.model.exits, tree, frozen)  # noqa: E731
        grads = dataclasses.replace(grads, dense=only(grads.dense))
        dense, tables = split_tables(state.params)
        collected = {name: collect(tables[name], read) for name, read in grads.rows.items()}
        of_tables = [found.square_sum for found in collected.values()]
        grad_norm = jnp.sqrt(sum(of_tables, start=optax.tree.norm(grads.dense, squared=True)))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        scale = clip_scale(config.optimizer, grad_norm)
        updates, opt_state = tx.update(optax.tree.scale(scale, grads.dense), state.opt_state, dense)
        updated = optax.apply_updates(dense, only(updates))  # moments and weight decay move what has no gradient, too
        moves = finite if frozen is None else finite & ~frozen
        new_tables, row_state = {}, {}
        for name, read in grads.rows.items():
            rows = tables[name], state.row_state[name], read, collected[name]
            new_tables[name], row_state[name] = apply_rows(config.optimizer.tables, *rows, scale, moves)
        settled = settle(config.model, reports)
        model_state = next_model_state(config.model, state.model_state, settled)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        new_state = TrainState(
            step=state.step + 1,
            params=with_tables(keep(updated, dense), new_tables, state.params),
            model_state=jax.tree.map(lambda new, old: jnp.where(moves, new, old), model_state, state.model_state),
            opt_state=keep(opt_state, state.opt_state),
            row_state=row_state,
            nonfinite=state.nonfinite + ~finite,
            nonfinite_streak=jnp.where(finite, 0, state.nonfinite_streak + 1),
        )
        report = StepReport(
            loss=loss,
            cross_entropy=nll,
            correct=correct,
            exits=exits,
            terms=terms,
            grad_norm=grad_norm,
            finite=finite,
            step=new_state.step,
            nonfinite_streak=new_state.nonfinite_streak,
            targets=totals.targets,
            tokens=totals.tokens,
            rows=totals.rows,
            keys=attended_keys(microbatches["positions"], microbatches["segments"], config.model.causal),
            passes=jnp.int32(config.train.passes),
            reports=without_measured(settled),
            tables={name: TableReport(touched=c.touched, rounds=c.rounds) for name, c in collected.items()},
        )
        return new_state, report

    return train_step


@struct
class Gradients:
    """Of the parameters, and of the rows that were read of lookup tables, by memory."""

    dense: nnx.State
    rows: dict[str, RowGradients]


def make_grads_of_step(config: ExperimentConfig):
    """`(params, model_state, microbatches, step) -> ((loss, (nll, correct, terms, reports, exits)), Gradients)`, summed
    over microbatches; nll is the mean, correct and reports are the sums, of the passes that `train.consistency` asks
    for; `exits` are `ExitSums`."""
    graph, _, _ = abstract_model(config.model)
    count_first = config.train.accumulation > 1 and _needs_counts(config)

    def grads_of_step(params: nnx.State, model_state: nnx.State, microbatches: Microbatches, step: Int[Array, ""]):
        dense, tables = split_tables(params)
        keys = pass_keys(config.train, step)
        totals = [_totals(microbatches)] * len(keys)
        weighting = config.model.exits.weighting(step, config.train.steps, config.model.num_layers)

        def model_of(dense: nnx.State) -> LanguageModel:
            return nnx.merge(graph, with_tables(dense, tables, params), model_state)

        if count_first:
            model, nothing = model_of(dense), [None] * len(keys)
            passes = lambda batch: passes_of(config, model, batch, keys, nothing, weighting)  # noqa: E731
            counted = sum_over(lambda batch: passes(batch)[1], microbatches)
            totals = [dataclasses.replace(totals[0], reports=reports) for reports in counted]

        def loss_fn(differentiated: tuple[nnx.State, list[Into]], batch: Batch):
            dense, into = differentiated
            return microbatch_loss(config, model_of(dense), batch, keys, into, totals, weighting)

        def microbatch(batch: Batch):
            zeros = [row_zeros(config.model, *batch.tokens.shape) for _ in keys]
            (loss, (found, reads)), grads = jax.value_and_grad(loss_fn, has_aux=True)((dense, zeros), batch)
            return ((loss, found), grads[0]), (reads, grads[1])

        (found, dense_grads), (reads, rows) = sum_over(microbatch, microbatches, listed=True)
        of_pass = [row_gradients(config.model, *read) for read in zip(reads, rows, strict=True)]
        return found, Gradients(dense=dense_grads, rows=joined(of_pass))

    return grads_of_step


def pass_keys(train: TrainConfig, step: Int[Array, ""]) -> list[PRNGKeyArray]:
    """A key for each pass of the step."""
    key = jax.random.fold_in(jax.random.key(train.seed), step)
    return [key] if train.passes == 1 else list(jax.random.split(key, train.passes))


def passes_of(
    config: ExperimentConfig,
    model: LanguageModel,
    batch: Batch,
    keys: Sequence[PRNGKeyArray],
    into: Sequence[Optional[Into]],
    weighting: Optional[Weighting] = None,
) -> tuple[HeadLosses, list[dict[str, Report]], list[Reads]]:
    """What the passes over a microbatch, or the exits of one, lose; the reports of each pass, and what it read of
    lookup tables."""
    outputs = [model(batch, mode="train", key=key, into=zeros) for key, zeros in zip(keys, into, strict=True)]
    if weighting is None:
        lost = model.losses(outputs, batch, config.train.consistency)
    else:
        lost = model.exit_losses(outputs[0], batch, weighting)
    of_pass = zip(outputs, lost.nll[-len(outputs) :], strict=True)
    reports = [scored(config.model, out.reports, nll, batch) for out, nll in of_pass]
    return lost, reports, [out.reads for out in outputs]


def microbatch_loss(
    config: ExperimentConfig,
    model: LanguageModel,
    batch: Batch,
    keys: Sequence[PRNGKeyArray],
    into: Sequence[Optional[Into]],
    totals: Sequence[Totals],
    weighting: Optional[Weighting] = None,
):
    """(loss, ((nll, correct, terms, reports, exits), what each pass read)) of one microbatch, by a pass for each key.

    With two, loss = Σ over passes (cross entropy and auxiliary losses) + α · mean over targets of ½ (KL(p₁‖p₂) +
    KL(p₂‖p₁)) (THOR, arXiv:2110.04260). `nll` is the mean of the cross entropies, so that it means the same with one
    pass and with two; the rest of them is the term `second_pass`. With exits, of which `weighting` tells the weights,
    `nll` is that of the last, and the term `exits` what the weighted mean of their cross entropies is above it."""
    targets = jnp.maximum(totals[0].targets, 1)
    lost, found, reads = passes_of(config, model, batch, keys, into, weighting)
    of_pass = [auxiliary_losses(config.model, reports, each) for reports, each in zip(found, totals, strict=True)]
    early = len(lost.nll) - len(found)
    nll = jnp.stack([nll_BT.sum() / targets for nll_BT in lost.nll[early:]]).mean()
    exits, correct = _exit_sums(lost, early), lost.correct[early:].sum()
    terms = functools.reduce(add, of_pass)
    loss = lost.total / targets + sum(terms.values())
    if config.train.consistency is not None:
        terms |= {"second_pass": nll, "consistency": config.train.consistency * lost.divergence / targets}
    if weighting is not None:
        distilled = lost.divergence / targets
        terms |= {"exits": lost.total / targets - nll - distilled}
        terms |= {"distillation": distilled} if config.model.exits.distills else {}
    return loss, ((nll, correct, terms, functools.reduce(add, found), exits), reads)


def _exit_sums(lost: HeadLosses, early: int) -> ExitSums:
    """Of the first `early` of what was passed to the head."""
    cross_entropy = jnp.stack([nll_BT.sum() for nll_BT in lost.nll])
    return ExitSums(cross_entropy=cross_entropy[:early], correct=lost.correct[:early])


def make_eval_step(config: ExperimentConfig, record: bool = False) -> Callable[[Variables, Microbatches], EvalReport]:
    """Sums over one evaluation batch `[1, B, …]`: no noise, evaluation capacity. With `record`, its decisions."""
    graph, _, _ = abstract_model(config.model)
    by_token = config.model.memory and config.model.head.of_tokens

    def eval_step(variables: Variables, microbatches: Microbatches) -> EvalReport:
        batch = Batch(**{name: rows[0] for name, rows in microbatches.items()})
        model = nnx.merge(graph, variables.params, variables.model_state)
        out = model(batch, mode="eval", record=record)
        lost = losses_in_evaluation(config, model, out, batch)
        nll_BT = lost.nll[-1]
        reports, recorded = split_recorded(scored(config.model, out.reports, nll_BT, batch))
        totals = _totals(microbatches)
        return EvalReport(
            cross_entropy_sum=nll_BT.sum(),
            correct=lost.correct[-1],
            targets=totals.targets,
            tokens=totals.tokens,
            rows=totals.rows,
            reports=without_measured(reports),
            by_token=by_target(config.model.vocab_size, nll_BT, batch) if by_token else None,
            exits=_exit_sums(lost, len(out.exits)),
            decisions=recorded.decisions if record else None,
            reads=probe_of(config.model, out.reads) if config.model.memory else None,
        )

    return eval_step


def losses_in_evaluation(config: ExperimentConfig, model: LanguageModel, out: ModelOutput, batch: Batch) -> HeadLosses:
    """What every exit loses, the model's own the last."""
    weighting = config.model.exits.weighting(jnp.int32(0), config.train.steps, config.model.num_layers)
    if weighting is None:
        return model.losses([out], batch)
    return model.exit_losses(out, batch, weighting)


def probe_of(config: ModelConfig, reads: Reads) -> Reads:
    """What the first tokens of every row read, where that depends on parameters."""
    late = lambda name: config.memory[name].address.known_at == "layer"  # noqa: E731
    return {
        position: {name: ids[..., :PROBE_TOKENS, :] for name, ids in found.items() if late(name)}
        for position, found in reads.items()
    }


def by_target(
    vocab_size: int, nll_BT: Float[Array, "B T"], batch: Batch
) -> tuple[Float[Array, " V"], Int[Array, " V"]]:
    """(Σ of the losses of targets that are this token, number of them) for every token."""

    def local(nll_BT: Array, targets_BT: Array, mask_BT: Array) -> tuple[Array, Array]:
        at_N = jnp.where(mask_BT, targets_BT, vocab_size).reshape(-1)
        into = lambda values, dtype: jnp.zeros(vocab_size, dtype).at[at_N].add(values.reshape(-1), mode="drop")  # noqa: E731
        return over_devices(into(nll_BT, jnp.float32), BATCH_AXES), over_devices(into(mask_BT, jnp.int32), BATCH_AXES)

    by_row = P(BATCH_AXES, None)
    run = on_each_device(local, (by_row, by_row, by_row), (P(), P()), check_vma=False)
    return run(nll_BT, batch.targets, batch.loss_mask)


def make_recorder(config: ExperimentConfig) -> Callable[[TrainState, Microbatches], dict[str, Decisions]]:
    """`(state, microbatches) -> decisions` by position that the step from `state` makes on these microbatches `[A, B,
    …]`: the same parameters, noise and capacity, forward only. The microbatches' rows stand one after the other."""
    graph, _, _ = abstract_model(config.model)

    def recorder(state: TrainState, microbatches: Microbatches) -> dict[str, Decisions]:
        key = pass_keys(config.train, state.step)[0]

        def decisions_of(arrays: Microbatches) -> dict[str, Decisions]:
            model = nnx.merge(graph, state.params, state.model_state)
            return split_recorded(model(Batch(**arrays), mode="train", key=key, record=True).reports)[1].decisions

        return jax.lax.map(decisions_of, microbatches)

    return recorder


def attended_keys(positions: Int[Array, "A B T"], segments: Int[Array, "A B T"], causal: bool) -> Float[Array, ""]:
    """Σ over unmasked tokens of the keys each may attend to: what attention costs on packed documents. Float32: it
    passes 2³¹."""
    keys = positions + 1 if causal else 2 * positions + 1  # n² = 1 + 3 + … for the n tokens of a document
    return jnp.sum(jnp.where(segments > 0, keys, 0), dtype=jnp.float32)


def _totals(microbatches: Microbatches) -> Totals:
    real = microbatches["segments"] > 0
    return Totals(
        targets=microbatches["loss_mask"].sum(dtype=jnp.int32),
        tokens=real.sum(dtype=jnp.int32),
        rows=real.any(-1).sum(dtype=jnp.int32),
        microbatches=real.shape[0],
    )


def _needs_counts(config: ExperimentConfig) -> bool:
    model = config.model
    blocks = [model.blocks[name] for name in set(model.positions.values())]
    if model.skim.counts_first or model.halting.counts_first:
        return True
    return any(block.counts_first for block in blocks)


def sum_over(fn: Callable[[Batch], Any], microbatches: Microbatches, listed: bool = False) -> Any:
    """Σ over microbatches of `fn(batch)`; one microbatch at a time is in memory. With `listed`, `fn` returns two: what
    is summed, and what is stacked along a leading axis A."""
    run = fn if listed else lambda batch: (fn(batch), None)
    split = lambda arrays: Batch(**arrays)  # noqa: E731
    first = split({name: rows[0] for name, rows in microbatches.items()})
    if next(iter(microbatches.values())).shape[0] == 1:
        total, each = run(first)
        each = jax.tree.map(lambda array: array[None], each)
    else:
        shapes = jax.eval_shape(lambda batch: run(batch)[0], first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)

        def step(sums: Any, arrays: Microbatches) -> tuple[Any, Any]:
            value, each = run(split(arrays))
            return add(sums, value), each

        total, each = jax.lax.scan(step, zeros, microbatches)
    return (total, each) if listed else total
