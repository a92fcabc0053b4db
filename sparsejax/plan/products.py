"""Reads the matrix products of a compiled program from its HLO text: the third count of FLOPs, beside ideal and padded.

    dots = read_dots(jax.jit(f).lower(*args).compile().as_text())
    sum(dot.flops for dot in dots)

Counted are `dot`, `convolution` (what the TPU compiler makes of products), oneDNN's and cuBLAS's matmul and the kernels
of `plan/kernels.py`, fused or not, each as often as the loops around it run. A program split over devices is that of
one device. Products that the compiler turned into something else (that of two vectors into multiply and reduce) are
not seen.
"""

import math
import re
from dataclasses import dataclass
from typing import Optional

import numpy as np

from sparsejax.plan.hlo import Instruction, Shapes, executions, ints, operand_shapes, parse, scope_of
from sparsejax.plan.kernels import kernel_flops

_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_CUBLAS = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
_FIRST = re.compile(r"\(?\w+\[([\d,]*)\]")
_LABELS = re.compile(r"dim_labels=([\dbf]+)_([\dio]+)->([\dbf]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")


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


def read_dots(hlo_text: str) -> list[Dot]:
    """Every matrix product of the module, in the order of execution.

    Raises:
      ValueError: the text is no HLO module, or the shape of an operand cannot be found in it.
    """
    computations, entry = parse(hlo_text)
    return [
        Dot(
            name=found.instruction.name,
            scope=scope_of(found.instruction),
            once=found.once,
            times=found.times,
            loop_unknown=found.loop_unknown,
        )
        for found in executions(computations, entry, product_flops)
    ]


def dot_flops(hlo_text: str) -> int:
    """FLOPs of all matrix products of the module, loops multiplied out."""
    return sum(dot.flops for dot in read_dots(hlo_text))


def product_flops(instruction: Instruction, shapes: Shapes) -> Optional[int]:
    """FLOPs of one execution; None for what is no matrix product."""
    if instruction.opcode == "dot":
        contracting = _CONTRACTING.search(instruction.text)
        lhs, _ = operand_shapes(instruction, shapes)
        assert instruction.shape is not None
        summed = ints(contracting[1]) if contracting else ()
        return 2 * math.prod(instruction.shape) * math.prod(lhs[d] for d in summed)
    if instruction.opcode == "convolution":
        return _convolution(instruction, shapes)
    if instruction.opcode != "custom-call":
        return None
    if '"__onednn$matmul"' in instruction.text:
        # The output may come in a tuple with scratch memory and either side may be transposed: go by sizes alone.
        # [b, m, k] · [b, k, n] = [b, m, n], or [b, m, k] · [k, n].
        lhs, rhs = operand_shapes(instruction, shapes)
        output = instruction.shape
        if output is None:
            raise ValueError(f"{instruction.name}: a oneDNN matmul with several outputs")
        batch = math.prod(rhs[:-2])
        k = math.isqrt(math.prod(lhs) * math.prod(rhs) // (math.prod(output) * batch))
        return 2 * math.prod(output) * k
    if '"__cublas$' in instruction.text:  # (output, scratch memory)
        (lhs,), output = operand_shapes(instruction, shapes, 1), _FIRST.match(instruction.result)
        contracting = _CUBLAS.search(instruction.text)
        assert output is not None and contracting is not None, instruction.text
        return 2 * math.prod(ints(output[1])) * math.prod(lhs[d] for d in ints(contracting[1].replace('"', "")))
    return kernel_flops(instruction)


def _convolution(instruction: Instruction, shapes: Shapes) -> int:
    """2 × (places of the window that meet a number, over all places of the output) × batch × features in × out. Batches
    of products are dilated convolutions on TPU, whose other places meet zeros and cost nothing."""
    lhs, rhs = operand_shapes(instruction, shapes)
    output, labels = instruction.shape, _LABELS.search(instruction.text)
    assert output is not None and labels is not None, instruction.text
    sizes = [dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (lhs, rhs, output))]
    window = _WINDOW.search(instruction.text)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = {kind: int(count) for kind, count in _GROUPS.findall(instruction.text)}
    products = sizes[0]["b"] // groups.get("batch", 1) * sizes[1]["i"] * sizes[2]["f"]
    for axis in (name for name in sizes[1] if name.isdigit()):
        place = {name: values.split("x")[int(axis)] for name, values in settings.items()}
        products *= _meetings(sizes[0][axis], sizes[1][axis], sizes[2][axis], place)
    return 2 * products


def _meetings(size: int, window: int, outputs: int, place: dict[str, str]) -> int:
    """How many (output, place of the window) fall on one of the `size` numbers along an axis."""
    stride, dilate, spread = (int(place.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(place.get("pad", "0_0").split("_")[0])
    at = np.arange(outputs)[:, None] * stride - before + np.arange(window) * dilate
    return int(np.sum((at >= 0) & (at % spread == 0) & (at <= (size - 1) * spread)))
