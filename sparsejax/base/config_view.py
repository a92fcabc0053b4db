"""Looking at a built config: its leaves, how two configs differ, and which settings have no effect."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from sparsejax.base.config_schema import Choices, Group, Leaf, defaults, slots


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()
"""Stands in `diff` for the value of a leaf that one side does not have."""


def leaves(config: Any) -> dict[str, Any]:
    """Every leaf by its dotted path, in the order of the schema; a choice's entry is the leaf `PATH.name`."""
    return {path: value for path, value, _ in walk(config, None)}


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The leaves in which two configs differ, as (path, old value, new value)."""
    before, after = leaves(old), leaves(new)
    pairs = {path: (before.get(path, ABSENT), after.get(path, ABSENT)) for path in {**before, **after}}
    return [(path, a, b) for path, (a, b) in pairs.items() if a != b]


def unused(config: Any) -> dict[str, str]:
    """Leaf path -> why it has no effect at present, as the dataclasses' own `unused` methods say."""
    found: dict[str, str] = {}
    paths = leaves(config)
    for prefix, node in _nodes(config):
        reasons = node.unused() if hasattr(node, "unused") else {}
        for key, reason in reasons.items():
            below = [path for path in paths if f"{path}.".startswith(f"{prefix}{key}.")]
            found.update((path, reason) for path in below)
    return found


def walk(config: Any, reference: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, default) of every leaf. `reference` holds the defaults if it is of the same class as `config`."""
    known = vars(reference) if type(reference) is type(config) else defaults(type(config))
    for key, slot in slots(type(config)).items():
        path, value, default = prefix + key, getattr(config, key), known.get(key, MISSING)
        if isinstance(slot, Leaf):
            yield path, value, default
        elif isinstance(slot, Group):
            yield from walk(value, default, f"{path}.")
        else:
            entries = {path: (value, default)}
            if isinstance(slot, Choices):
                standard = default if isinstance(default, Mapping) else {}
                entries = {f"{path}.{name}": (entry, standard.get(name, MISSING)) for name, entry in value.items()}
            for place, (entry, standard) in entries.items():
                name_of = slot.registry.name_of
                yield f"{place}.name", name_of(entry), MISSING if standard is MISSING else name_of(standard)
                yield from walk(entry, standard, f"{place}.")


def _nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path with a final dot, instance) of every dataclass in `config`, itself first."""
    yield prefix, config
    for key, slot in slots(type(config)).items():
        value = getattr(config, key)
        if isinstance(slot, Choices):
            for name, entry in value.items():
                yield from _nodes(entry, f"{prefix}{key}.{name}.")
        elif not isinstance(slot, Leaf):
            yield from _nodes(value, f"{prefix}{key}.")
