"""The block without a feed-forward network: attention, and what lookup layers bring."""

from dataclasses import dataclass

from jaxtyping import PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.spec import BlockSpec
from sparsejax.nn.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(BlockSpec):
    """Config of a block of attention alone. A lookup layer after it that has matrices of its own stands in the place of
    the network: with `consume=up_projection` it is a gated one whose up-projection is a table (STEM)."""

    has_network = False

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> TransformerBlock:
        return TransformerBlock(key, backbone, None)

    def check_some_tokens(self) -> None:
        pass  # every token by itself

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return {}
