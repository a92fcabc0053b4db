"""What decoding costs in FLOPs: of the layers that rows really wanted, and of those that ran because some row did."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.exit_recompute import CHUNK
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import layer_cost


def decode_flops(
    config: ModelConfig, how: EarlyExit, depths_BT: Int[np.ndarray, "B T"], lengths: Sequence[int]
) -> dict[str, float]:
    """FLOPs of sampling tokens that took so many layers, after prompts of these `lengths`: `ideal`, `padded`, where a
    layer runs for all rows while one of them wants it, and `full`, of all layers and one head. Heads of the exits and
    keys and values of skipped layers count, and so do, where they are recomputed, the layers that do it."""
    rows, tokens = depths_BT.shape
    keys_BT = np.asarray(lengths)[:, None] + np.arange(tokens)
    padded_BT = np.broadcast_to(depths_BT.max(0), (rows, tokens))
    costs = [layer_cost(config, layer.block) for layer in config.layers]
    fixed = np.cumsum([0, *(cost.per_token + cost.routed for cost in costs)])
    per_key = np.cumsum([0, *(cost.per_key for cost in costs)])
    head = 2 * config.vocab_size * config.streams.head_width(config.d_model)
    remembered = 2 * 2 * config.d_model * config.kv_heads * config.width_of_head if how.keys == "propagate" else 0
    exits = np.array([*config.exits.depths, config.num_layers])

    def of(depths_BT: Int[np.ndarray, "B T"], ran_BT: Int[np.ndarray, "B T"]) -> float:
        asked_BT = 1 if how.keys == "monotone" else (exits[:, None, None] <= depths_BT).sum(0)
        layers_BT = fixed[ran_BT] + per_key[ran_BT] * keys_BT
        return float((layers_BT + asked_BT * head + (config.num_layers - depths_BT) * remembered).sum())

    full = fixed[-1] + per_key[-1] * keys_BT + head
    if how.keys != "recompute":
        return {"ideal": of(depths_BT, depths_BT), "padded": of(padded_BT, padded_BT), "full": float(full.sum())}
    # A token has run what any later one of its row has.
    ran_BT = np.maximum.accumulate(depths_BT[:, ::-1], axis=1)[:, ::-1]
    chunks = _chunks(depths_BT, exits)
    last = np.asarray(lengths).mean() + tokens / 2  # keys of a token that is caught up with, about
    between = [fixed[b] - fixed[a] + (per_key[b] - per_key[a]) * last for a, b in itertools.pairwise(exits)]
    padded = of(padded_BT, padded_BT) + rows * CHUNK * float(np.dot(between, chunks))
    return {"ideal": of(depths_BT, ran_BT), "padded": padded, "full": float(full.sum())}


def _chunks(depths_BT: Int[np.ndarray, "B T"], exits: Int[np.ndarray, " E"]) -> list[int]:
    """How often, for each exit but the last, a chunk of the tokens that had stopped there ran the layers up to the
    next: as often as the row wanted it that had most of them."""
    rows, tokens = depths_BT.shape
    found = []
    for exit in exits[:-1]:
        done_B, count = np.zeros(rows, int), 0
        for token in range(tokens):
            goes_B = depths_BT[:, token] > exit
            count += -(-int(np.where(goes_B, token - done_B, 0).max()) // CHUNK)
            done_B = np.where(goes_B, token + 1, done_B)
        found.append(count)
    return found
