"""Floor 3: blocks, `(x, context, cache) -> BlockOutput`, and the registries of what a config may name in its layer
pattern, of the residuals that join them, of what they compute on along a row, and of where tokens halt."""

from sparsejax.base.registry import Registry
from sparsejax.blocks.altup import AltUp, DynamicAltUp
from sparsejax.blocks.attention import AttentionSpec
from sparsejax.blocks.conditional_adapters import ConditionalAdapters
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.halting import NoHalting
from sparsejax.blocks.halting_methods import AdaptiveComputationTime, AViT, PonderNet
from sparsejax.blocks.hyper_connections import HyperConnections, ManifoldHyperConnections
from sparsejax.blocks.layer_routing import LayerRouting
from sparsejax.blocks.light_heavy import LightHeavySpec
from sparsejax.blocks.merged import MergedSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.recursion import MixtureOfRecursions, RandomRecursions
from sparsejax.blocks.selection import MixtureOfDepths, RandomTokens
from sparsejax.blocks.sequence import AveragePooling, SequenceAltUp, StrideAndSkip
from sparsejax.blocks.skim import NoSkim
from sparsejax.blocks.skim_methods import LearnedThreshold, PowerBert, Schedule, TokenMerging, Transkimmer
from sparsejax.blocks.soft import SoftSpec
from sparsejax.blocks.streams import OneStream
from sparsejax.blocks.tokens import EveryToken

BLOCKS = Registry(
    "block",
    {
        "dense": DenseSpec,
        "moe": MoESpec,
        "soft": SoftSpec,
        "merged": MergedSpec,
        "attention": AttentionSpec,
        "light_heavy": LightHeavySpec,
    },
)
RESIDUALS = Registry(
    "residual",
    {
        "none": OneStream,
        "altup": AltUp,
        "dynamic_altup": DynamicAltUp,
        "hyper_connections": HyperConnections,
        "mhc": ManifoldHyperConnections,
    },
)
SEQUENCES = Registry(
    "sequence", {"none": EveryToken, "altup": SequenceAltUp, "skip": StrideAndSkip, "pool": AveragePooling}
)
SELECTIONS = Registry(
    "selection",
    {
        "none": EveryToken,
        "mixture_of_depths": MixtureOfDepths,
        "random": RandomTokens,
        "mixture_of_recursions": MixtureOfRecursions,
        "random_recursions": RandomRecursions,
        "d_llm": LayerRouting,
        "coda": ConditionalAdapters,
    },
)
SKIMS = Registry(
    "skim",
    {
        "none": NoSkim,
        "ltp": LearnedThreshold,
        "power_bert": PowerBert,
        "transkimmer": Transkimmer,
        "schedule": Schedule,
        "tome": TokenMerging,
    },
)
HALTINGS = Registry(
    "halting", {"none": NoHalting, "act": AdaptiveComputationTime, "a_vit": AViT, "ponder_net": PonderNet}
)
