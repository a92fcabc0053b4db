"""What the fields of a schema dataclass may hold: a leaf, a dataclass, an entry of a registry, a mapping of entries."""

import dataclasses
import difflib
import functools
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

from sparsejax.base.config_leaf import is_leaf
from sparsejax.base.registry import Registry


@dataclass(frozen=True)
class Leaf:
    """One value of the type `hint`."""

    hint: Any


@dataclass(frozen=True)
class Group:
    """A nested dataclass."""

    schema: type


@dataclass(frozen=True)
class Choice:
    """One entry of a registry; in the ConfigDict a `name` and the entry's fields."""

    registry: Registry


@dataclass(frozen=True)
class Choices:
    """A mapping from free names to entries of a registry."""

    registry: Registry


Slot = Leaf | Group | Choice | Choices


@functools.cache
def slots(schema: type) -> dict[str, Slot]:
    """What each field of `schema` may hold, in order.

    Raises:
      TypeError: the annotation is none that a config can hold.
    """
    found: dict[str, Slot] = {}
    for field in dataclasses.fields(schema):
        if "registry" in field.metadata:
            kind = Choices if "mapping" in field.metadata else Choice
            found[field.name] = kind(field.metadata["registry"])
            continue
        hint = get_type_hints(schema)[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found[field.name] = Group(hint)
        elif is_leaf(hint):
            found[field.name] = Leaf(hint)
        else:
            raise TypeError(f"{schema.__name__}.{field.name}: a config cannot hold {hint}")
    return found


def defaults(schema: type) -> dict[str, Any]:
    """The default of each field of `schema` that has one."""
    found = {}
    for field in dataclasses.fields(schema):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def nearest_path(path: str, owner: str, keys: list[str], known: list[str]) -> str:
    """The path nearest to `path` below `owner`: its first part corrected, or a leaf of that name elsewhere, or ''."""
    prefix = f"{owner}." if owner else ""
    wrong, dot, rest = path.partition(".")
    corrected = [f"{prefix}{near}{dot}{rest}" for near in difflib.get_close_matches(wrong, keys)]
    last = path.rpartition(".")[2]
    names = [each.rpartition(".")[2] for each in known]
    close = difflib.get_close_matches(last, dict.fromkeys(names), n=1)  # `last` itself if some leaf has that name
    namesakes = [each for each, name in zip(known, names, strict=True) if name in close]
    elsewhere = difflib.get_close_matches(prefix + path, namesakes, n=1, cutoff=0)
    candidates = (
        [each for each in corrected if each in known],
        elsewhere if last in names else [],
        corrected if not rest else [],  # the name of a group
        elsewhere,
    )
    return next((found[0] for found in candidates if found), "")
