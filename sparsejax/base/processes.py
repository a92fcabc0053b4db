"""What the processes of one job say to each other.

Through the coordination service of `jax.distributed`, which lives in the first process and has barriers and a store of
keys and values. A process alone needs none of it: it passes every barrier, and hears at once what the first says.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import jax
from jax._src import distributed

from sparsejax.base.errors import RequestError, RunError

T = TypeVar("T")

PATIENCE = 600
"""Seconds that the others are waited for: they may still read a corpus, or compile."""
PREFIX = "sparsejax/"

_meetings = itertools.count()  # numbers barriers and what the first says: all processes come to them in the same order


def process_id() -> int:
    """The number of this process, from 0. Starts no backend, unlike `jax.process_index`."""
    return distributed.global_state.process_id


def num_processes() -> int:
    return distributed.global_state.num_processes


def is_first() -> bool:
    """Whether this process is the one that writes the files which all share."""
    return process_id() == 0


def store() -> Any:
    """The client of the coordination service."""
    return distributed.global_state.client


def barrier(name: str, patience: float = PATIENCE) -> None:
    """Returns when every process has come here.

    Raises:
      RunError: some have not within `patience` seconds; it names them.
    """
    if num_processes() == 1:
        return
    key = f"{PREFIX}{next(_meetings)}/{name}"
    store().key_value_set(f"{key}/{process_id()}", "is here")
    try:
        store().wait_at_barrier(key, int(1000 * patience))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        here = {int(each.rpartition("/")[2]) for each, _ in store().key_value_dir_get(key)}
        missing = ", ".join(str(number) for number in range(num_processes()) if number not in here)
        raise RunError(f"barrier {name!r}: process {missing} did not come within {patience:g} s") from error


def from_first(name: str, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, a JSON value; nobody else calls it.

    Raises:
      RunError: the first process has not said it within `PATIENCE` seconds.
    """
    if num_processes() == 1:
        return make()
    key = f"{PREFIX}{next(_meetings)}/{name}"
    if is_first():
        value = make()
        store().key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(store().blocking_key_value_get(key, 1000 * PATIENCE))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise RunError(f"{name}: process 0 has not said it within {PATIENCE} s") from error


def check_same(name: str, value: str) -> None:
    """Raises `RequestError` in the processes whose `value` is not that of the first."""
    if from_first(name, lambda: value) != value:
        raise RequestError(f"process {process_id()} has another {name} than process 0")


def set_once(key: str, value: str) -> bool:
    """Sets a key that all processes see; False when one of them has set it before."""
    try:
        store().key_value_set(PREFIX + key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


def peek(key: str) -> Optional[str]:
    """The value of a key, None while it has none."""
    try:
        return store().key_value_try_get(PREFIX + key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):  # to take this for None could part the processes
            raise
        return None
