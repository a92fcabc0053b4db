"""Leaves of a config: what a type hint allows, as a value (from Python or JSON) and as text (from the command line).

A leaf is `int`, `float`, `bool`, `str`, `Literal[...]`, `Optional[leaf]` or `tuple[leaf, ...]`.
"""

import math
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from sparsejax.base.errors import did_you_mean

_SCALARS = {int: "an int", float: "a finite float", bool: "true or false", str: "a string"}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class _Refused(Exception):
    """`item` (the value itself, or one item of a tuple) is not what its hint allows."""

    def __init__(self, item: Any):
        self.item = item


def is_leaf(hint: Any) -> bool:
    """Whether `hint` is a type that a leaf may have."""
    inner = _optional(hint) or _item(hint)
    return is_leaf(inner) if inner else hint in _SCALARS or get_origin(hint) is Literal


def describe(hint: Any) -> str:
    """What `hint` allows, in words: 'none or one of: data, expert'."""
    if inner := _optional(hint):
        return f"none or {describe(inner)}"
    if item := _item(hint):
        return f"a tuple, each item {describe(item)}"
    if get_origin(hint) is Literal:
        return f"one of: {', '.join(map(str, get_args(hint)))}"
    return _SCALARS[hint]


def check(hint: Any, value: Any) -> Any:
    """`value` with the exact type of `hint`: an int passes for a float, a list for a tuple, and nothing else.

    Raises:
      ValueError: the value is not allowed; the message names it and what is.
    """
    try:
        return _convert(hint, value)
    except _Refused as refused:
        raise ValueError(_refusal(hint, value, refused.item)) from None


def parse(hint: Any, text: str) -> Any:
    """The value that `text` spells: `1_000` and `1e3` are ints, `none` is None, `a,b` and `(a, b)` are tuples.

    Raises:
      ValueError: the text spells no allowed value; the message names it and what is.
    """
    try:
        return _convert(hint, _read(hint, text.strip()))
    except _Refused as refused:
        raise ValueError(_refusal(hint, text, refused.item)) from None


def _refusal(hint: Any, value: Any, item: Any) -> str:
    near = did_you_mean(item, map(str, _options(hint))) if isinstance(item, str) else ""
    return f"{value!r} is not allowed; must be {describe(hint)}.{near}"


def _options(hint: Any) -> tuple[Any, ...]:
    """The choices of the `Literal` inside `hint`, if there is one."""
    inner = _optional(hint) or _item(hint)
    if inner:
        return _options(inner)
    return get_args(hint) if get_origin(hint) is Literal else ()


def _optional(hint: Any) -> Any:
    """`leaf` of `Optional[leaf]`, else None."""
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return args[0] if args[1] is type(None) else args[1]
    return None


def _item(hint: Any) -> Any:
    """`leaf` of `tuple[leaf, ...]`, else None."""
    args = get_args(hint)
    return args[0] if get_origin(hint) is tuple and len(args) == 2 and args[1] is Ellipsis else None


def _convert(hint: Any, value: Any) -> Any:
    if inner := _optional(hint):
        return None if value is None else _convert(inner, value)
    if item := _item(hint):
        if not isinstance(value, (tuple, list)):
            raise _Refused(value)
        return tuple(_convert(item, each) for each in value)
    if get_origin(hint) is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
        raise _Refused(value)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or isinstance(value, bool) != (hint is bool):  # a bool is an int to Python
        raise _Refused(value)
    try:
        converted = hint(value)
    except OverflowError:  # an int that no float can hold
        raise _Refused(value) from None
    # JSON has no infinity, and NaN differs from itself, which no comparison of configs survives.
    if hint is float and not math.isfinite(converted):
        raise _Refused(value)
    return converted


def _read(hint: Any, text: str) -> Any:
    if inner := _optional(hint):
        return None if text.lower() == "none" else _read(inner, text)
    if item := _item(hint):
        return tuple(_read(item, part) for part in _split(text))
    if get_origin(hint) is Literal:
        return next((option for option in get_args(hint) if str(option) == text), text)
    try:
        return {int: _int, float: float, bool: lambda word: _BOOLEANS[word.lower()], str: str}[hint](text)
    except (ValueError, KeyError, OverflowError):
        raise _Refused(text) from None


def _int(text: str) -> int:
    if "e" in text.lower() and float(text).is_integer():
        return int(float(text))
    return int(text)


def _split(text: str) -> Iterator[str]:
    """The items of a tuple written `a,b`, `(a, b)`, `["a", "b"]` or `()`; items may be tuples themselves."""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    depth, start = 0, 0
    for position, letter in enumerate(text + ","):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            part = text[start:position].strip()
            if part:
                yield part[1:-1] if part[0] in "'\"" and part[-1] == part[0] else part
            start = position + 1
