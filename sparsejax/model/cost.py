"""What a model costs, from its config alone: parameters, active parameters and FLOPs, by component.

FLOPs are 2 × the multiply-adds of matrix products. A forward pass costs `per_token` for every token, `per_key` for every key that
a query attends to (a causal row of T tokens: T (T + 1) / 2), and `per_pair` for every (token, expert) pair an expert processes.
Training is 3 × the forward pass; element-wise work, the optimizer and recomputation are left out.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Optional

from sparsejax.blocks.context import BlockSpec
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig

TRAINING = 3
"""Forward and backward pass in units of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one component. `active` are the parameters a token's forward pass uses."""

    parameters: int = 0
    active: int = 0
    per_token: int = 0
    per_key: int = 0
    per_pair: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})


def component_costs(config: ModelConfig) -> dict[str, Cost]:
    """Component → cost over all layers: embedding, head, norm, attention, mlp, router, experts, shared_experts."""
    costs: dict[str, Cost] = {"embedding": _table(config, per_token=0), "head": _head(config), "norm": _norms(config)}
    for block, count in Counter(layer.block for layer in config.layers).items():
        parts = {"attention": _attention(config)} | _feed_forward(config, config.blocks[block])
        for name, cost in parts.items():
            for _ in range(count):
                costs[name] = costs[name] + cost if name in costs else cost
    return costs


def total(config: ModelConfig) -> Cost:
    """The whole model's cost."""
    return sum(component_costs(config).values(), Cost())


def forward_flops(config: ModelConfig, tokens: float, keys: float, pairs: Optional[float] = None) -> float:
    """FLOPs of a forward pass over `tokens` tokens with `keys` (query, key) pairs per layer.

    Args:
      pairs: (token, expert) pairs processed, per MoE layer and expert FLOPs alike, summed over layers: ideal work is what was
        selected and not dropped. None: every token's k pairs, in every layer.
    """
    cost = total(config)
    fixed = tokens * cost.per_token + keys * cost.per_key
    return fixed + (tokens * routed_flops(config) if pairs is None else pairs)


def routed_flops(config: ModelConfig) -> int:
    """FLOPs per token of the routed experts when nothing is dropped, over all layers."""
    return sum(pair_flops(config, config.blocks[layer.block]) * _k(config.blocks[layer.block]) for layer in config.layers)


def pair_flops(config: ModelConfig, spec: BlockSpec) -> int:
    """FLOPs of one expert on one token; 0 for a block without experts."""
    return _ffn_weights(config, spec.hidden(config), spec.gated) * 2 if isinstance(spec, MoESpec) else 0


def _k(spec: BlockSpec) -> int:
    return spec.experts_per_token if isinstance(spec, MoESpec) else 0


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


def _attention(config: ModelConfig) -> Cost:
    d, n, m, h = config.d_model, config.num_heads, config.kv_heads, config.width_of_head
    size = 2 * d * n * h + 2 * d * m * h
    return Cost(parameters=size, active=size, per_token=2 * size, per_key=2 * 2 * n * h)


def _feed_forward(config: ModelConfig, spec: BlockSpec) -> dict[str, Cost]:
    if isinstance(spec, DenseSpec):
        size = _ffn_weights(config, spec.hidden(config), spec.gated)
        return {"mlp": Cost(parameters=size, active=size, per_token=2 * size)}
    if isinstance(spec, MoESpec):
        router, expert = config.d_model * spec.num_experts, _ffn_weights(config, spec.hidden(config), spec.gated)
        parts = {
            "router": Cost(parameters=router, active=router, per_token=2 * router),
            "experts": Cost(parameters=spec.num_experts * expert, active=spec.experts_per_token * expert, per_pair=2 * expert),
        }
        shared = spec.shared_experts * expert
        return parts | ({"shared_experts": Cost(parameters=shared, active=shared, per_token=2 * shared)} if shared else {})
    raise TypeError(f"no cost model for {type(spec).__name__}")


def _ffn_weights(config: ModelConfig, d_ff: int, gated: bool) -> int:
    return (3 if gated else 2) * config.d_model * d_ff
