"""How much a compiled program reads and writes in the main memory of a device: what each of its steps takes in and
gives. A fusion is one step. What it only takes a slice of counts as that slice, what it updates in place as the update;
what lies in a TPU's fast memory does not count."""

import math
import re
from typing import Optional

from sparsejax.plan.hlo import (
    ARRAY,
    Computations,
    Instruction,
    Shapes,
    bytes_of,
    called_by,
    executions,
    ints,
    operands_of,
    parse,
)

_FAST = re.compile(r"S\([1-9]")
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("optimization-barrier", "iota"),
}
INNER = {"while", "conditional", "call"}
SLICES = {"dynamic-slice", "slice", "gather"}


def memory_bytes(hlo_text: str) -> int:
    """Of one run of the program, loops multiplied out.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations, entry = parse(hlo_text)
    results = {each.name: each for body in computations.values() for each in body}

    def measure(instruction: Instruction, _: Shapes) -> Optional[int]:
        return None if instruction.opcode in INNER else _traffic(instruction, computations, results)

    return sum(each.once * each.times for each in executions(computations, entry, measure))


def _traffic(instruction: Instruction, computations: Computations, results: dict[str, Instruction]) -> int:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    operands = [results[name] for name in operands_of(instruction) if name in results]
    if opcode in ("copy-start", "slice-start"):  # between memories: ((source), destination, …)
        parts = [_array_bytes(*array) for array in ARRAY.findall(instruction.result)[:2]]
        whole = [_array_bytes(*array, fast_too=True) for array in ARRAY.findall(instruction.result)[:2]]
        return sum(min(whole) for part in parts if part)
    if opcode in SLICES:
        return 2 * size_of(instruction)
    if opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * size_of(operands[1])
    if opcode != "fusion":
        return size_of(instruction) + sum(map(size_of, operands))
    body = computations[called_by(instruction)[0]]
    return _written(instruction, body) + _read(operands, body)


def size_of(instruction: Instruction) -> int:
    """Bytes of its result in the main memory."""
    return sum(_array_bytes(*array) for array in ARRAY.findall(instruction.result))


def _array_bytes(dtype: str, dims: str, layout: str, fast_too: bool = False) -> int:
    return 0 if _FAST.search(layout) and not fast_too else math.prod(ints(dims)) * bytes_of(dtype)


def _written(fusion: Instruction, body: list[Instruction]) -> int:
    named = {each.name: each for each in body}
    roots = operands_of(body[-1]) if body[-1].opcode == "tuple" else [body[-1].name]
    arrays = ARRAY.findall(fusion.result)
    total = 0
    for name, array in zip(roots, arrays, strict=False):
        root = named.get(name)
        while root is not None and root.opcode == "bitcast":
            root = named.get(operands_of(root)[0])
        update = named.get(operands_of(root)[1]) if root and root.opcode == "dynamic-update-slice" else None
        written = _array_bytes(*array)
        total += min(written, size_of(update)) if update else written
    return total


def _read(operands: list[Instruction], body: list[Instruction]) -> int:
    users: dict[str, list[Instruction]] = {}
    for each in body:
        for name in operands_of(each):
            users.setdefault(name, []).append(each)
    parameters = {int(each.text.split(")")[0]): each.name for each in body if each.opcode == "parameter"}
    return sum(_read_of(size_of(operand), parameters.get(n, ""), users) for n, operand in enumerate(operands))


def _read_of(size: int, name: str, users: dict[str, list[Instruction]]) -> int:
    """Of an operand of so many bytes, which is called `name` inside."""
    total = 0
    for user in users.get(name, ()):
        if user.opcode in SLICES:
            total += sum(_array_bytes(*array, fast_too=True) for array in ARRAY.findall(user.result))
        elif user.opcode == "bitcast":
            total += _read_of(size, user.name, users)
        elif not (user.opcode == "dynamic-update-slice" and operands_of(user)[0] == name):
            return size
    return min(size, total)
