"""Decoding where each row leaves the model at the first exit that satisfies a rule, whatever the other rows do.

What the layers that a row skips remember of its token is the `keys` policy: `propagate`, keys and values from the state
that it left with (CALM, arXiv:2207.07061); `recompute`, nothing at first, and those of the full model once a later
token goes there (`exit_recompute`); `evict`, nothing (later tokens do not see it there); `share`, those of the last
layer that ran; `monotone`, nothing, but later tokens never run a layer that an earlier one has skipped, for the depth
falls with the number of sampled tokens and the top layers are kept (SkipDecode, arXiv:2307.02628)."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, Optional, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import RequestError, did_you_mean
from sparsejax.base.sharding import BATCH_AXES, zeros_of
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import Hidden
from sparsejax.blocks.tokens import EveryToken
from sparsejax.infer.exit_recompute import Owing, caught_up, noted, owing
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel
from sparsejax.model.partial import chosen_rows, embedded, features_at, logits_at, run_layers
from sparsejax.model.stack import Caches
from sparsejax.nn.attention import CACHE_SPECS, KVCache
from sparsejax.ops.exits import decaying_threshold, largest_two

Rule = Literal["max_prob", "margin", "entropy", "state_similarity", "patience"]
Keys = Literal["propagate", "recompute", "evict", "share", "monotone"]
RULES, POLICIES = get_args(Rule), get_args(Keys)


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A rule with the meaning that it has on exit tables (`infer.exit_rules`): confidences stop at `threshold` or more
    and never with 1, entropy (nats) stops below it and never with 0, patience after so many agreeing exits."""

    rule: Rule = "max_prob"
    threshold: float = 0.9
    keys: Keys = "propagate"
    decay: Optional[float] = None  # τ of CALM: confidences may be lower for later tokens
    compact: bool = True  # False: compute every layer for every row, and choose afterwards

    def __post_init__(self):
        for name, known in (("rule", RULES), ("keys", POLICIES)):
            if getattr(self, name) not in known:
                named = getattr(self, name)
                raise RequestError(f"exit {name} {named!r}; known: {', '.join(known)}.{did_you_mean(named, known)}")
        most = 1.0 if self.rule in ("max_prob", "margin", "state_similarity") else float("inf")
        if not 0 <= self.threshold <= most:
            raise RequestError(f"exit threshold {self.threshold}; allowed with {self.rule}: 0 to {most:g}")
        if not self.compact and self.keys != "propagate":
            raise RequestError(f"exit keys {self.keys}; computing every layer is the same as propagate alone")
        if self.decay is not None and (self.decay < 0 or most > 1 or self.keys == "monotone"):
            raise RequestError(f"exit decay {self.decay}; it is 0 or more, and lowers the threshold of a confidence")

    def check(self, config: ModelConfig) -> None:
        """Raises `RequestError` unless models of this config can decode so."""
        if not config.exits.depths:
            raise RequestError("the model has no exits (model.exits=none), and so no row can leave early")
        if config.memory and self.keys != "propagate":
            raise RequestError(f"exit keys {self.keys} with lookup layers (model.memory); allowed: propagate")
        if not all(isinstance(tokens, EveryToken) for tokens in (config.sequence, config.select)):
            message = "early exits want a model whose layers compute on every token"
            raise RequestError(f"{message} (model.sequence=none and model.select=none)")


@struct
class Seen:
    """What rules remember of the exit before; −1 and zeros at the first."""

    prediction: Int[Array, " B"]
    agreeing: Int[Array, " B"]
    features: Float[Array, "B D"]


def threshold_at(how: EarlyExit, threshold: Float[Array, ""], number: Int[Array, ""], tokens: int) -> Float[Array, ""]:
    """The threshold of sampled token `number` of `tokens`."""
    if how.decay is None:
        return threshold
    return decaying_threshold(threshold, number, tokens, how.decay)


def stops(
    rule: Rule, threshold: Float[Array, ""], logits_BV: Float[Array, "B V"], features_BD: Array, seen: Seen
) -> tuple[Bool[Array, " B"], Seen]:
    """Where the rule is content with an exit, and what it remembers of it."""
    prediction_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    agreeing_B = jnp.where(prediction_B == seen.prediction, seen.agreeing + 1, 0)
    now = Seen(prediction=prediction_B, agreeing=agreeing_B, features=features_BD)
    if rule == "patience":
        return agreeing_B >= threshold, now
    if rule == "state_similarity":
        wide, before = (x.astype(jnp.float32) for x in (features_BD, seen.features))
        norms_B = jnp.linalg.norm(wide, axis=-1) * jnp.linalg.norm(before, axis=-1)
        confidence_B = jnp.maximum((wide * before).sum(-1) / jnp.maximum(norms_B, 1e-30), 0)
        return (confidence_B >= threshold) & (threshold < 1), now
    log_p_BV = jax.nn.log_softmax(logits_BV)
    p_BV = jnp.exp(log_p_BV)
    if rule == "entropy":
        return -(p_BV * jnp.where(p_BV > 0, log_p_BV, 0)).sum(-1) < threshold, now
    best_B, second_B = largest_two(p_BV)
    confidence_B = best_B - second_B if rule == "margin" else best_B
    return (confidence_B >= threshold) & (threshold < 1), now


def exit_step(
    model: LanguageModel,
    how: EarlyExit,
    batch: Batch,
    caches: Caches | Owing,
    threshold: Float[Array, ""],
    number: Int[Array, ""],
    tokens: int,
) -> tuple[Float[Array, "B V"], Int[Array, " B"], Caches | Owing]:
    """(logits, layers run, caches) of one token of every row; `model` is unrolled. The logits are those of the exit
    that the row left at. `number` of `tokens` are sampled already. Keys that are recomputed are `Owing`, as `begun`
    made them."""
    config = model.config
    owed = caches if isinstance(caches, Owing) else None
    x, context, caches = embedded(model, batch, caches.caches if isinstance(caches, Owing) else caches)
    if how.keys == "monotone":
        return _on_schedule(model, how, x, context, caches, number, tokens)
    depths = (*config.exits.depths, config.num_layers)
    limit = threshold_at(how, threshold, number, tokens)
    active_B = batch.segments[:, 0] > 0

    def ask(depth: int, x: Hidden) -> tuple[Float[Array, "B V"], Float[Array, "B D"]]:
        features_BTD = features_at(model, x, batch, depth)
        whole_BTV = jax.sharding.reshard(logits_at(model, features_BTD, depth), P(BATCH_AXES, None, None))
        return whole_BTV[:, 0], features_BTD[:, 0]

    logits_BV, nothing_BD = zeros_of(functools.partial(ask, depths[0]), x)
    depth_B = jnp.zeros_like(batch.tokens[:, 0])
    seen = Seen(prediction=depth_B - 1, agreeing=depth_B, features=nothing_BD)
    first = 0
    for order, depth in enumerate(depths):
        run = active_B if how.compact else None
        before = x
        if owed is not None and order:
            owed = caught_up(model, dataclasses.replace(owed, caches=caches), order, active_B, batch.positions[:, 0])
            caches = owed.caches
        x, caches = run_layers(model, x, context, caches, range(first, depth), run, how.keys == "propagate")
        if not how.compact:
            x = chosen_rows(active_B, x, before)
        if owed is not None:
            owed = noted(owed, order, x, batch, active_B)

        asked = functools.partial(ask, depth)
        skip = functools.partial(zeros_of, asked)
        found_BV, features_BD = jax.lax.cond(active_B.any(), asked, skip, x) if how.compact else asked(x)
        content_B, seen = stops(how.rule, limit, found_BV, features_BD, seen)
        leaves_B = active_B & (content_B | (depth == config.num_layers))
        logits_BV = jnp.where(leaves_B[:, None], found_BV, logits_BV)
        depth_B = jnp.where(leaves_B, depth, depth_B)
        active_B, first = active_B & ~leaves_B, depth
    if how.keys == "share":
        caches = _shared(caches, batch, depth_B, config.num_layers)
    return logits_BV, depth_B, caches if owed is None else dataclasses.replace(owed, caches=caches)


def begun(model: LanguageModel, how: EarlyExit, caches: Caches, length_B: Int[Array, " B"]) -> Caches | Owing:
    """What `exit_step` goes on from, when full layers have filled caches with so many tokens of each row."""
    return owing(model, caches, length_B) if how.keys == "recompute" else caches


def schedule(depths: tuple[int, ...], number: Int[Array, ""], tokens: int) -> Int[Array, ""]:
    """Layers run for sampled token `number`: from all for the first, linearly down to `depths[0]` for the last."""
    most, least = depths[-1], depths[0]
    share = number / jnp.maximum(tokens - 1, 1)
    return jnp.clip(jnp.ceil(most - (most - least) * share), least, most).astype(jnp.int32)


def _on_schedule(model, how, x, context, caches, number, tokens):
    """The first layer and the top ones, as many as the schedule says; the head is the model's own."""
    layers, batch = model.config.num_layers, context.batch
    depth = schedule((*model.config.exits.depths, layers), number, tokens)
    real_B = batch.segments[:, 0] > 0
    for layer in range(layers):
        runs = jnp.asarray(layer == 0) | (layer >= layers - depth + 1)
        x, caches = run_layers(model, x, context, caches, [layer], real_B & runs, skipped_keys=False)
    logits_BV = logits_at(model, features_at(model, x, batch, layers), layers)[:, 0]
    return logits_BV, jnp.where(real_B, depth, 0), caches


def _shared(caches: Caches, batch: Batch, depth_B: Int[Array, " B"], layers: int) -> Caches:
    """Keys and values of the layers that a row has skipped are those of the last that it ran."""

    def local(keys: list[KVCache], place_B1: Array, segment_B1: Array, depth_B: Array) -> list[KVCache]:
        row_B1 = jnp.arange(len(depth_B))[:, None]
        put = lambda store, new: store.at[row_B1, place_B1].set(new)  # noqa: E731
        last, found = (keys[0].k[row_B1, place_B1], keys[0].v[row_B1, place_B1]), []
        for layer, of_layer in enumerate(keys):
            ran_B111 = (depth_B > layer)[:, None, None, None]
            own = of_layer.k[row_B1, place_B1], of_layer.v[row_B1, place_B1]
            last = tuple(jnp.where(ran_B111, new, old) for new, old in zip(own, last, strict=True))
            seen = put(of_layer.segments, segment_B1)
            found.append(KVCache(k=put(of_layer.k, last[0]), v=put(of_layer.v, last[1]), segments=seen))
        return found

    rows: Any = P(BATCH_AXES)
    keys: Any = [caches[f"prefix_{layer}"].attention for layer in range(layers)]  # every block has attention
    run = jax.shard_map(
        local, in_specs=([CACHE_SPECS] * layers, rows, rows, rows), out_specs=[CACHE_SPECS] * layers, check_vma=False
    )
    shared = run(keys, batch.positions, batch.segments, depth_B)
    moved = {f"prefix_{n}": dataclasses.replace(caches[f"prefix_{n}"], attention=each) for n, each in enumerate(shared)}
    return {**caches, **moved}
