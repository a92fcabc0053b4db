"""What a model costs, from its config alone: parameters, active parameters and FLOPs, by component.

FLOPs are 2 × the multiply-adds of matrix products. A forward pass costs `per_token` for every token, `per_key` for
every key that a query attends to (`causal_keys` on a row of one document), and `routed` for every token whose k pairs
are all processed. Training is 3 × the forward pass; element-wise work, the optimizer and recomputation are left out.
"""

from dataclasses import dataclass
from typing import Optional

from sparsejax.blocks.context import BlockSpec
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig

TRAINING = 3
"""Forward and backward pass in units of the forward pass."""

COMPONENTS = (
    "embedding",
    "head",
    "norm",
    "attention_projections",
    "attention_scores",
    "mlp",
    "router",
    "experts",
    "shared_experts",
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one component. `active` are the parameters that a token's forward pass uses: k of E experts, all else whole.

    An embedding table counts whole, too, as is usual, though a token reads one row of it.
    """

    parameters: int = 0
    active: int = 0
    per_token: int = 0
    per_key: int = 0
    routed: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def flops(self, keys: float) -> float:
        """Of one token that attends to `keys` keys in every layer, forward, none of its pairs being dropped."""
        return self.per_token + keys * self.per_key + self.routed


def component_costs(config: ModelConfig) -> dict[str, Cost]:
    """Component → cost over all layers; those of `COMPONENTS` that the model has, in that order."""
    costs = {"embedding": _table(config, per_token=0), "head": _head(config), "norm": _norms(config)}
    for layer in config.layers:
        for name, cost in (_attention(config) | _feed_forward(config, config.blocks[layer.block])).items():
            costs[name] = costs.get(name, Cost()) + cost
    return {name: costs[name] for name in COMPONENTS if name in costs}


def total(config: ModelConfig) -> Cost:
    """The whole model's cost."""
    return sum(component_costs(config).values(), Cost())


def causal_keys(sequence_length: int) -> float:
    """Keys that a token of a row attends to, on average, when the row is one document."""
    return (sequence_length + 1) / 2


def forward_flops(config: ModelConfig, tokens: float, keys: float, routed: Optional[float] = None) -> float:
    """FLOPs of a forward pass over `tokens` tokens with `keys` (query, key) pairs in each layer.

    Args:
      routed: FLOPs of the experts over all layers, Σ processed pairs · `pair_flops`: ideal work is what was selected
        and not dropped. None: every token's k pairs, in every layer.
    """
    cost = total(config)
    return tokens * cost.per_token + keys * cost.per_key + (tokens * cost.routed if routed is None else routed)


def pair_flops(config: ModelConfig, spec: BlockSpec) -> int:
    """FLOPs of one expert on one token; 0 for a block without experts."""
    return 2 * _ffn_weights(config, spec.hidden(config), spec.gated) if isinstance(spec, MoESpec) else 0


def _table(config: ModelConfig, per_token: int) -> Cost:
    size = config.vocab_size * config.d_model
    return Cost(parameters=size, active=size, per_token=per_token)


def _head(config: ModelConfig) -> Cost:
    flops = 2 * config.vocab_size * config.d_model
    return Cost(per_token=flops) if config.tied_head else _table(config, per_token=flops)


def _norms(config: ModelConfig) -> Cost:
    per_layer = 2 * config.d_model + (2 * config.width_of_head if config.qk_norm else 0)
    size = config.d_model + config.num_layers * per_layer
    return Cost(parameters=size, active=size)


def _attention(config: ModelConfig) -> dict[str, Cost]:
    d, n, m, h = config.d_model, config.num_heads, config.kv_heads, config.width_of_head
    size = 2 * d * n * h + 2 * d * m * h
    return {
        "attention_projections": Cost(parameters=size, active=size, per_token=2 * size),
        "attention_scores": Cost(per_key=2 * 2 * n * h),  # queries · keys, weights · values
    }


def _feed_forward(config: ModelConfig, spec: BlockSpec) -> dict[str, Cost]:
    if isinstance(spec, DenseSpec):
        return {"mlp": _everywhere(_ffn_weights(config, spec.hidden(config), spec.gated))}
    if isinstance(spec, MoESpec):
        k, expert = spec.experts_per_token, _ffn_weights(config, spec.hidden(config), spec.gated)
        routed = Cost(parameters=spec.num_experts * expert, active=k * expert, routed=k * pair_flops(config, spec))
        parts = {"router": _everywhere(config.d_model * spec.num_experts), "experts": routed}
        return parts | ({"shared_experts": _everywhere(spec.shared_experts * expert)} if spec.shared_experts else {})
    raise TypeError(f"no cost model for {type(spec).__name__}")


def _everywhere(weights: int) -> Cost:
    """Of matrices that every token is multiplied with."""
    return Cost(parameters=weights, active=weights, per_token=2 * weights)


def _ffn_weights(config: ModelConfig, d_ff: int, gated: bool) -> int:
    return (3 if gated else 2) * config.d_model * d_ff
