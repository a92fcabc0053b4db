"""Reads what a compiled program moves between devices from its HLO text.

    moved = read_collectives(compiled.as_text(), mesh_shape)
    sum(each.bytes for each in moved)

Bytes are those that one device sends, by the least that any algorithm needs: of n devices, (n − 1)/n of the array for a
gather, a scatter of sums or an all-to-all, twice that for a sum that all get. A collective that the TPU compiler has
taken apart into a start, steps beside other work and an end is one. A `ragged_all_to_all` counts as if its buffer were
full."""

import math
import re
from dataclasses import dataclass
from typing import Optional

import numpy as np

from sparsejax.base.sharding import AXES
from sparsejax.plan.hlo import ARRAY, Instruction, Shapes, bytes_of, executions, ints, parse, scope_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, or, the devices being in another order, with device_ids=([2,4]T(1,0)) between.
_MESH = re.compile(
    r"replica_groups=(?:@?\w*)mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """`axes`: of the mesh, along which devices exchange; None when they are no whole axes. `scope`: its op_name."""

    kind: str
    axes: Optional[tuple[str, ...]]
    scope: str
    once: int  # bytes sent by a device in one execution
    times: int
    loop_unknown: bool  # it stands in a loop whose trip count is not in the text, and is counted as if that ran once

    @property
    def bytes(self) -> int:
        return self.once * self.times


def read_collectives(hlo_text: str, mesh: tuple[int, ...]) -> list[Collective]:
    """Every collective of the program of one device, in the order of execution. `mesh`: sizes of `AXES`, the devices
    being numbered in the order of their places.

    Raises:
      ValueError: the text is no HLO module, or groups of devices are written in a form that is not known.
    """
    computations, entry = parse(hlo_text)
    found, seen = [], set()
    for each in executions(computations, entry, lambda instruction, shapes: _sent(instruction, shapes, mesh)):
        text = each.instruction.text
        chain, channel = _CHAIN.search(text), _CHANNEL.search(text)
        key = (each.body, chain and chain[1], channel and channel[1])
        if chain is not None and key in seen:
            continue
        seen.add(key)
        found.append(
            Collective(
                kind=each.instruction.opcode.removesuffix("-start"),
                axes=mesh_axes(_group(each.instruction, mesh), mesh),
                scope=scope_of(each.instruction),
                once=each.once,
                times=each.times,
                loop_unknown=each.loop_unknown,
            )
        )
    return found


def _sent(instruction: Instruction, shapes: Shapes, mesh: tuple[int, ...]) -> Optional[int]:
    """Bytes; None for what is no collective."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = [math.prod(ints(dims)) * bytes_of(dtype) for dtype, dims, _ in ARRAY.findall(instruction.result)]
    if kind == "collective-permute":
        return arrays[0]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    size, n = sum(arrays), len(_group(instruction, mesh))
    if kind == "reduce-scatter":
        return size * (n - 1)
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) // n


def _group(instruction: Instruction, mesh: tuple[int, ...]) -> np.ndarray:
    """The numbers of the devices of the first group."""
    text, devices = instruction.text, math.prod(mesh)
    if pair := _PAIRS.search(text):
        return np.array([int(pair[1]), int(pair[2])])
    if listed := _LISTED.search(text):
        return np.array(ints(listed[1]))
    if iota := _IOTA.search(text):
        return _numbers(iota[2], iota[3]).reshape(ints(iota[1]))[0]
    if over := _MESH.search(text):
        names, sizes = zip(*(part.split("=") for part in over[1].split(",")), strict=True)
        grid = _numbers(over[2] or str(devices), over[3]).reshape([int(size) for size in sizes])
        axes = [names.index(name.strip()) for name in over[4].split(",")]
        others = [axis for axis in range(grid.ndim) if axis not in axes]
        return grid.transpose(*others, *axes).reshape(-1, math.prod(grid.shape[axis] for axis in axes))[0]
    if "replica_groups={}" in text:
        return np.arange(devices)
    raise ValueError(f"{instruction.name}: its groups of devices are written in an unknown form: {text[:200]}")


def _numbers(shape: str, order: Optional[str]) -> np.ndarray:
    """0, 1, 2, … in an array of this shape, whose axes are then put into this order."""
    numbers = np.arange(math.prod(ints(shape))).reshape(ints(shape))
    return numbers.transpose(ints(order)) if order else numbers


def mesh_axes(group: np.ndarray, mesh: tuple[int, ...]) -> Optional[tuple[str, ...]]:
    """The axes of the mesh that the devices of a group run through, if it is whole axes."""
    places = np.stack(np.unravel_index(group, mesh))
    varying = [axis for axis in range(len(mesh)) if len(set(places[axis])) > 1]
    whole = math.prod(mesh[axis] for axis in varying) == len(group)
    return tuple(AXES[axis] for axis in varying) if whole else None
