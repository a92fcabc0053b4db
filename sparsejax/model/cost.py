"""What a model costs, from its config alone: parameters, active parameters and FLOPs, by component.

FLOPs are 2 × the multiply-adds of matrix products. A forward pass costs `per_token` for every token, `per_key` for
every key that a query attends to (`mean_keys` on a row of one document), `routed` for every token whose k pairs are
all processed, and `per_row` for every row. Training is 3 × the forward pass; element-wise work, the optimizer and
recomputation are left out.
"""

from collections import Counter
from typing import Optional

from sparsejax.base.cost import Cost
from sparsejax.blocks.budgets import Work
from sparsejax.model.config import ModelConfig
from sparsejax.model.tables import layers_of

TRAINING = 3
"""Forward and backward pass in units of the forward pass."""

COMPONENTS = (
    "embedding",
    "head",
    "exit_heads",
    "norm",
    "attention_projections",
    "attention_scores",
    "mlp",
    "router",
    "experts",
    "constant_experts",
    "shared_experts",
    "streams",
    "stream_projections",
    "sequence",
    "selection",
    "skim",
    "halting",
)


def component_costs(config: ModelConfig) -> dict[str, Cost]:
    """Component → cost over all layers: those of `COMPONENTS` that the model has, in that order, then any others."""
    costs = {"embedding": _table(config), "head": _head(config), "norm": _norms(config)}
    costs |= config.streams.end_costs(config)
    own_head = config.head.cost(config.vocab_size, config.streams.head_width(config.d_model), tied=False)
    costs |= config.exits.costs(own_head, config.streams.norm_width(config.d_model))
    costs |= config.halting.head_costs(config.vocab_size, config)
    for layer in config.layers:
        for name, cost in layer_costs(config, layer.block).items():
            again = config.stored(layer) != layer.repeat  # with parameters that an earlier repeat has, too
            costs[name] = costs.get(name, Cost()) + (cost.again() if again else cost)
    for block, layers in Counter(layer.block for layer in config.layers).items():
        for name, cost in config.blocks[block].pool_costs(config, layers).items():
            costs[name] = costs.get(name, Cost()) + cost
    for memory, spec in config.memory.items():
        for name, cost in spec.costs(config, config.vocab_size, len(layers_of(config, memory))).items():
            costs[name] = costs.get(name, Cost()) + cost
    return {name: costs[name] for name in dict.fromkeys([*COMPONENTS, *costs]) if name in costs}


def layer_cost(config: ModelConfig, block: str) -> Cost:
    """Of one layer with this block spec, attention included."""
    return sum(layer_costs(config, block).values(), Cost())


def total(config: ModelConfig) -> Cost:
    """The whole model's cost."""
    return sum(component_costs(config).values(), Cost())


def mean_keys(config: ModelConfig, sequence_length: int) -> float:
    """Keys that a token of a row attends to, on average, when the row is one document."""
    return (sequence_length + 1) / 2 if config.causal else sequence_length


def forward_flops(
    config: ModelConfig, tokens: float, keys: float, routed: Optional[float] = None, rows: float = 0.0
) -> float:
    """FLOPs of a forward pass over `tokens` tokens with `keys` (query, key) pairs in each layer.

    Args: routed: FLOPs of the experts over all layers, Σ `BlockSpec.processed_flops`: ideal work is what was selected
      and not dropped. None: every token's k pairs and the work of `rows` rows, in every layer."""
    costs = component_costs(config)
    cost, heads = sum(costs.values(), Cost()), costs["head"] + costs.get("exit_heads", Cost())
    of_experts = tokens * cost.routed + rows * (cost.per_row - heads.per_row) if routed is None else routed
    return tokens * cost.per_token + keys * cost.per_key + rows * heads.per_row + of_experts


def layer_costs(config: ModelConfig, block: str) -> dict[str, Cost]:
    """Component → cost of one layer with this block spec."""
    of_block = _attention(config) | config.blocks[block].costs(config)
    alike = sum(layer.block == block for layer in config.layers)
    of_layer = config.tokens_of(block).costs(of_block, config, alike)
    return of_layer | config.skim.costs(config) | config.halting.costs(config) | config.streams.costs(config)


def spared_work(config: ModelConfig, block: str) -> Work:
    """What tokens that leave spare a layer with this block spec."""
    costs = layer_costs(config, block)
    before, after = costs["attention_projections"].per_token, costs["mlp"].per_token
    return Work(before=before, pair=costs["attention_scores"].per_key, after=after)


def _table(config: ModelConfig) -> Cost:
    size = config.vocab_size * config.streams.table_width(config.d_model)
    return Cost(parameters=size, active=size)


def _head(config: ModelConfig) -> Cost:
    return config.head.cost(config.vocab_size, config.streams.head_width(config.d_model), config.tied_head)


def _norms(config: ModelConfig) -> Cost:
    per_layer = config.d_model + (2 * config.width_of_head if config.qk_norm else 0)
    own = [config.blocks[layer.block] for layer in config.layers if config.stored(layer) == layer.repeat]
    networks = sum(block.has_network for block in own)
    size = config.streams.norm_width(config.d_model) + len(own) * per_layer + networks * config.d_model
    return Cost(parameters=size, active=size)


def _attention(config: ModelConfig) -> dict[str, Cost]:
    d, n, m, h = config.d_model, config.num_heads, config.kv_heads, config.width_of_head
    size = 2 * d * n * h + 2 * d * m * h
    return {
        "attention_projections": Cost(parameters=size, active=size, per_token=2 * size),
        "attention_scores": Cost(per_key=2 * 2 * n * h),  # queries · keys, weights · values
    }
