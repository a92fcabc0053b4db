"""Configs from the outside: files, command-line overrides, where each value came from, and `config.json`.

    loaded = load(ExperimentConfig, "configs/quickstart.py:large", [("train.steps", "50"), ("optimizer", "adafactor")])
    loaded.config.train.steps, loaded.provenance["train.steps"]     # 50, 'command line'

The bridge between dataclasses and ConfigDicts is in `config_tree`, questions to a built config in `config_view`; their
functions are offered here too.
"""

import json
import re
import runpy
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ml_collections import ConfigDict

from sparsejax.base.config_leaf import parse
from sparsejax.base.config_schema import Choice, Group, Leaf, defaults, slots
from sparsejax.base.config_tree import NamedNodes, Node, Tree, choose, from_config_dict, settle, to_config_dict
from sparsejax.base.config_view import ABSENT, diff, leaves, unused, walk
from sparsejax.base.errors import ConfigError, RequestError, did_you_mean

__all__ = [
    "ABSENT",
    "Loaded",
    "choose",
    "diff",
    "from_config_dict",
    "from_json",
    "leaves",
    "load",
    "to_config_dict",
    "to_json",
    "unused",
]

T = TypeVar("T")

DEFAULT, FILE, COMMAND_LINE = "default", "file", "command line"


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[T]):
    """A config and where its values came from."""

    config: T
    provenance: dict[str, str]  # leaf path -> 'default' (equal to the schema's), 'file' or 'command line'
    environment: dict[str, Any] = field(default_factory=dict)  # what a run recorded about itself, if read from JSON


def load(
    schema: type[T],
    file: str | None,
    overrides: Iterable[tuple[str, str]] = (),
    edit: Callable[[ConfigDict], object] = lambda config: None,
) -> Loaded[T]:
    """The config of `file` (`FILE.py`, `FILE.py:arg` or a run's `config.json`; None: the defaults) under `overrides`.

    Args:
      schema: the frozen dataclass to build.
      file: a Python file defines `get_config()` or `get_config(arg)` and returns a ConfigDict.
      overrides: (dotted path, text) as on the command line, in any order; of one path given twice the last counts.
      edit: changes the ConfigDict of `file` before them, as the file itself could have.

    Raises:
      RequestError: one line that names what is wrong, where, and what is allowed.
    """
    recorded: dict[str, str] = {}
    environment: dict[str, Any] = {}
    if file is None:
        node = Node(schema, defaults(schema))
    elif file.endswith(".json"):
        node, recorded, environment = _read_json(schema, _text(_existing(file)), file)
    else:
        node = _run_file(schema, file)
    edit(node)
    before = node.to_dict()
    assigned = {_override(node, path, text) for path, text in sorted(overrides, key=_choices_first)}
    config = from_config_dict(schema, node)
    provenance = {}
    for path, value, default in walk(config, None):
        if path in assigned:
            provenance[path] = COMMAND_LINE
        elif path in recorded and _at(before, path) == value:
            provenance[path] = recorded[path]
        else:
            provenance[path] = DEFAULT if value == default else FILE
    values = leaves(config)
    for path, reason in unused(config).items():
        if provenance[path] != DEFAULT:
            raise ConfigError(path, f"{values[path]!r} has no effect: {reason}")
    return Loaded(config=config, provenance=provenance, environment=environment)


def to_json(config: Any, provenance: Mapping[str, str], environment: Mapping[str, Any]) -> str:
    """The text of `config.json`: every value, where it came from, and what else the run depended on."""
    values = to_config_dict(config).to_dict()
    record = {"config": values, "provenance": dict(provenance), "environment": dict(environment)}
    return json.dumps(record, indent=2) + "\n"


def from_json(schema: type[T], text: str, name: str = "config.json") -> Loaded[T]:
    """What `to_json` wrote. Keys that the schema gained since keep their defaults; keys that it lost are errors.

    Raises:
      RequestError: the text is no such record; `name` says in the message what it is.
    """
    node, provenance, environment = _read_json(schema, text, name)
    return Loaded(config=from_config_dict(schema, node), provenance=provenance, environment=environment)


def _choices_first(override: tuple[str, str]) -> tuple[int, bool]:
    """Sorts outer paths before inner ones, and `name` before its siblings: an entry is picked before its fields."""
    path, _ = override
    return path.count("."), not path.endswith(".name")


def _override(root: Node, path: str, text: str) -> str:
    """Sets the leaf at `path` to what `text` spells; returns the path of the leaf that was set.

    A string for a choice picks its entry, and a new name in a mapping of choices makes one.
    """
    node: Any = root
    *above, last = path.split(".")
    for depth, key in enumerate(above):
        if isinstance(node, NamedNodes) and key not in node and [*above[depth + 1 :], last] == ["name"]:
            node[key] = text
            return path
        if key not in node:
            raise _absolute(node, path, depth)
        if not isinstance(node[key], Tree):
            raise ConfigError(path, f"no such key: {'.'.join(above[: depth + 1])} is a single value")
        node = node[key]
    if isinstance(node, NamedNodes):
        node[last] = {"name": text}
        return f"{path}.name"
    if node._registry is not None and last == "name":
        node[last] = text
        return path
    slot = slots(node._schema).get(last)
    if slot is None:
        raise _absolute(node, path, len(above))
    if isinstance(slot, Choice):
        node[last] = {"name": text}
        return f"{path}.name"
    if not isinstance(slot, Leaf):
        raise ConfigError(path, f"{text!r} is not allowed; it is a group, set one of its own: {', '.join(node[last])}")
    try:
        node[last] = parse(slot.hint, text)
    except ValueError as error:
        raise ConfigError(path, str(error)) from None
    return path


def _absolute(node: Tree, path: str, depth: int) -> ConfigError:
    error = node._unknown(".".join(path.split(".")[depth:]))
    return ConfigError(path, error.message)


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return ABSENT
        values = values[key]
    return values


def _existing(file: str) -> Path:
    path = Path(file)
    try:
        if path.is_file():
            return path
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise RequestError(f"--config={file}: could not be read: {error.strerror}") from None
    siblings = [str(each) for each in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
    raise RequestError(f"--config={file}: no such file.{did_you_mean(file, siblings)}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not the config.json of a run: it is not UTF-8 text") from None
    except OSError as error:
        raise RequestError(f"{path}: could not be read: {error.strerror}") from None


def _read_json(schema: type, text: str, name: str) -> tuple[Node, dict[str, str], dict[str, Any]]:
    try:
        record = json.loads(text)
        missing = [key for key in ("config", "provenance", "environment") if key not in record]
        if missing:
            raise ValueError(f"it has no {' and no '.join(map(repr, missing))}")
        values, provenance, environment = record["config"], record["provenance"], record["environment"]
        return settle(Group(schema), values, None), dict(provenance), dict(environment)
    except ConfigError as error:
        raise RequestError(f"{name}: {error}") from None
    except (ValueError, TypeError) as error:
        raise RequestError(f"{name}: not the config.json of a run: {error}") from None


def _run_file(schema: type, file: str) -> Node:
    """The ConfigDict that the `get_config` of a Python file returns."""
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", file)
    if not match:
        raise RequestError(f"--config={file}: must be FILE.py, FILE.py:arg or a run's config.json")
    path, arg = match.groups()
    try:
        _existing(path)
        scope = runpy.run_path(path)  # not an import, which would leave bytecode beside a config that may be refused
        if "get_config" not in scope:
            raise RequestError(f"{path}: defines no get_config()")
        config = scope["get_config"]() if arg is None else scope["get_config"](arg)
        if not isinstance(config, ConfigDict):
            raise RequestError(
                f"{path}: get_config() returned {config!r:.50}, not what sparsejax.default_config() makes"
            )
        return settle(Group(schema), config, None)
    except RequestError as error:
        raise RequestError(f"{_line(error, path)}{error}") from None
    except Exception as error:  # the code of a config file may raise anything
        asked = "" if arg is None else f"get_config({arg!r}): "
        raise RequestError(f"{_line(error, path) or f'{path}: '}{asked}{type(error).__name__}: {error}") from None


def _line(error: Exception, path: str) -> str:
    """'FILE:LINE: ' of the last line of `path` that led to `error`, or ''."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}: " if lines else ""
