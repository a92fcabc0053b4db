"""What a compiled program holds at its fullest moment, beside its arguments: read from the order of its instructions.

The compiler's text is in the order in which instructions run. A buffer lives from the instruction that writes it to the
last that reads it; tuples, bitcasts, loops and updates in place share those of their operands. How the compiler packs
buffers is not in the text, so the sum is near its own figure and not equal to it."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparsejax.plan.hlo import (
    ARRAY,
    Computations,
    Instruction,
    bytes_of,
    called_by,
    ints,
    module_of,
    operands_of,
    parse,
    scope_of,
)

_INDEX = re.compile(r"index=(\d+)")
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\d*\}")
_SPACE = re.compile(r"S\([1-9]")
_TILE = re.compile(r"T\(([\d,]+)\)")
_ORDER = re.compile(r"\{([\d,]+)")
SHARING = ("bitcast", "tuple", "while", "optimization-barrier")
UPDATING = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """`kind`: dtype and shape. `scope`: the op_name of what writes it. `bytes`: with the padding of tiles."""

    kind: str
    scope: str
    bytes: int


Element = tuple[str, frozenset[int]]
"""Of an instruction's value, which may be a tuple: its kind, and the buffers that it lies in, by number."""


def live_at_peak(hlo_text: str) -> list[Buffer]:
    """The buffers in the main memory of one device, largest first, when most of it is in use.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations, entry = parse(hlo_text)
    return sorted(_peak(computations, entry), key=lambda each: -each.bytes)


def _peak(computations: Computations, name: str) -> list[Buffer]:
    """Of one computation; its parameters are others' buffers."""
    written, last = _lifetimes(computations, computations[name])
    live: dict[int, Buffer] = {}
    size, most, fullest = 0, -1, []
    for at, instruction in enumerate(computations[name]):
        live |= written[at]
        size += _size(written[at].values())
        bodies = called_by(instruction) if instruction.opcode in ("while", "conditional", "call") else []
        inner = max((_peak(computations, body) for body in bodies), key=_size, default=[])
        if size + _size(inner) > most:
            most, fullest = size + _size(inner), [*live.values(), *inner]
        for number in [number for number in live if last[number] <= at]:
            size -= live.pop(number).bytes
    return fullest


def _size(buffers) -> int:
    return sum(each.bytes for each in buffers)


def _lifetimes(
    computations: Computations, instructions: Sequence[Instruction]
) -> tuple[list[dict[int, Buffer]], dict[int, int]]:
    """(what each instruction writes anew, the place of the last instruction that reads a buffer)."""
    values: dict[str, list[Element]] = {}
    written, last = [], {}
    for at, instruction in enumerate(instructions):
        operands = [values.get(name, []) for name in operands_of(instruction)]
        shared, new = _value(computations, instruction, operands), {}
        for number, element in enumerate(shared):
            if element is None:
                buffer = _buffer(instruction, number)
                key = len(last) + len(new)
                shared[number] = (buffer.kind, frozenset([key] if buffer.bytes else []))
                new |= {key: buffer} if buffer.bytes else {}
        values[instruction.name] = [element for element in shared if element is not None]
        written.append(new)
        if instruction.opcode == "while":
            _name_by_loop(computations, instruction, values[instruction.name], written)
        for _, numbers in [*(each for operand in operands for each in operand), *values[instruction.name]]:
            last |= dict.fromkeys(numbers, at)
    return written, last


def _name_by_loop(
    computations: Computations, loop: Instruction, elements: list[Element], written: list[dict[int, Buffer]]
) -> None:
    """What a loop fills was written before it as zeros, of nobody: it gets the name of what the loop writes there."""
    (name,) = called_by(loop)
    body = _by_name(computations[name])
    for (_, numbers), result in zip(elements, operands_of(computations[name][-1]), strict=False):
        scope = _origin(computations, [(body, loop)], body[result]) if result in body else ""
        for new in written if scope else ():
            for number in numbers & new.keys():
                if module_of(new[number].scope) == "step":
                    new[number] = dataclasses.replace(new[number], scope=scope)


Frame = tuple[dict[str, Instruction], Instruction]
"""The instructions of a computation by name, and the one that calls it."""


def _origin(computations: Computations, frames: list[Frame], instruction: Instruction, steps: int = 16) -> str:
    """The scope of the nearest instruction, back along what it is made of, that stands in a module; '' for none."""
    names, call = frames[-1]
    opcode, operands = instruction.opcode, [name for name in operands_of(instruction) if name in names]
    if module_of(scope_of(instruction)) != "step" and opcode not in ("fusion", "get-tuple-element"):
        return scope_of(instruction)
    if steps == 0:
        return ""
    if opcode == "parameter":
        if len(frames) == 1:
            return ""
        outside, name = frames[-2][0], operands_of(call)[int(instruction.text.split(")")[0])]
        return _origin(computations, frames[:-1], outside[name], steps - 1) if name in outside else ""
    source, index = instruction, None
    if opcode == "get-tuple-element" and operands and (found := _INDEX.search(instruction.text)):
        source, index = names[operands[0]], int(found[1])
    if source.opcode == "fusion":
        inside = computations[called_by(source)[0]]
        by_name, root = _by_name(inside), inside[-1]
        if root.opcode == "tuple" and index is not None:
            root = by_name[operands_of(root)[index]]
        return _origin(computations, [*frames, (by_name, source)], root, steps - 1)
    if not operands:
        return ""
    what = operands[1] if opcode == "dynamic-update-slice" and len(operands) > 1 else operands[0]
    return _origin(computations, frames, names[what], steps - 1)


def _by_name(instructions: Sequence[Instruction]) -> dict[str, Instruction]:
    return {each.name: each for each in instructions}


def _value(computations: Computations, instruction: Instruction, operands: list[list[Element]]) -> list[Element | None]:
    """The elements of its value; None for those that it writes anew."""
    opcode, flat = instruction.opcode, [element for operand in operands for element in operand]
    kinds = [f"{dtype}[{dims}]" for dtype, dims, _ in ARRAY.findall(instruction.result)]
    together = frozenset(number for _, numbers in flat for number in numbers)
    if opcode == "parameter":
        return [(kind, frozenset()) for kind in kinds]
    if opcode == "get-tuple-element":
        index = _INDEX.search(instruction.text)
        assert index is not None
        return [flat[int(index[1])] if int(index[1]) < len(flat) else (kinds[0], together)]
    if opcode in SHARING:
        same = len(flat) == len(kinds)
        return [(kind, flat[n][1] if same else together) for n, kind in enumerate(kinds)]
    if opcode.endswith("-done"):
        return [(kind, together) for kind in kinds]
    listed = {int(out or 0): int(operand) for out, operand in _ALIASES.findall(instruction.text)}
    in_place = _writes_in_place(computations, instruction)
    elements: list[Element | None] = []
    for number, kind in enumerate(kinds):
        if number in listed and listed[number] < len(operands):
            buffers = frozenset(n for _, numbers in operands[listed[number]] for n in numbers)
            elements.append((kind, buffers))
        else:
            elements.append(next((each for each in flat if each[0] == kind), None) if in_place else None)
    return elements


def _writes_in_place(computations: Computations, instruction: Instruction) -> bool:
    """An update of a slice, alone or in a fusion, or a step of a collective beside other work."""
    if instruction.opcode != "fusion":
        return instruction.opcode in UPDATING or instruction.opcode.endswith("-start")
    bodies = [each for body in called_by(instruction) for each in computations.get(body, ())]
    return any(each.opcode in UPDATING or "chain_id" in each.text for each in bodies)


def _buffer(instruction: Instruction, number: int) -> Buffer:
    dtype, dims, layout = ARRAY.findall(instruction.result)[number]
    size = 0 if _SPACE.search(layout) else math.prod(_padded(ints(dims), layout)) * bytes_of(dtype)
    return Buffer(kind=f"{dtype}[{dims}]", scope=scope_of(instruction), bytes=size)


def _padded(shape: tuple[int, ...], layout: str) -> list[int]:
    """The shape with its innermost dimensions as multiples of the tile's."""
    tile, order, padded = _TILE.search(layout), _ORDER.match(layout), list(shape)
    if tile is None or order is None or not shape:
        return padded
    for axis, multiple in zip(ints(order[1]), reversed(ints(tile[1]))):
        padded[axis] = -(-padded[axis] // multiple) * multiple
    return padded
