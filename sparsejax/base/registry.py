"""A registry is a dict literal from the name a config uses to the frozen dataclass that name stands for.

The dataclass holds the entry's own settings and is its code, too: a score is called on logits, a block spec builds
its block. A schema field that picks an entry is written `score: Score = choice(SCORES, "softmax")`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sparsejax.base.errors import ConfigError, did_you_mean


class Registry(Mapping[str, type]):
    """Names of one kind of part. Looking up a name that is not there raises a `ConfigError` that lists those that
    are."""

    def __init__(self, kind: str, entries: Mapping[str, type]):
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> type:
        if name not in self._entries:
            raise ConfigError(
                "", f"unknown {self.kind} {name!r}; known: {', '.join(self)}.{did_you_mean(str(name), self)}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, value: object) -> str:
        """The name under which the class of `value` is registered."""
        for name, entry in self._entries.items():
            if type(value) is entry:
                return name
        raise ConfigError("", f"{type(value).__name__} is not a registered {self.kind}")


def choice(registry: Registry, default: str, **settings: Any) -> Any:
    """A dataclass field that holds one entry of `registry`: by default the one named, with these settings."""
    return dataclasses.field(default_factory=lambda: registry[default](**settings), metadata={"registry": registry})


def choices(registry: Registry, **defaults: object) -> Any:
    """A dataclass field that holds a mapping from free names to entries of `registry`."""
    return dataclasses.field(default_factory=lambda: dict(defaults), metadata={"registry": registry, "mapping": True})
