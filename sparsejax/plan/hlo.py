"""Reads the matrix products of a compiled program from its HLO text: the third count of FLOPs, beside ideal and padded.

    dots = read_dots(jax.jit(f).lower(*args).compile().as_text())
    sum(dot.flops for dot in dots)

Counted are `dot` and oneDNN's matmul, fused or not, each as often as the loops around it run. A program split over
devices is that of one device. Products that the compiler turned into something else (a dot product of two vectors into
multiply and reduce; on TPU a matmul into a convolution) are not seen.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One matrix product. `scope` is its op_name: the named scopes of the program around it."""

    name: str
    scope: str
    once: int  # FLOPs of one execution: 2 × multiply-adds
    times: int  # executions
    loop_unknown: bool  # it stands in a loop whose trip count is not in the text, and is counted as if that ran once

    @property
    def flops(self) -> int:
        return self.once * self.times


@dataclass(frozen=True, kw_only=True)
class _Instruction:
    name: str
    opcode: str
    shape: Optional[Shape]  # None: a tuple
    text: str  # from the operands on


_Computations = dict[str, list[_Instruction]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
# The first word with a parenthesis right after it; in a layout, as in {1,0:T(8,128)}, no space comes before the word.
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"(?:\w+\[([\d,]*)\](?:\{[^}]*\})? )?%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%([\w.\-]+)|branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%([\w.\-]+)")
# Written {"known_trip_count":{"n":"4"}}, with or without escaped quotes, or known_trip_count={n=4}.
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')


def read_dots(hlo_text: str) -> list[Dot]:
    """Every matrix product of the module, in the order of execution.

    Raises:
      ValueError: the text is no HLO module, or the shape of an operand cannot be found in it.
    """
    computations, entry = _parse(hlo_text)
    return list(_walk(computations, entry, times=1, unknown=False))


def dot_flops(hlo_text: str) -> int:
    """FLOPs of all matrix products of the module, loops multiplied out."""
    return sum(dot.flops for dot in read_dots(hlo_text))


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(found[2]) if found else None
        if current is None or found is None or opcode is None:
            continue
        shape = _SHAPE.match(found[2])
        instruction = _Instruction(
            name=found[1], opcode=opcode[1], shape=_ints(shape[1]) if shape else None, text=found[2][opcode.end() :]
        )
        current.append(instruction)
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return computations, entry


def _walk(computations: _Computations, name: str, times: int, unknown: bool) -> Iterator[Dot]:
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        once = _flops(instruction, shapes)
        if once is not None:
            scope = _SCOPE.search(instruction.text)
            place = scope[1] if scope else ""
            yield Dot(name=instruction.name, scope=place, once=once, times=times, loop_unknown=unknown)
        elif instruction.opcode == "while":
            trips, body = _TRIPS.search(instruction.text), _BODY.search(instruction.text)
            assert body is not None
            count = int(trips[1]) if trips else 1
            yield from _walk(computations, body[1], times * count, unknown or trips is None)
        elif instruction.opcode == "conditional":
            yield from _costliest(computations, instruction, times, unknown)
        else:
            for called in _CALLED.findall(instruction.text):
                yield from _walk(computations, called, times, unknown)


def _costliest(computations: _Computations, instruction: _Instruction, times: int, unknown: bool) -> list[Dot]:
    """The dots of the branch that has most of them to do: which one runs is not known."""
    names = [one or several for one, several in _BRANCHES.findall(instruction.text)]
    branches = [name.strip().lstrip("%") for several in names for name in several.split(",")]
    dots = [list(_walk(computations, branch, times, unknown)) for branch in branches]
    return max(dots, key=lambda found: sum(dot.flops for dot in found), default=[])


def _flops(instruction: _Instruction, shapes: dict[str, Optional[Shape]]) -> Optional[int]:
    """FLOPs of one execution; None for what is no matrix product."""
    if instruction.opcode == "dot":
        contracting = _CONTRACTING.search(instruction.text)
        lhs, _ = _operands(instruction, shapes)
        assert instruction.shape is not None
        summed = _ints(contracting[1]) if contracting else ()
        return 2 * math.prod(instruction.shape) * math.prod(lhs[d] for d in summed)
    if instruction.opcode == "custom-call" and '"__onednn$matmul"' in instruction.text:
        # The output may come in a tuple with scratch memory and either side may be transposed: go by sizes alone.
        # [b, m, k] · [b, k, n] = [b, m, n], or [b, m, k] · [k, n].
        lhs, rhs = _operands(instruction, shapes)
        output = instruction.shape
        if output is None:
            raise ValueError(f"{instruction.name}: a oneDNN matmul with several outputs")
        batch = math.prod(rhs[:-2])
        k = math.isqrt(math.prod(lhs) * math.prod(rhs) // (math.prod(output) * batch))
        return 2 * math.prod(output) * k
    return None


def _operands(instruction: _Instruction, shapes: dict[str, Optional[Shape]]) -> tuple[Shape, Shape]:
    """Shapes of the first two operands: written with them, or where they are defined."""
    found = []
    for inline, name in _OPERAND.findall(instruction.text)[:2]:
        shape = _ints(inline) if inline else shapes.get(name)
        if shape is None:
            raise ValueError(f"{instruction.name}: the shape of its operand {name} is not in the text")
        found.append(shape)
    return found[0], found[1]


def _ints(text: str) -> Shape:
    return tuple(int(part) for part in text.split(",") if part)
