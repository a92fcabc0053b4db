"""Reads the text of a compiled program (HLO): its computations, and how often each instruction runs."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    opcode: str
    result: str  # types and layouts of what it gives
    text: str  # from the operands on

    @property
    def shape(self) -> Optional[Shape]:
        """None: a tuple."""
        found = _SHAPE.match(self.result)
        return ints(found[1]) if found else None


Computations = dict[str, list[Instruction]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
"""dtype, dimensions and layout of an array in a result."""
# The first word with a parenthesis right after it; in a layout, as in {1,0:T(8,128)}, no space comes before the word.
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"(?:\w+\[([\d,]*)\](?:\{[^}]*\})? )?%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_BODY = re.compile(r"body=%([\w.\-]+)")
# Written {"known_trip_count":{"n":"4"}}, with or without escaped quotes, or known_trip_count={n=4}.
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')


def parse(text: str) -> tuple[Computations, str]:
    """(the instructions of every computation, the name of the one that is run). Raises `ValueError` when there is
    none."""
    computations: Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(found[2]) if found else None
        if line == "}":
            current = None
        elif current and found is None:  # the attributes of a Pallas kernel go over several lines
            current[-1] = dataclasses.replace(current[-1], text=f"{current[-1].text} {line}")
        if current is None or found is None or opcode is None:
            continue
        result, text = found[2][: opcode.start()], found[2][opcode.end() :]
        current.append(Instruction(name=found[1], opcode=opcode[1], result=result, text=text))
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return computations, entry


Shapes = dict[str, Optional[Shape]]
Measure = Callable[[Instruction, Shapes], Optional[int]]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """An instruction that was measured. `body` is the computation around it, of loop, branch or program."""

    instruction: Instruction
    body: str
    once: int
    times: int
    loop_unknown: bool


def executions(
    computations: Computations, name: str, measure: Measure, body: Optional[str] = None, times: int = 1, unknown=False
) -> Iterator[Execution]:
    """What a computation does that `measure` has a number for, loops multiplied out. Of branches that one counts which
    has most of it: which one runs is not known."""
    body = name if body is None else body
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        once = measure(instruction, shapes)
        if once is not None:
            yield Execution(instruction=instruction, body=body, once=once, times=times, loop_unknown=unknown)
        elif instruction.opcode == "while":
            trips, (inner,) = _trips(instruction, computations), called_by(instruction)
            count = 1 if trips is None else trips
            yield from executions(computations, inner, measure, None, times * count, unknown or trips is None)
        elif instruction.opcode == "conditional":
            branches = called_by(instruction)
            found = [list(executions(computations, branch, measure, None, times, unknown)) for branch in branches]
            yield from max(found, key=lambda each: sum(e.once * e.times for e in each), default=[])
        else:
            for called in called_by(instruction):
                yield from executions(computations, called, measure, body, times, unknown)


def called_by(instruction: Instruction) -> list[str]:
    """The computations that it runs: of a loop its body, of a conditional its branches."""
    if instruction.opcode == "while":
        return _BODY.findall(instruction.text)
    if instruction.opcode == "conditional":
        names = [one or several for one, several in _BRANCHES.findall(instruction.text)]
        return [name.strip().lstrip("%") for several in names for name in several.split(",")]
    return _CALLED.findall(instruction.text)


def _trips(loop: Instruction, computations: Computations) -> Optional[int]:
    """How often a loop runs: as it says, or, where its condition is 'counter < constant', that constant, for JAX counts
    from 0 by 1. None when neither is in the text."""
    if said := _TRIPS.search(loop.text):
        return int(said[1])
    condition = _CONDITION.search(loop.text)
    instructions = {each.name: each for each in computations.get(condition[1], [])} if condition else {}
    for each in instructions.values():
        if each.opcode == "compare" and "direction=LT" in each.text:
            counter, bound = (instructions.get(name) for _, name in _OPERAND.findall(each.text)[:2])
            if counter and bound and (counter.opcode, bound.opcode) == ("get-tuple-element", "constant"):
                return int(bound.text.split(")")[0])
    return None


def scope_of(instruction: Instruction) -> str:
    """Its op_name: the named scopes of the program around it."""
    found = _SCOPE.search(instruction.text)
    return found[1] if found else ""


def module_of(scope: str) -> str:
    """The names that say where in the model: 'jit(train_step)/jvp()/while/body/closed_call/attention/dot' is
    'attention', and what lies under `transpose` is its backward pass."""
    plumbing = ("while", "body", "closed_call", "shard_map", "checkpoint", "rematted_computation", "cond", "branch")
    parts = [part for part in scope.split("/")[:-1] if part.isidentifier() and not part.startswith(plumbing)]
    name = "/".join(parts) or "step"
    return f"{name}, backward" if "transpose" in scope else name


def operand_shapes(instruction: Instruction, shapes: Shapes, count: int = 2) -> list[Shape]:
    """Of the first operands: written with them, or where they are defined. Raises `ValueError` when they are not in the
    text."""
    found = []
    for inline, name in _OPERAND.findall(instruction.text)[:count]:
        shape = ints(inline) if inline else shapes.get(name)
        if shape is None:
            raise ValueError(f"{instruction.name}: the shape of its operand {name} is not in the text")
        found.append(shape)
    return found


def operands_of(instruction: Instruction) -> list[str]:
    """The names of all operands."""
    depth = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in instruction.text)
    end = next((at for at, level in enumerate(depth) if level < 0), None)
    return [name for _, name in _OPERAND.findall(instruction.text[:end])]


def bytes_of(dtype: str) -> int:
    """Of one number; a type has its bits in its name, as f32 and f8e4m3fn. A token has none."""
    bits = re.search(r"\d+", dtype)
    return int(dtype == "pred") if bits is None else max(1, int(bits[0]) // 8)


def ints(text: str) -> Shape:
    """Numbers between commas: '4,8' is (4, 8), and nothing is ()."""
    return tuple(int(part) for part in text.split(",") if part)
