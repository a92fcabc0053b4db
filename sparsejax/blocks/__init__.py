"""Floor 3: blocks, `(x, context, cache) -> BlockOutput`, and the registry of what a config may name in its layer
pattern."""

from sparsejax.base.registry import Registry
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.merged import MergedSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.soft import SoftSpec

BLOCKS = Registry("block", {"dense": DenseSpec, "moe": MoESpec, "soft": SoftSpec, "merged": MergedSpec})
