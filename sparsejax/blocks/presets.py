"""Blocks by the names of their papers, where a router's preset (`routers.presets`) does not say it all.

from sparsejax.blocks import presets

config.model.blocks.soft = presets.soft_moe()
config.model.pattern = ("dense", "soft")
"""

from sparsejax.blocks.merged import MergedSpec
from sparsejax.blocks.soft import SoftSpec


def soft_moe() -> SoftSpec:
    """Experts on mixtures of tokens (arXiv:2308.00951). Not causal: the paper's models see images whole."""
    return SoftSpec(allow_leak=True)


def smear() -> MergedSpec:
    """Experts merged by the mean of the whole row (arXiv:2306.03745). Not causal: the paper's examples are inputs of an
    encoder."""
    return MergedSpec(segment_length=None, allow_leak=True)


def lory() -> MergedSpec:
    """Experts merged by the segment before (arXiv:2405.03133), the first segment by itself, in which it is not
    causal."""
    return MergedSpec(segment_length=256, first_segment="own", allow_leak=True)
