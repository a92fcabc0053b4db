"""Flags: a parser, and functions for the `type` of an argument. These raise `ArgumentTypeError` with the value and what
is allowed."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sparsejax.base.errors import RequestError

Mesh = tuple[int, int, int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `RequestError`s."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, for example 10.0.0.1:8476")
    return text


def devices(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not D,D,…: the number of a device for each expert")
    return tuple(map(int, numbers))


def file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not a file")
    return Path(text)


def folder(text: str) -> Path:
    if not text:  # of an unset variable, say, which would mean the current folder
        raise argparse.ArgumentTypeError("'' is not a folder")
    return Path(text)


def words(text: str) -> tuple[str, ...]:
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not A,B,…: names with commas between them")
    return found


def numbers(text: str) -> tuple[int, ...]:
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,N,…: whole numbers with commas between them")
    return tuple(int(word) for word in text.split(","))


def mesh(text: str) -> Mesh:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"-?\d+", size.strip(), re.ASCII) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not D,E,T: three ints, for example 2,4,1")
    data, expert, tensor = map(int, sizes)
    return data, expert, tensor


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an int of at least {least}")
        return int(text)

    return parse


def stopped_status(text: str) -> int:
    if not text.isdecimal() or int(text) in (1, 2) or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 3 … 255: 1 is a failure, 2 a wrong request")
    return int(text)


def number(least: float, most: float | None) -> Callable[[str], float]:
    def parse(text: str) -> float:
        wanted = f"a number of at least {least}" if most is None else f"a number from {least} to {most}"
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= (float("inf") if most is None else most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse
