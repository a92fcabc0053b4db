"""Floor 3: blocks, `(x, context, cache) -> BlockOutput`, and the registry of what a config may name in its layer
pattern."""

from sparsejax.base.registry import Registry
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec

BLOCKS = Registry("block", {"dense": DenseSpec, "moe": MoESpec})
