"""Passages: what a model did with every token of some rows of the validation split, at each evaluation in training.

`passages/STEP.npz` holds, P rows of T tokens being told of:

* `tokens` int32 `[P, T]`, the text as it stands in the corpus; `segments` int32 `[P, T]`, 0 for padding;
* `nats` float32 `[P, T]`: the loss of this token given those before it, of an encoder the loss of a token that was
  hidden, of a classifier that of the class, at the first token. NaN where nothing was predicted;
* `source` int16 `[P, T]`, −1 for padding, and `source_names` `[S]`: the corpus' domain of each token's document;
* for every layer with experts that routes token by token: `LAYER/experts` int16 `[P, T, K]`, −1 for none, in the order
  of the token's choices; `LAYER/weights` float32 and `LAYER/processed` bool of the same shape. K is the largest number
  of pairs of one of these tokens;
* for every layer that need not compute on all tokens: `LAYER/kept` bool `[P, T]`, those that it computed on. Where
  tokens halt, in place of that, `halting/steps` int32 `[P, T]`: how many layers each took;
* for every lookup layer: `LAYER/MEMORY/rows` int32 `[P, T, H]`, the rows it read of its table, −1 for none;
* with exits: `exit/layers` int32 `[X]`, after how many layers there is one, the model's own the last; `exit/nats` and
  `exit/top` float32 `[P, T, X]`: their losses, and the probability of what each finds likeliest, as `nats` stands;
* `absent` `[N]`, if anything cannot be told: lines that say what, and why."""

from collections.abc import Callable
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sparsejax.base.reports import Recorded, split_recorded
from sparsejax.base.sharding import BATCH_AXES, host_rows, shard_batch, to_numpy
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.halting import NoHalting
from sparsejax.data.corpus import Corpus
from sparsejax.data.loader import eval_batches
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel, ModelOutput
from sparsejax.model.partial import logits_at
from sparsejax.model.tables import Reads
from sparsejax.ops.head_loss import pieces
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.metrics import Arrays
from sparsejax.train.state import Variables, abstract_model
from sparsejax.train.step import Microbatches, losses_in_evaluation
from sparsejax.train.trace import by_layer


@struct
class PassageReport:
    """Of one microbatch, token by token."""

    nll: tuple[Float[Array, "B T"], ...]  # of every exit, the model's own the last; 0 where there is no target
    top: Optional[Float[Array, "B S X"]]  # of the same, the largest probability
    recorded: Recorded
    reads: Reads


def make_passage_step(config: ExperimentConfig) -> Callable[[Variables, Microbatches], PassageReport]:
    """One microbatch `[1, B, …]` as an evaluation sees it."""
    graph, _, _ = abstract_model(config.model)

    def passage_step(variables: Variables, microbatches: Microbatches) -> PassageReport:
        batch = Batch(**{name: rows[0] for name, rows in microbatches.items()})
        model = nnx.merge(graph, variables.params, variables.model_state)
        out = model(batch, mode="eval", record=True)
        return PassageReport(
            nll=losses_in_evaluation(config, model, out, batch).nll,
            top=likeliest(model, out) if out.exits else None,
            recorded=split_recorded(out.reports)[1],
            reads=out.reads,
        )

    return passage_step


def likeliest(model: LanguageModel, out: ModelOutput) -> Float[Array, "B S X"]:
    """The largest probability that the head of each exit, and of the model, gives. The logits of a whole batch are
    never there."""
    config, features = model.config, (*out.exits, out.features)
    depths, (rows, length) = (*config.exits.depths, config.num_layers), out.features.shape[:2]
    classes = config.head.logits(1, 1, config.vocab_size, 1)[1]
    number = pieces(length, rows * classes * len(depths))
    cut = lambda a: jnp.moveaxis(a.reshape(rows, number, length // number, -1), 1, 0)  # noqa: E731

    def of_piece(features: tuple[Array, ...]) -> Array:
        logits = [logits_at(model, x, depth) for x, depth in zip(features, depths, strict=True)]
        logits = [jax.sharding.reshard(each, P(BATCH_AXES, None, None)) for each in logits]
        return jnp.stack([jnp.exp(each.max(-1) - jax.nn.logsumexp(each, -1)) for each in logits], -1)

    found = jax.lax.map(of_piece, jax.tree.map(cut, features))
    return jnp.moveaxis(found, 0, 1).reshape(rows, length, len(depths))


PLACES = 4
"""Of the validation split that rows come from: its text changes along the way."""


class Passages:
    """Tells of models of one config, always of the same rows. One compile.

    The rows come in the microbatches of an evaluation, so that groups, and with them who finds a slot, are those of the
    evaluation."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, mesh: jax.sharding.Mesh):
        self.config, self.corpus, self.mesh = config, corpus, mesh
        self._step: Optional[Callable[..., PassageReport]] = None
        self._batches: list[dict[str, np.ndarray]] = []  # this process's rows

    def __call__(self, variables: Variables) -> Arrays:
        """The arrays of the file; none if no row is wanted. All processes make the call."""
        wanted, size = self.config.eval.passages, self.config.microbatch_size
        if not wanted:
            return {}
        if self._step is None:
            data = self.config.data
            places = max(min(wanted, PLACES), -(-wanted // size))
            self._batches = list(eval_batches(self.corpus, data, size, places, host_rows(self.mesh, size, 1)))
            arrays = shard_batch(self._batches[0], self.mesh, 1)
            self._step = jax.jit(make_passage_step(self.config)).lower(variables, arrays).compile()
        parts, each = [], -(-wanted // len(self._batches))  # rows of a batch
        for batch in self._batches:
            arrays = shard_batch(batch, self.mesh, 1)
            report = jax.tree.map(to_numpy, self._step(variables, arrays))
            told = _told(self.config, {name: to_numpy(rows[0]) for name, rows in arrays.items()}, report)
            real = np.flatnonzero(told["segments"].any(axis=1))[:each]  # the last batch may have empty rows
            parts.append({name: array[real] for name, array in told.items()})
        joined = {name: np.concatenate([part[name] for part in parts])[:wanted] for name in parts[0]}
        return self._named(_narrowed(joined))

    def _named(self, arrays: Arrays) -> Arrays:
        """With what is no array of tokens."""
        config, domains = self.config.model, self.corpus.info.domains
        if domains:
            found, places = np.unique(arrays["source"], return_inverse=True)
            names = [domains[number] for number in found[found >= 0]]
            source = places.reshape(arrays["source"].shape) - (found[0] < 0)
            arrays |= {"source": source.astype(np.int16), "source_names": np.asarray(names, str)}
        else:
            del arrays["source"]
        if config.exits.depths:
            arrays["exit/layers"] = np.asarray([*config.exits.depths, config.num_layers], np.int32)
        absent = _absent(config, arrays)
        return arrays | ({"absent": np.asarray(absent)} if absent else {})


def _told(config: ExperimentConfig, batch: Arrays, report: PassageReport) -> Arrays:
    """Of one microbatch, the arrays of its rows."""
    model, task = config.model, config.data.task
    real_BT = batch["segments"] > 0
    hidden_BT = batch["loss_mask"] & (not task.sees_targets and not task.whole_rows)
    place = lambda values: _of_tokens(values, batch["loss_mask"], task.sees_targets)  # noqa: E731
    arrays: Arrays = {
        "tokens": np.where(hidden_BT, batch["targets"], batch["tokens"]),
        "segments": batch["segments"],
        "nats": place(report.nll[-1]),
        "source": np.where(real_BT, batch["domains"], -1),
    }
    if report.top is not None:
        top_BTX = np.zeros((*real_BT.shape, report.top.shape[-1]), np.float32)
        top_BTX[:, : report.top.shape[1]] = report.top
        arrays |= {"exit/nats": place(np.stack(report.nll, -1)), "exit/top": place(top_BTX)}
    for name, layer in by_layer(model, report.recorded.decisions).items():
        chosen = np.asarray(layer.experts) >= 0
        arrays |= {f"{name}/experts": layer.experts, f"{name}/processed": layer.kept & chosen}
        arrays |= {f"{name}/weights": np.where(chosen, layer.weights, 0).astype(np.float32)}
    kept = {name: each & real_BT for name, each in by_layer(model, report.recorded.kept).items()}
    if isinstance(model.halting, NoHalting):
        arrays |= {f"{name}/kept": each for name, each in kept.items()}
    else:
        arrays["halting/steps"] = np.asarray(sum(kept_BT.astype(np.int32) for kept_BT in kept.values()))
    for name, memories in by_layer(model, report.reads).items():
        whole = {memory: rows for memory, rows in memories.items() if rows.shape[1] == real_BT.shape[1]}
        arrays |= {f"{name}/{memory}/rows": rows for memory, rows in whole.items()}
    return arrays


def _of_tokens(values: np.ndarray, mask_BT: np.ndarray, of_next: bool) -> np.ndarray:
    """What was found where a token was predicted, at that token: `of_next`, the one after. NaN elsewhere."""
    mask_BT = mask_BT.astype(bool)
    values = np.where(mask_BT.reshape(*mask_BT.shape, *(1,) * (values.ndim - 2)), values, np.nan).astype(np.float32)
    if not of_next:
        return values
    return np.concatenate([np.full_like(values[:, :1], np.nan), values[:, :-1]], axis=1)


def _narrowed(arrays: Arrays) -> Arrays:
    """With no more choices than a token has made, and the experts' numbers in two bytes."""
    found = dict(arrays)
    for name in (name.removesuffix("/experts") for name in arrays if name.endswith("/experts")):
        experts = arrays[f"{name}/experts"]
        order = np.argsort(experts < 0, axis=-1, kind="stable")
        most = max(int((experts >= 0).sum(-1).max()), 1)
        for field in ("experts", "weights", "processed"):
            found[f"{name}/{field}"] = np.take_along_axis(arrays[f"{name}/{field}"], order, -1)[..., :most]
        found[f"{name}/experts"] = found[f"{name}/experts"].astype(np.int16)
    return found


def _absent(config: ModelConfig, arrays: Arrays) -> list[str]:
    """What a reader would look for and does not find."""
    lines = []
    for layer in config.layers:
        experts = "num_experts" in config.blocks[layer.block].splits(config)
        if experts and f"{layer.name}/experts" not in arrays:
            lines.append(f"{layer.name}: no choice is made token by token")
        for memory in config.memories_at(layer.position):
            if f"{layer.name}/{memory}/rows" not in arrays:
                lines.append(f"{layer.name}/{memory}: it reads for some slots of a row alone")
    return lines
