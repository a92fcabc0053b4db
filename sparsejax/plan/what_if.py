"""What other slots, another number of choices or another placement would have done to recorded decisions. No model is
needed: the same orders and the same slots as in a run, on the pairs that a trace holds."""

from dataclasses import dataclass
from typing import Any, Optional

import jax.numpy as jnp
import numpy as np

from sparsejax.base.errors import RequestError
from sparsejax.base.reports import Decisions
from sparsejax.blocks.moe import MoESpec
from sparsejax.ops.assignment import by_token, choice_major_pairs, fill_slots
from sparsejax.ops.capacity import capacity_table
from sparsejax.routers.candidates import Candidates, Inputs
from sparsejax.routers.orders import Order
from sparsejax.routers.overflow import Drop
from sparsejax.train.trace import Trace

CHUNK = 2**22  # (token, expert) entries that are looked at at a time


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be otherwise; None: as recorded. `device_of_expert` places experts along the mesh axis `expert`."""

    capacity_factor: Optional[float] = None
    k: Optional[int] = None
    group_size: Optional[int] = None
    order: Optional[Order] = None
    devices: Optional[int] = None
    device_of_expert: Optional[tuple[int, ...]] = None

    @property
    def about_slots(self) -> bool:
        """Whether other pairs may find a slot than did."""
        return (self.capacity_factor, self.k, self.group_size, self.order) != (None, None, None, None)


def what_if(trace: Trace, question: Question = Question()) -> dict[str, dict[str, Any]]:
    """The ledger of every layer of the trace, and what its exchange would have moved; of a layer that cannot answer,
    `{"refused": why}`.

    Raises:
      RequestError: the question goes with no layer of the trace.
    """
    blocks = {layer.name: layer.block for layer in trace.config.model.layers}
    answers, refused = {}, {}
    for name, decisions in trace.layers.items():
        spec = trace.config.model.blocks[blocks[name]]
        assert isinstance(spec, MoESpec)  # they alone decide
        try:
            answers[name] = _layer(trace, decisions, spec, question)
        except RequestError as error:
            answers[name], refused[name] = {"refused": str(error)}, error
    if refused and len(refused) == len(answers):
        raise next(iter(refused.values()))
    return answers


def capacities_of(trace: Trace, spec: MoESpec, question: Question) -> np.ndarray:
    """Slots of an expert for a group with 0 … all of its tokens."""
    length, k = trace.mask.shape[1], spec.experts_per_token if question.k is None else question.k
    size = question.group_size or spec.group_size or length
    tokens = trace.config.microbatch_size // trace.config.mesh.batch_shards * length
    if tokens % size:
        raise RequestError(
            f"--group-size={size} does not divide the {tokens} tokens that a device held of a microbatch"
        )
    factor = spec.factor(trace.mode) if question.capacity_factor is None else question.capacity_factor
    by_training = spec.slots_of_training(trace.mode)
    table = capacity_table(size, spec.scored_experts, k, factor, spec.capacity_convention, by_training)
    room_for_all = question.capacity_factor is None and spec.room_for_all(trace.mode)
    return np.arange(size + 1, dtype=np.int32) if room_for_all else np.asarray(table)


def kept_pairs(trace: Trace, decisions: Decisions, spec: MoESpec, question: Question) -> np.ndarray:
    """Which of the first k choices find a slot, or need none, `[rows, T, K]`."""
    choices = decisions.experts.shape[-1]
    columns = choices if question.k is None else question.k
    if question.k is not None and (spec.router.selection.traits.fits or question.k > choices):
        raise RequestError(f"--k={question.k}: the trace has {choices} choices of a token, or none in order")
    if not isinstance(spec.router.overflow, Drop):
        raise RequestError("overflow=next_best: where else a token would have gone is not in the trace")
    capacities = capacities_of(trace, spec, question)
    size = len(capacities) - 1
    order = spec.router.order if question.order is None else question.order
    if trace.mode == "train" and "noise" in order.traits.needs:
        raise RequestError("--order: this one drew who got the slots, and will not draw the same again; choose another")
    groups = lambda a, *tail: np.asarray(a).reshape(-1, size, *tail)  # noqa: E731
    mask, best = groups(trace.mask), groups(decisions.best)
    experts = groups(decisions.experts[..., :columns], columns)
    ranking = groups(decisions.ranking[..., :columns], columns)
    each = max(1, CHUNK // (size * (spec.scored_experts + 1)))
    kept = [
        _kept(experts[at], ranking[at], best[at], mask[at], jnp.asarray(capacities), order, spec)
        for at in (slice(first, first + each) for first in range(0, len(mask), each))
    ]
    return np.concatenate(kept).reshape(*trace.mask.shape, columns)


def _kept(experts_GSK, ranking_GSK, best_GS, mask_GS, capacities, order: Order, spec: MoESpec) -> np.ndarray:
    """Orders and fills as `routers.router.decide` does."""
    mask_GS, chosen_GSK = jnp.asarray(mask_GS), jnp.asarray(experts_GSK) >= 0
    limit_G = capacities[mask_GS.sum(-1, dtype=jnp.int32)]
    groups, size, _ = experts_GSK.shape
    # Orders see the ranking of chosen pairs and the best of all; the latter stands in a column of its own.
    ranking_GSE = np.full((groups, size, spec.scored_experts + 1), -np.inf, np.float32)
    ranking_GSE[..., -1] = best_GS
    group, token, choice = np.nonzero(np.asarray(chosen_GSK))
    ranking_GSE[group, token, experts_GSK[group, token, choice]] = ranking_GSK[group, token, choice]
    nobody = jnp.zeros(mask_GS.shape, jnp.int32)
    inputs = Inputs(
        mask=mask_GS,
        tokens=nobody,
        previous=nobody,
        positions=nobody,
        domains=nobody,
        limit=limit_G,
        num_slots=int(capacities[-1]),
        training=False,
    )
    ranking = jnp.asarray(ranking_GSE)
    candidates = Candidates(logits=ranking, scores=ranking, ranking=ranking, inputs=inputs)
    pairs = choice_major_pairs(jnp.maximum(experts_GSK, 0), jnp.asarray(ranking_GSK), mask_GS, chosen_GSK)
    pairs = order(pairs, candidates)
    slots = fill_slots(pairs, spec.num_experts, inputs.num_slots, limit_G)
    return np.asarray(by_token(slots.keep | (pairs.valid & (pairs.expert >= spec.num_experts)), pairs))


def _layer(trace: Trace, decisions: Decisions, spec: MoESpec, question: Question) -> dict[str, Any]:
    capacities = capacities_of(trace, spec, question)
    num_slots, size = int(capacities[-1]), len(capacities) - 1
    asked = question.about_slots
    kept = kept_pairs(trace, decisions, spec, question) if asked else np.asarray(decisions.kept)
    experts = np.asarray(decisions.experts)[..., : kept.shape[-1]]
    count = lambda pairs: np.bincount(experts[pairs], minlength=spec.scored_experts)  # noqa: E731
    assigned, processed = count(experts >= 0), count(kept)
    tokens, slots = int(trace.mask.sum()), trace.mask.size // size * spec.num_experts * num_slots
    ledger = {
        "assigned": assigned.tolist(),
        "processed": processed.tolist(),
        "dropped": (assigned - processed).tolist(),
        "drop_fraction": 1 - processed.sum() / max(assigned.sum(), 1),
        "unserved_fraction": 1 - kept.any(-1).sum() / max(tokens, 1),
        "load_max_over_mean": assigned.max() / max(assigned.mean(), 1e-9),
        "slot_utilisation": processed[: spec.num_experts].sum() / max(slots, 1),
    }
    moving = kept & (experts < spec.num_experts)  # a free expert is where the token is
    return ledger | _moved(trace, experts, moving, num_slots / size, spec, question)


def _moved(
    trace: Trace, experts: np.ndarray, kept: np.ndarray, slots: float, spec: MoESpec, question: Question
) -> dict[str, Any]:
    """What goes from a token's device to those of its experts along the mesh axis `expert`, and back, forward."""
    config, num_experts = trace.config, spec.num_experts
    devices = config.mesh.expert if question.devices is None else question.devices
    placed = np.arange(num_experts) * devices // num_experts
    if question.device_of_expert is not None:
        placed = np.asarray(question.device_of_expert)
    if len(placed) != num_experts or placed.min() < 0 or placed.max() >= devices:
        raise RequestError(
            f"--placement: a device of 0 … {devices - 1} (--devices) for each of {num_experts} experts, not {placed}"
        )
    share, rest = divmod(config.microbatch_size, config.mesh.data * devices)
    if rest:
        raise RequestError(
            f"--devices={devices}: the {config.microbatch_size} rows of a microbatch do not split evenly over "
            f"mesh.data={config.mesh.data} × {devices} devices"
        )
    home_N = np.arange(len(kept)) % config.microbatch_size // share % devices
    device_NTK = np.where(kept, placed[np.where(kept, experts, 0)], -1)
    holds_NTD = (device_NTK[..., None] == np.arange(devices)).any(-2)
    away_ND = home_N[:, None] != np.arange(devices)
    served = max(int(kept.any(-1).sum()), 1)
    remote_pairs = int((kept & (device_NTK != home_N[:, None, None])).sum())
    copies = int((holds_NTD & away_ND[:, None]).sum())
    row = 2 * config.model.d_model * jnp.dtype(config.model.dtype).itemsize
    load_D = np.bincount(device_NTK[kept], minlength=devices)
    experts_away_N = (home_N[:, None] != placed).sum(-1)
    return {
        "devices_per_token": holds_NTD.sum() / served,
        "device_load_max_over_mean": load_D.max() / max(load_D.mean(), 1e-9),
        "remote_pair_fraction": remote_pairs / max(int(kept.sum()), 1),
        "bytes_by_pair": remote_pairs * row,
        "bytes_by_device": copies * row,
        "bytes_of_slots": round(slots * kept.shape[1] * int(experts_away_N.sum())) * row,
    }
