"""FLOPs of Pallas kernels: what a kernel says of itself, or what is known of it by its name."""

import math
import re
from collections.abc import Callable
from typing import Optional

from sparsejax.ops.attention import BIDIRECTIONAL
from sparsejax.plan.hlo import Instruction, ints, scope_of

_TOLD = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_BLOCK = re.compile(r"block_q(?:_dq|_dkv)?\W+(\d+)")
_FIRST_FLOATS = re.compile(r"operand_layout_constraints=\{.*?b?f\d+\[([\d,]*)\]")


def kernel_flops(instruction: Instruction) -> Optional[int]:
    """FLOPs of one execution; None for what is no kernel, or an unknown one that does not tell."""
    if '"tpu_custom_call"' not in instruction.text:
        return None
    if told := _TOLD.search(instruction.text):
        return int(told[1])
    scope = scope_of(instruction)
    return next((count(instruction) for name, count in KERNELS.items() if name in scope), None)


def _splash(products: int) -> Callable[[Instruction], int]:
    """Of flash attention: so many products of `[T, T]`, `[T, H]` for each head, over the blocks that are not wholly
    masked: with a causal mask, those up to the diagonal."""

    def count(instruction: Instruction) -> int:
        # Operands: tables of the mask, then queries [..., N, T, H].
        queries, block = _FIRST_FLOATS.search(instruction.text), _BLOCK.search(instruction.text)
        if queries is None or block is None:
            raise ValueError(f"{instruction.name}: queries or blocks of the kernel are not in the text")
        *heads, length, width = ints(queries[1])
        size = int(block[1])
        blocks = math.ceil(length / size)
        seen = blocks**2 if BIDIRECTIONAL in scope_of(instruction) else blocks * (blocks + 1) // 2
        return products * 2 * math.prod(heads) * width * size**2 * seen

    return count


KERNELS = {
    "splash_mha_fwd": _splash(2),  # Q Kᵀ and P V
    "splash_mha_dq": _splash(3),  # Q Kᵀ, dO Vᵀ and dS K
    "splash_mha_dkv": _splash(4),  # Q Kᵀ, dO Vᵀ, Pᵀ dO and dSᵀ Q
}
"""A part of the kernel's name → its FLOPs."""
