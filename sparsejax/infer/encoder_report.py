"""What leaving early did to a classifier, as sums over batches, and what it cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sparsejax.base.structs import struct
from sparsejax.infer.encoder_exit import Departures
from sparsejax.infer.exit_table import log_softmax
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import layer_cost, mean_keys


@struct
class EncoderReport:
    """Sums over rows that have a class; E exits, the last of which is the whole model. FLOPs are `ideal`, of the tokens
    and layers of each row and the heads that it asked; `padded`, of whole rungs of full rows; `compiled`, by XLA's
    count; and `full`, of all layers and one head for every row, without padding."""

    rows: int
    correct: int
    cross_entropy: float
    left: Int[np.ndarray, " E"]
    ideal: float
    padded: float
    compiled: float
    full: float
    seconds: float


def reported(config: ModelConfig, batch: Mapping[str, np.ndarray], found: Departures) -> EncoderReport:
    """Of one batch."""
    real_N = batch["segments"].any(-1)
    target_N, exits_N = batch["targets"][real_N, 0], found.exits[real_N]
    log_p_NC = log_softmax(found.logits[real_N])
    exits = len(config.exits.depths) + 1
    lengths_N, length = (batch["segments"][real_N] > 0).sum(-1), batch["segments"].shape[1]
    through = np.array([exit_costs(config, int(tokens)) for tokens in lengths_N]).reshape(-1, exits)
    of_segments = np.diff(exit_costs(config, length), prepend=0.0)[: len(found.rungs)]
    heads_before = head_cost(config, length) * (exits - 1)
    return EncoderReport(
        rows=int(real_N.sum()),
        correct=int((found.logits[real_N].argmax(-1) == target_N).sum()),
        cross_entropy=-float(np.take_along_axis(log_p_NC, target_N[:, None], axis=-1).sum()),
        left=np.bincount(exits_N, minlength=exits),
        ideal=float(np.take_along_axis(through, exits_N[:, None], axis=1).sum()),
        padded=float(np.dot(of_segments, found.rungs)),
        compiled=found.compiled_flops,
        full=float((through[:, -1] - heads_before).sum()),
        seconds=found.seconds,
    )


def exit_costs(config: ModelConfig, tokens: int) -> Float[np.ndarray, " E"]:
    """FLOPs of a row of so many tokens up to each exit, with the heads on its way."""
    costs = [
        tokens * layer_cost(config, layer.block).flops(mean_keys(config, tokens), tokens) for layer in config.layers
    ]
    depths, head = (*config.exits.depths, config.num_layers), head_cost(config, tokens)
    return np.array([sum(costs[:depth]) + head * number for number, depth in enumerate(depths, 1)], np.float64)


def head_cost(config: ModelConfig, tokens: int) -> float:
    """FLOPs of one head on a row of so many tokens."""
    head = config.head.cost(config.vocab_size, config.streams.head_width(config.d_model), config.tied_head)
    return tokens * head.per_token + head.per_row


def as_row(config: ModelConfig, total: EncoderReport) -> dict[str, Any]:
    """The ratios and counts of a whole pass, as `eval` prints them."""
    depths, rows = (*config.exits.depths, config.num_layers), max(total.rows, 1)
    flops = {name: getattr(total, name) for name in ("ideal", "padded", "compiled", "full")}
    return {
        "targets": total.rows,
        "cross_entropy": total.cross_entropy / rows,
        "accuracy": total.correct / rows,
        "exits": {
            "histogram": {str(depth): int(count) for depth, count in zip(depths, total.left, strict=True)},
            "mean_layer": float(np.dot(depths, total.left)) / rows,
            "flops": flops,
        },
        "examples_per_second": total.rows / max(total.seconds, 1e-9),
    }
