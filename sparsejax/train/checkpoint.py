"""Checkpoints: the state of a run in `DIRECTORY/STEP/`, written in the background, restored onto any mesh.

Orbax writes the arrays and renames the finished folder into place. Just before that, the checksums of all files are put
into it, and no run continues from a checkpoint whose files do not agree with them.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from sparsejax.base.errors import RequestError, RunError
from sparsejax.base.processes import barrier, from_first, is_first
from sparsejax.base.shapes import form
from sparsejax.train.checksums import find_damage, write_checksums

State = TypeVar("State")
log = logging.getLogger(__name__)

UNFINISHED = ".orbax-checkpoint-tmp"  # what orbax appends to the name of a folder it is still writing
SHOWN = 3  # names in an error message


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and all whose step is a multiple of `keep_every`.

    Nothing is created or changed before the first `save`, so a finished run's folder can be read-only. In a job of
    several processes each of them makes every call. An object is used by one thread.
    """

    def __init__(self, directory: str | os.PathLike, every: int, keep: int, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self.every, self.keep, self.keep_every = every, keep, keep_every
        self._manager: ocp.CheckpointManager | None = None
        self._saving = -1  # the step being written, or written last
        self._damage: dict[int, str] = {}  # step -> what is wrong with it, '' for nothing; of those looked at

    def due(self, step: int) -> bool:
        """Whether a checkpoint is planned after step `step`."""
        return step % self.every == 0

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, good or damaged, ascending."""
        return sorted(int(path.name) for path in self._folders() if path.name.isdecimal())

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> bool:
        """Starts to write `state` (a pytree of arrays, free for donation on return) and `progress` (JSON values).

        False when the step has its checkpoint already. Raises `RunError` when this or the last one cannot be written.
        """
        self.wait()
        manager = self._writer()
        if step in manager.all_steps():
            return False
        self._saving = step
        arrays = ocp.args.StandardSave(named_leaves(state))
        with self._as_run_error():
            manager.save(
                step, args=ocp.args.Composite(state=arrays, progress=ocp.args.JsonSave(dict(progress))), force=True
            )
        self._damage[step] = ""
        return True

    def wait(self) -> None:
        """Returns when nothing is being written. Raises `RunError` when the last checkpoint could not be."""
        if self._manager is not None:
            with self._as_run_error():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, and ends the background threads. The object can be used again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                with self._as_run_error():
                    manager.wait_until_finished()
            finally:
                manager.close()

    def latest_good(self) -> int | None:
        """The newest step whose files are whole, None when there is no checkpoint at all; names those it passes over.

        Raises `RunError` when every checkpoint is damaged: to start from scratch is for the user to decide.
        """
        return from_first("the newest whole checkpoint", self._newest_whole)

    def restore(
        self, abstract_state: State, step: int | None = None, partial: bool = False
    ) -> tuple[State, dict[str, Any], int]:
        """(state, progress, step) of checkpoint `step`, by default of the newest good one.

        `abstract_state` has a `jax.ShapeDtypeStruct` with its sharding for every array, on any mesh. With `partial` it
        may lack arrays that the checkpoint has (an evaluation wants no optimizer state). Raises `RequestError` when
        there is no such checkpoint or its arrays are others, `RunError` when it is damaged.
        """
        if step is None:
            step = self.latest_good()
            if step is None:
                raise RequestError(f"no checkpoint in {self.directory}")
        elif step not in self.steps():
            raise RequestError(
                f"no checkpoint of step {step} in {self.directory}; there are: {_first(self.steps(), 20)}"
            )
        elif damage := from_first(f"what is wrong with checkpoint {step}", lambda: self._damage_of(step)):
            raise RunError(f"checkpoint {step} in {self.directory} is damaged: {damage}")
        folder = self.directory / str(step)
        target = named_leaves(abstract_state)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
            _check_fit(step, reader.metadata(folder).item_metadata["state"].tree, target, partial)
            arrays = ocp.args.PyTreeRestore(
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
            )
            saved = reader.restore(folder, args=ocp.args.Composite(state=arrays, progress=ocp.args.JsonRestore()))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [saved["state"][name] for name in target])
        return state, saved["progress"], step

    def _folders(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.is_dir()] if self.directory.is_dir() else []

    def _newest_whole(self) -> int | None:
        for path in self._folders():
            if path.name.endswith(UNFINISHED):
                log.warning("checkpoint %s was never finished; it is not used", path.name.removesuffix(UNFINISHED))
        for step in reversed(self.steps()):
            if not self._damage_of(step):
                return step
            log.warning("checkpoint %d is damaged and not used: %s", step, self._damage_of(step))
        if self.steps():
            raise RunError(f"no checkpoint in {self.directory} can be used: {self._describe_damage()}")
        return None

    def _damage_of(self, step: int) -> str:
        if step not in self._damage:
            self._damage[step] = find_damage(self.directory / str(step))
        return self._damage[step]

    def _describe_damage(self) -> str:
        return _first([f"{step}: {damage}" for step, damage in sorted(self._damage.items(), reverse=True) if damage])

    def _writer(self) -> ocp.CheckpointManager:
        """The manager that writes, made when it is first needed, with the damaged checkpoints out of its way."""
        if self._manager is None:
            if is_first():
                for step in [step for step, damage in self._damage.items() if damage]:
                    self._set_aside(step)
            barrier("damaged checkpoints are set aside")  # before anyone lists the steps
            _silence_repeated_errors()
            kept: list[policies.PreservationPolicy] = [policies.LatestN(self.keep)]
            if self.keep_every:
                kept.append(policies.EveryNSteps(self.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
            with self._as_run_error():
                self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, which would count among the kept ones and block its step, to `STEP.damaged`."""
        damaged = self.directory / f"{step}.damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        (self.directory / str(step)).rename(damaged)
        del self._damage[step]

    def _seal(self) -> None:
        """Called in the background, in the first process, when all have written their files and the folder is about to
        be renamed."""
        (folder,) = self.directory.glob(f"{self._saving}{UNFINISHED}*")
        write_checksums(folder)

    @contextlib.contextmanager
    def _as_run_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            for path in self.directory.glob(f"{self._saving}{UNFINISHED}*") if is_first() else ():
                shutil.rmtree(path, ignore_errors=True)
            self._damage.pop(self._saving, None)
            raise RunError(f"checkpoint {self._saving} could not be written: {_cause(error)}") from error


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, such as `params/blocks/0/moe/experts/w_in`, in the order of its flattening."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves
    }


def _check_fit(step: int, saved: Mapping[str, Any], target: Mapping[str, Any], partial: bool) -> None:
    """Raises `RequestError` when the arrays of checkpoint `step` are not those of the model."""
    problems = [f"it lacks {name} {form(leaf)}" for name, leaf in target.items() if name not in saved]
    problems += [
        f"{name} is {form(saved[name])}, not {form(leaf)}"
        for name, leaf in target.items()
        if name in saved and form(saved[name]) != form(leaf)
    ]
    if not partial:
        problems += [f"its {name} {form(leaf)} has no place" for name, leaf in saved.items() if name not in target]
    if problems:
        raise RequestError(f"checkpoint {step} is of another model: {_first(problems)}")


def _first(items: list, count: int = SHOWN) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(map(str, items[:count])) + more


def _cause(error: BaseException) -> str:
    """One line: the operating system's words when the error came from there, else the start of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's errors are ValueErrors
        return os.strerror(int(code[1]))
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _silence_repeated_errors() -> None:
    """A failed save is raised by us, once. Its libraries tell it again for every array that could not be written.

    Orbax logs the trace, asyncio each task that nobody awaits any more, and tensorstore's threads print that the loop
    they would report to is closed.
    """
    logging.getLogger("absl").addFilter(_not_an_orbax_error)
    logging.getLogger("asyncio").addFilter(_not_an_abandoned_task)
    sys.unraisablehook = _tell_all_but_closed_loops


def _not_an_orbax_error(record: logging.LogRecord) -> bool:
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _not_an_abandoned_task(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


_tell_unraisable = sys.unraisablehook


def _tell_all_but_closed_loops(unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        _tell_unraisable(unraisable)
