"""The bridge between frozen dataclasses (the schema, where defaults live) and the ConfigDict that config files edit.

`to_config_dict` turns an instance into nested `Node`s: locked ConfigDicts that know their dataclass, so that a misspelt
key or a wrong type is refused on the line that sets it. `from_config_dict` builds the dataclasses back.

Names of the ConfigDicts here start with an underscore, since the fields of a schema (`data.path`) are attributes, too.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from sparsejax.base.config_leaf import check, describe
from sparsejax.base.config_schema import Choice, Group, Leaf, Slot, defaults, nearest_path, slots
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry

T = TypeVar("T")


class UnknownKey(ConfigError, AttributeError):
    """A key that the schema does not have; an AttributeError, too, so that `hasattr` works on a config."""


class Tree(ConfigDict):
    """A ConfigDict that knows where in the config it stands: the errors of `node[key] = value` name the whole path.

    Everything else in this file raises errors relative to the node at hand.
    """

    _parent: tuple["Tree", str] | None
    _registry: Any  # of whose entries this holds one (Node) or many (NamedNodes); None for a plain group

    def __init__(self, registry: Registry | None):
        super().__init__(type_safe=False, sort_keys=False)  # the schema checks types, more strictly
        object.__setattr__(self, "_registry", registry)
        object.__setattr__(self, "_parent", None)

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            self._put(key, value)
        except ConfigError as error:
            raise (error.below(self._where()) if self._where() else error) from None

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key in self._fields:
            return super().__getattr__(key)
        error = self._unknown(key)
        raise UnknownKey(".".join(filter(None, (self._where(), error.key))), error.message)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tree":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _fields={}, _parent=None)
        for key, value in self.items():
            copied._attach(key, copy.deepcopy(value, memo))
        return copied

    def copy_and_resolve_references(self, visit_map: Any = None) -> "Tree":
        return copy.deepcopy(self)

    def _put(self, key: str, value: Any) -> None:
        raise NotImplementedError

    def _attach(self, key: str, value: Any) -> None:
        self._fields[key] = value
        if isinstance(value, Tree):
            object.__setattr__(value, "_parent", (self, key))

    def _where(self) -> str:
        """The dotted path of this node from the outermost node that holds it."""
        if self._parent is None:
            return ""
        above, key = self._parent
        return f"{above._where()}.{key}" if above._where() else key

    def _known(self) -> list[str]:
        return list(self._fields)

    def _paths(self) -> Iterator[str]:
        """Every leaf below this node, as a dotted path relative to it."""
        for key, value in self._fields.items():
            yield from (f"{key}.{path}" for path in value._paths()) if isinstance(value, Tree) else (key,)

    def _unknown(self, path: str) -> ConfigError:
        """The error for `path` below this node, whose first part is no key of it; suggests the nearest path."""
        root, first = self, path.partition(".")[0]
        while root._parent is not None:
            root = root._parent[0]
        config = "config." if root._registry is None else ""  # else it is what `choose` makes, not in a config yet
        paths = list(root._paths())
        # Where the whole path resembles none, its first part may: `modl.d` is no leaf, but `model` is a group.
        near = next(filter(None, (nearest_path(p, self._where(), self._known(), paths) for p in (path, first))), "")
        hint = f" Did you mean '{config}{near}'?" if near else ""
        owner = f"{config}{self._where()}".rstrip(".") or "it"
        return ConfigError(path, f"no such key.{hint} {owner} has: {', '.join(self._known()) or 'no settings'}")


class Node(Tree):
    """The settings of one dataclass: every field of `schema`, plus `name` when it is an entry of `registry`.

    Setting `name` turns the node into another entry: values that were set stay if the new entry has the key and are an
    error if it does not; everything else takes the new entry's defaults.
    """

    _schema: type
    _untouched: dict[str, Any]  # the plain values that nobody has set, by field

    def __init__(self, schema: type, values: Mapping[str, Any], registry: Registry | None = None):
        super().__init__(registry)
        self._fill(schema, values)
        self.lock()

    def _fill(self, schema: type, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_schema", schema)
        self._fields.clear()
        if self._registry is not None:
            self._fields["name"] = next(name for name, entry in self._registry.items() if entry is schema)
        for key, value in values.items():
            self._put(key, value)
        object.__setattr__(self, "_untouched", {key: _plain(self[key]) for key in values})

    def _known(self) -> list[str]:
        return ["name"] * (self._registry is not None) + list(slots(self._schema))

    def _put(self, key: str, value: Any) -> None:
        if key == "name" and self._registry is not None:
            self._switch(self._registry, value)
        elif key not in slots(self._schema):
            raise self._unknown(key)
        elif isinstance(value, FieldReference):  # ml_collections' lazy value, checked when the config is built
            self._attach(key, value)
        else:
            current = self._fields.get(key)
            value = settle(slots(self._schema)[key], value, current, key)
            if isinstance(current, FieldReference):
                current.set(value, type_safe=False)
            else:
                self._attach(key, value)

    def _switch(self, registry: Registry, name: Any) -> None:
        entry, old = _entry(registry, name, "name"), self._fields["name"]
        if name == old:
            return
        values = {key: self[key] for key in self._fields if key != "name"}
        kept = {k: v for k, v in values.items() if k not in self._untouched or _plain(v) != self._untouched[k]}
        for key, value in kept.items():
            if key not in slots(entry):
                has = ", ".join(slots(entry)) or "no settings"
                was = f"{_plain(value)!r} was set for {old!r}"
                raise ConfigError(key, f"{was}, but {name!r} has no such key; it has: {has}")
        self._fill(entry, defaults(entry))
        for key, value in kept.items():
            self._put(key, value)


class NamedNodes(Tree):
    """A mapping from free names to entries of `registry`. New names are welcome, so it is never locked."""

    def lock(self) -> "NamedNodes":
        return self

    def _put(self, key: str, value: Any) -> None:
        if not key.isidentifier():
            raise ConfigError(key, "a name has letters, digits and underscores")
        current = self._fields[key] if key in self._fields and not isinstance(value, str) else None
        self._attach(key, settle(Choice(self._registry), value, current, key))


def choose(registry: Registry, name: str, **settings: Any) -> Node:
    """The entry `name` of `registry` with these settings, to be assigned to a choice in a config file.

    Raises:
      ConfigError: there is no such entry, or it has no such setting, or a value has the wrong type.
    """
    entry = _entry(registry, name)
    node = Node(entry, defaults(entry), registry)
    try:
        for key, value in settings.items():
            node[key] = value
    except ConfigError as error:
        raise ConfigError("", f"{registry.kind} {name!r}: {error.key}: {error.message}") from None
    return node


def to_config_dict(config: Any) -> Node:
    """The locked ConfigDict of a schema instance: every field, choices as `{'name': entry, **fields}`."""
    return Node(type(config), _fields_of(config))


def from_config_dict(schema: type[T], config: ConfigDict | Mapping[str, Any]) -> T:
    """The frozen dataclasses that `config` spells; what it leaves out keeps its default.

    Raises:
      ConfigError: a key is unknown or missing, a value has the wrong type, or `__post_init__` refuses it.
    """
    return _build(settle(Group(schema), config, None))


def _build(node: Node) -> Any:
    values = {}
    for key, slot in slots(node._schema).items():
        if key not in node:
            allowed = describe(slot.hint) if isinstance(slot, Leaf) else "a group of settings"
            raise ConfigError(key, f"has no default and needs a value: {allowed}")
        value: Any = node[key]
        if isinstance(value, NamedNodes):
            entries: Any = value.items()
            values[key] = {name: _build_below(f"{key}.{name}", entry) for name, entry in entries}
        elif isinstance(value, Node):
            values[key] = _build_below(key, value)
        else:
            values[key] = settle(slot, value, None, key)  # again: a FieldReference was not checked when it was set
    return node._schema(**values)


def _build_below(path: str, node: Node) -> Any:
    try:
        return _build(node)
    except ConfigError as error:
        raise error.below(path) from None


def settle(slot: Slot, value: Any, current: Any, key: str = "") -> Any:
    """`value` in the form in which a node stores it under `key`: a checked leaf, or a node.

    A dict sets the keys that it names, in the `current` node or in one of defaults.
    """
    try:
        if isinstance(slot, Leaf):
            return check(slot.hint, value)
        if isinstance(slot, Group):
            return _settle_group(slot.schema, value, current)
        if isinstance(slot, Choice):
            return _settle_choice(slot.registry, value, current)
        return _settle_choices(slot.registry, value, current)
    except ValueError as error:
        raise ConfigError(key, str(error)) from None
    except ConfigError as error:
        raise (error.below(key) if key else error) from None


def _settle_group(schema: type, value: Any, current: Any) -> Node:
    if isinstance(value, Node) and value._schema is schema:
        return _free(value)
    if isinstance(value, schema):
        return to_config_dict(value)
    if not isinstance(value, (Mapping, ConfigDict)):
        raise ConfigError("", f"{value!r} is not allowed; it is a group of settings: {', '.join(slots(schema))}")
    node = current if isinstance(current, Node) else Node(schema, defaults(schema))
    for key, each in value.items():
        node._put(key, each)
    return node


def _settle_choice(registry: Registry, value: Any, current: Any) -> Node:
    if isinstance(value, Node):
        if value._registry != registry:
            kind = value._registry.kind if value._registry is not None else "group of settings"
            raise ConfigError("", f"this is a {kind}, not of the kind {registry.kind}; known: {', '.join(registry)}")
        return _free(value)
    if type(value) in registry.values():
        return Node(type(value), _fields_of(value), registry)
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, (Mapping, ConfigDict)) or (current is None and "name" not in value):
        raise ConfigError("", f"{value!r} names no {registry.kind}; known: {', '.join(registry)}")
    node = current
    if node is None:
        entry = _entry(registry, value["name"], "name")
        node = Node(entry, defaults(entry), registry)
    name_first = sorted(value.items(), key=lambda item: item[0] != "name")  # it decides what else there may be
    for key, each in name_first:
        node._put(key, each)
    return node


def _settle_choices(registry: Registry, value: Any, current: Any) -> NamedNodes:
    if isinstance(value, NamedNodes) and value._registry == registry:
        return _free(value)
    if not isinstance(value, (Mapping, ConfigDict)) or isinstance(value, Node):
        allowed = f"names, each with one of: {', '.join(registry)}"
        raise ConfigError("", f"{value!r} is not allowed; it maps free {allowed}")
    nodes = NamedNodes(registry)
    for key, each in value.items():
        if current is not None and key in current:
            nodes._attach(key, current[key])  # so that a dict below an old name edits what stands there
        nodes._put(key, each)
    return nodes


def _free(node: Any) -> Any:
    """`node`, or a copy of it if it stands somewhere already: two places must not edit one node."""
    return node if node._parent is None else copy.deepcopy(node)


def _fields_of(config: Any) -> dict[str, Any]:
    return {key: getattr(config, key) for key in slots(type(config))}


def _entry(registry: Registry, name: Any, key: str = "") -> type:
    try:
        return registry[name]
    except ConfigError as error:
        raise (error.below(key) if key else error) from None
    except TypeError:  # not even hashable
        raise ConfigError(key, f"{name!r} is not allowed; known: {', '.join(registry)}") from None


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
