"""The training loop: from a loaded config and a folder to a trained model in it."""

import contextlib
import dataclasses
import os
from collections import deque
from pathlib import Path
from typing import Any, Optional

import jax
import numpy as np

from sparsejax.base.config import Loaded
from sparsejax.base.errors import ConfigError, RunError
from sparsejax.base.processes import barrier, from_first, is_first
from sparsejax.base.sharding import host_rows, make_mesh, mesh_platform, shard_batch, to_numpy
from sparsejax.base.writers import Writer, open_writer
from sparsejax.data.corpus import Corpus, open_corpus
from sparsejax.data.loader import batches, train_rows
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.clock import Clock
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.diagnose import first_bad_module
from sparsejax.train.evaluate import Evaluated, Evaluator
from sparsejax.train.metrics import Row, Window, bits_per_byte
from sparsejax.train.optimizer import learning_rate_at
from sparsejax.train.passages import Passages
from sparsejax.train.progress import Display
from sparsejax.train.record import changes_since, check_corpus, check_platform, write_config
from sparsejax.train.signals import StopOnSignal
from sparsejax.train.state import TrainState, abstract_state, make_optimizer, new_state
from sparsejax.train.step import Microbatches, StepReport, make_recorder, make_train_step
from sparsejax.train.summary import closing_lines
from sparsejax.train.trace import Recording
from sparsejax.train.upcycle import begin_from, check_resumed
from sparsejax.train.watch import Watch
from sparsejax.train.workdir import open_workdir


def _of_beginning(config: ExperimentConfig) -> dict[str, Any]:
    """Settings by key that count only in a run that begins with another's parameters."""
    blocks = config.model.blocks.items()
    return {f"model.blocks.{name}.{key}": at for name, block in blocks for key, at in block.of_beginning().items()}


def train(
    loaded: Loaded[ExperimentConfig],
    workdir: Path,
    allow_config_change: bool = False,
    init_from: Optional[Path] = None,
    stopped_status: int = 0,
) -> int:
    """Trains, or resumes what `workdir` holds, until `train.steps` or a signal. Returns the exit status.

    Args:
      init_from: the folder of a run whose parameters a new run begins with.
      stopped_status: the exit status where a signal came before the end.

    Raises:
      RequestError: config, corpus or a folder do not fit; nothing has been written then.
      RunError: the run failed: the disk refused, all checkpoints are damaged, losses stayed non-finite.
    """
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    corpus = open_corpus(config.data)
    check_corpus(config, corpus)
    mesh = make_mesh(config.mesh)
    decided = check_platform(config, mesh)
    saving = config.checkpoint
    begun, notes = None, []
    resumed = lambda: Checkpoints(workdir / "checkpoints", saving.every, saving.keep).steps()  # noqa: E731
    if init_from is None:
        for key, value in _of_beginning(config).items():
            if not resumed():
                raise ConfigError(key, f"{value!r} has no effect without --init-from=RUN")
    elif resumed():
        notes = [check_resumed(workdir, init_from)]
    else:
        with jax.set_mesh(mesh):
            begun = begin_from(init_from, config, corpus, mesh)
        notes = begun.lines()
    with open_workdir(workdir) as folder, jax.set_mesh(mesh), StopOnSignal() as stop:
        checkpoints = Checkpoints(folder / "checkpoints", saving.every, saving.keep, saving.keep_every)
        with contextlib.closing(checkpoints), contextlib.closing(_display()) as display:
            resume_step = checkpoints.latest_good()
            changed = lambda: changes_since(folder, loaded, corpus.info, allow_config_change)  # noqa: E731
            changes = [] if resume_step is None else from_first("what changed in the config", changed)
            run = _Run(config, corpus, mesh, folder, checkpoints, display, stop)
            state = run.begin(resume_step) if begun is None else begun.state
            write_config(folder, loaded, corpus.info)  # not before the checkpoint has been found to fit
            if begun is not None:
                begun.write(folder)
            for line in [*decided, *notes, *(f"changed: {line}" for line in changes)]:
                display.note(line)
            return 0 if run.go(state, resume_step or 0) else stopped_status


def _display() -> Display:
    """That of the run, in the first process; the others show nothing."""
    return Display() if is_first() else Display(open(os.devnull, "w"))


def steps_ahead() -> int:
    """How many steps may still run while the host goes on with the next.

    None on CPU, where the host's work would only take the step's cores and two executions with collectives in flight
    can deadlock."""
    return 0 if mesh_platform() == "cpu" else 1


class _Run:
    """One process's part in one run: the state it carries, and the straight line through its steps."""

    def __init__(
        self,
        config: ExperimentConfig,
        corpus: Corpus,
        mesh: jax.sharding.Mesh,
        folder: Path,
        checkpoints: Checkpoints,
        display: Display,
        stop: StopOnSignal,
    ):
        self.config, self.corpus, self.mesh, self.folder = config, corpus, mesh, folder
        self.checkpoints, self.display, self.stop = checkpoints, display, stop
        self.tx = make_optimizer(config)
        self.learning_rate = learning_rate_at(config.optimizer, config.train.steps)
        self.evaluator = Evaluator(config, corpus, mesh)
        self.passages = Passages(config, corpus, mesh)
        self.recorder = jax.jit(make_recorder(config))
        self.window = Window(config.model)
        self.clock = Clock()
        self.tokens, self.flops, self.nonfinite, self.evaluated = 0, 0.0, 0, 0
        self.watch = Watch(config.model)

    def begin(self, resume_step: Optional[int]) -> TrainState:
        """A new state, or that of a checkpoint. Raises `RequestError` when the checkpoint is of another model."""
        if resume_step is None:
            return jax.block_until_ready(new_state(self.config, self.tx))
        target = abstract_state(self.config, self.tx, self.mesh)
        state, progress, step = self.checkpoints.restore(target, resume_step)
        self.tokens, self.flops, self.evaluated = progress["tokens"], progress["flops"], progress["evaluated"]
        self.clock.before = progress["seconds"]
        self.window.resume(progress["window"])
        self.evaluator.resume(progress["probe"])
        self.nonfinite = int(state.nonfinite)
        self.watch.resume(self.folder, step)
        self.display.note(f"resumed from checkpoint {step} ({self.tokens:,} tokens seen)")
        return state

    def go(self, state: TrainState, first: int) -> bool:
        """From the state after step `first` to the end, or to a signal. Returns whether the run is finished."""
        steps = self.config.train.steps
        writer = open_writer(self.folder, first, self.config.train.tensorboard)
        with contextlib.closing(writer):
            step = first
            if first >= steps:
                self.display.note(f"finished: this run has done its {first} steps (train.steps={steps})")
            else:
                state, step = self._steps(state, first, writer)
                self._save(step, state)  # before the evaluation: it may be long, a preemption sudden
            evaluated = None if self.stop.requested else self._evaluate(state, step, writer)
        if evaluated is None:
            self.display.note(f"stopped by {self.stop.name} after step {step}, saved; the same command resumes there")
            return False
        if first < steps:
            self.display.update(evaluated.row)
        self.display.close()
        for line in closing_lines(
            _shortest(self.folder), evaluated.row, evaluated.routing, self.config.model.generates
        ):
            self.display.note(line)
        return True

    def _steps(self, state: TrainState, first: int, writer: Writer) -> tuple[TrainState, int]:
        """Steps first + 1 … train.steps, or fewer when asked to stop. Returns the state and the last step's number."""
        config, train = self.config, self.config.train
        self.display.start(train.steps, first)
        if self._evaluation_due(first):  # the run was stopped before it came to it
            self._show(self._evaluate(state, first, writer))
        data = batches(
            train_rows(self.corpus, config.data, train.seed),
            batch_size=config.data.batch_size,
            start_step=first,
            row_indices=host_rows(self.mesh, config.data.batch_size, train.accumulation),
            prefetch=config.data.prefetch,
            workers=config.data.workers,
        )
        step, in_flight, ahead = first, deque[tuple[StepReport, Microbatches]](), steps_ahead()
        with contextlib.closing(data), contextlib.ExitStack() as tracing:
            compiled = None
            self.clock.start()
            for step in range(first + 1, train.steps + 1):
                with self.clock.waiting():
                    batch = shard_batch(next(data), self.mesh, train.accumulation)
                if compiled is None:
                    with self.clock.compiling():
                        step_fn = jax.jit(make_train_step(config, self.tx), donate_argnums=0)
                        compiled = step_fn.lower(state, batch).compile()
                        barrier("the step is compiled")  # or those who are done would wait on the wire
                if train.profile and step == train.profile[0] and is_first():
                    tracing.enter_context(jax.profiler.trace(str(self.folder / "profile")))
                if step in train.trace:
                    with self.clock.paused():
                        self._trace(step, state, batch)
                state, report = compiled(state, batch)
                in_flight.append((report, batch))
                self._account(in_flight, state, ahead)
                last = self.stop.look() or step == train.steps
                row_due = step == 1 or step % train.log_every == 0 or last
                trace_ends = step in train.profile[1:]
                saving = self.checkpoints.due(step)
                evaluating = self._evaluation_due(step)
                if row_due or trace_ends or saving or evaluating:
                    self._account(in_flight, state)
                if trace_ends:
                    tracing.close()
                if row_due:
                    self._log(step, writer)
                if last:
                    break
                with self.clock.paused():
                    if saving:  # first, for the same reason as at the end
                        self.checkpoints.save(step, state, self._progress())
                    if evaluating:
                        self._show(self._evaluate(state, step, writer))
                if self.stop.requested:  # while it was evaluated or saved
                    if not row_due:
                        self._log(step, writer)
                    break
        return state, step

    def _account(self, in_flight: deque[tuple[StepReport, Microbatches]], state: TrainState, leave: int = 0) -> None:
        """Waits for the steps in flight, but for the last `leave`, and adds their sums."""
        while len(in_flight) > leave:
            self._add(*in_flight.popleft(), state)

    def _add(self, report: StepReport, batch: Microbatches, state: TrainState) -> None:
        """Waits for one step and adds its sums. `state` is the newest one."""
        tokens, flops = self.window.add(report)
        self.tokens += tokens
        self.flops += flops
        self.clock.step(tokens)
        if bool(report.finite):
            return
        self.nonfinite += 1
        step, streak = int(report.step), int(report.nonfinite_streak)
        self.display.note(f"step {step}: loss or gradient is not finite; the step is skipped ({streak} in a row)")
        if streak >= self.config.train.max_nonfinite:
            cause = first_bad_module(self.config, state, batch, step)
            raise RunError(f"{streak} steps in a row were not finite (train.max_nonfinite): {cause}")

    def _trace(self, step: int, state: TrainState, batch: Microbatches) -> None:
        """Writes the decisions of the step that is about to be made."""
        decisions = jax.block_until_ready(self.recorder(state, batch))
        recording = Recording()
        for part in range(self.config.train.accumulation):
            rows, of_part = jax.tree.map(lambda array: to_numpy(array[part]), (batch, decisions))
            recording.append(self.config.model, rows, of_part)
        if not is_first():
            return
        folder = self.folder / "traces"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        recording.trace(self.config, "train", step).save(folder / f"{step}.npz")

    def _log(self, step: int, writer: Writer) -> None:
        row, arrays = self.window.take()
        if self.config.data.task.every_token and self.corpus.tokenizer.is_bytes:
            row["bits_per_byte"] = bits_per_byte(row["cross_entropy"])
        row = self._row(step, "train", row) | self.clock.take()
        for alert in self.watch(row, arrays):
            self.display.note(f"step {step}: {alert.line}")
        writer.write(row, {"routing": arrays})
        self.display.update(row)

    def _evaluation_due(self, step: int) -> bool:
        return step % self.config.eval.every == 0 and step > self.evaluated

    def _show(self, evaluated: Optional[Evaluated]) -> None:
        if evaluated is not None:
            self.display.update(evaluated.row)

    def _evaluate(self, state: TrainState, step: int, writer: Writer) -> Optional[Evaluated]:
        """What it found, with the place in the run, which it also writes unless the files have it; None when a signal
        came."""
        evaluated = self.evaluator(state.variables, self.stop.look)
        if evaluated is None:
            return None
        row = self._row(step, "eval", evaluated.row) | {"seconds": self.clock.seconds}
        writer.write(row, {"evaluations": evaluated.sums, "passages": self.passages(state.variables)})
        self.evaluated = step
        return dataclasses.replace(evaluated, row=row)

    def _row(self, step: int, split: str, measured: Row) -> Row:
        """What was measured, after its place in the run and before what the run has spent so far."""
        rate = np.asarray(
            self.learning_rate(step - 1 - self.nonfinite)
        ).item()  # a skipped step does not advance the schedule
        spent = {"tokens": self.tokens, "flops": self.flops, "learning_rate": rate}
        return {"step": step, "split": split, **measured, **spent, "nonfinite_steps": self.nonfinite}

    def _save(self, step: int, state: TrainState) -> None:
        """Returns when the checkpoint is on the disk."""
        self.checkpoints.save(step, state, self._progress())
        self.checkpoints.wait()

    def _progress(self) -> dict[str, Any]:
        """What the next process needs to know beside the state."""
        seconds = self.clock.seconds
        spent = {"tokens": self.tokens, "flops": self.flops, "seconds": seconds, "evaluated": self.evaluated}
        return spent | {"window": self.window.saved(), "probe": self.evaluator.saved()}


def _shortest(folder: Path) -> Path:
    """Relative to the current folder, where that is shorter to type."""
    with contextlib.suppress(ValueError):
        return folder.relative_to(Path.cwd())
    return folder
