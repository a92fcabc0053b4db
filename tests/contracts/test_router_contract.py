"""What every router owes, with every movement, on every mesh, in training, evaluation and generation.

Entries of the routers' registries are found by name: a new one is under contract as soon as it can be configured. What
selectors declare of themselves is in `test_traits.py`.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.dispatch import MOVEMENTS
from sparsejax.routers.annealing import Annealing
from sparsejax.routers.balance import BALANCES, LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import CONTROLLERS, ExpertThreshold
from sparsejax.routers.limits import LIMITS, NoLimit
from sparsejax.routers.logits import LOGITS
from sparsejax.routers.noise import NOISES, Gaussian, Learned
from sparsejax.routers.orders import ORDERS
from sparsejax.routers.overflow import OVERFLOWS, Drop
from sparsejax.routers.projections import ProductKey
from sparsejax.routers.scores import SCORES, Relu
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Prototypes, Threshold, TopK
from sparsejax.routers.weights import WEIGHTS, Constant, Raw

from reference import moe as slow
from support import (
    MESHES,
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    mesh_name,
    moe_layer_params,
    moe_layer_runner,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

ROWS, LENGTH, EXPERTS = 8, 6, 8
BACKBONE = ModelConfig(d_model=8, num_heads=2)
BASE = {
    "balance": LoadBalance(scope="sequence", coefficient=0.1),
    "jitter": 0.2,
    "allow_leak": True,
}
AXES = {
    "logits": LOGITS,
    "noise": NOISES,
    "score": SCORES,
    "selection": SELECTORS,
    "limit": LIMITS,
    "controller": CONTROLLERS,
    "order": ORDERS,
    "overflow": OVERFLOWS,
    "weight": WEIGHTS,
    "balance": BALANCES,
}
VARIANTS = {
    ("logits", "by_sequence"): {pool: {"pool": pool} for pool in ("first", "prefix_mean", "mean")},
    ("selection", "top_k"): {"top_1": {"k": 1}, "top_2": {"k": 2}},
    ("selection", "second_expert"): {
        f"second_{p}": {"policy": p, "threshold": 0.4} for p in ("threshold", "random", "sampling")
    },
    ("selection", "expert_choice"): {"expert_choice": {}, "capped": {"cap": 3}},
    ("selection", "hash"): {"hash": {}, "bigram": {"kind": "bigram"}},
    ("controller", "loss_free"): {rule: {"rule": rule} for rule in ("sign", "momentum", "soft_clamped")},
    ("overflow", "next_best"): {"next_best": {"rounds": 1}},
    ("weight", "renormalized"): {"before": {"drop": "before"}, "after": {"drop": "after"}},
    ("balance", "load_balance"): {s: {"scope": s} for s in ("sequence", "microbatch", "global")}
    | {
        "first": {"count": "first", "scope": "sequence"},
        "devices": {"expert_groups": 2, "group_share": 0.5, "scope": "sequence"},
        "communication": {"expert_groups": 4, "count": "groups", "scope": "sequence"},
    },
    ("balance", "importance_load"): {
        "shazeer": {"form": "shazeer", "scope": "sequence"},
        "vmoe": {"form": "vmoe", "scope": "microbatch"},
    },
    ("balance", "entropy"): {"entropy": {"least": 4.0, "domains": 2, "scope": "sequence"}},
}
"""Settings of an entry that are a mechanism of their own; an entry that is not named has its defaults."""
PARTNERS = {
    ("selection", "hash"): {"weight": Constant()},
    ("selection", "bigram"): {"weight": Constant()},
    ("selection", "by_domain"): {"weight": Raw()},
    ("selection", "top_1"): {"weight": Raw()},
    ("selection", "policy"): {"weight": Constant()},
    ("selection", "random"): {"weight": Constant()},
    ("selection", "sinkhorn"): {"weight": Raw()},
    ("selection", "balanced_assignment"): {"weight": Raw()},
    ("selection", "positive"): {"score": Relu(), "weight": Raw()},
    ("controller", "sparsity"): {"selection": Positive(k=2), "score": Relu(), "weight": Raw()},
    ("overflow", "next_best"): {"selection": TopK(k=1), "weight": Raw()},
    ("selection", "threshold"): {"controller": ExpertThreshold()},
    ("controller", "expert_threshold"): {"selection": Threshold()},
    ("logits", "dselect_k"): {"score": Relu(), "selection": Positive(k=4), "weight": Raw()},
    ("balance", "shazeer"): {"noise": Learned()},
    ("balance", "vmoe"): {"noise": Gaussian()},
    ("balance", "selector_entropy"): {
        "logits": DSelectK(),
        "score": Relu(),
        "selection": Positive(k=4),
        "weight": Raw(),
    },
    ("weight", "constant"): {"selection": Hash(k=2)},
}
"""What else has to be set for an entry to make sense."""


DISPATCHES = (*MOVEMENTS, "grouped")


def variants(axis):
    """(name, entry) of everything on an axis."""
    for name, entry in AXES[axis].items():
        for variant, fields in VARIANTS.get((axis, name), {name: {}}).items():
            yield variant, entry(**fields)


def routers():
    """Test id → router: the default, changed in one axis at a time."""
    found = {}
    for axis in AXES:
        for name, entry in variants(axis):
            settings = BASE | PARTNERS.get((axis, name), {}) | {axis: entry}
            found[f"{axis}={name}"] = RouterConfig(**settings)
    return found | {"random": RouterConfig(**BASE, input_dropout=0.2, exploration=0.3, output_masking=0.3)}


def products():
    """Test id → router: every score with every selection, order and weight that a config accepts."""
    axes = ("score", "selection", "order", "weight")
    for chosen in itertools.product(*(list(variants(axis)) for axis in axes)):
        settings = {axis: entry for axis, (_, entry) in zip(axes, chosen, strict=True)}
        try:
            yield "-".join(name for name, _ in chosen), RouterConfig(**(BASE | settings))
        except ConfigError:
            continue


ROUTERS = routers()
PRODUCTS = dict(products())
TYPICAL = ("selection=top_2", "selection=top_p", "selection=expert_choice", "selection=hash")
"""A choice of k, a varying number, slots that are the selection, a table: these go through everything in every run."""
ACROSS = ("balance=", "controller=", "selection=random", "selection=policy")
"""What devices add up, or draw in common; the rest is decided group by group."""


def laws():
    """What is examined closely, on one device: every selection with `gather` and without drops, every other entry with
    `gather`, the typical ones with everything; the rest are slow, among them a tenth of the products of all axes."""
    found = []
    for router, movement in itertools.product(ROUTERS, DISPATCHES):
        selects = router.startswith("selection=") and movement in ("gather", "grouped")
        quick = movement == "gather" or selects or router in TYPICAL
        marks = [] if quick else [pytest.mark.slow]
        found.append(pytest.param(router, movement, ONE_DEVICE, id=f"{router}-{movement}", marks=marks))
    for router in list(PRODUCTS)[::10]:
        found.append(pytest.param(router, "gather", ONE_DEVICE, id=router, marks=[pytest.mark.slow]))
    return found


def cases():
    """What is compared with one device: on one sharded mesh with `gather` what is more than a group's own, the typical
    selections with and without slots; the rest are slow."""
    found = []
    for router, movement, shape in itertools.product(ROUTERS, DISPATCHES, MESHES):
        if shape == ONE_DEVICE:
            continue
        typical = router in TYPICAL[: 1 if movement == "einsum" else None]
        quick = shape == (2, 2, 2) and (typical or (movement == "gather" and router.startswith(ACROSS)))
        name = f"{router}-{movement}-{mesh_name(shape)}"
        found.append(pytest.param(router, movement, shape, id=name, marks=[] if quick else [pytest.mark.slow]))
    for router in list(PRODUCTS)[::10]:
        found.append(pytest.param(router, "gather", (2, 2, 2), id=router, marks=[pytest.mark.slow]))
    return found


AMPLE = 8.0  # slots for every token, whatever it chooses


def router_of(name: str) -> RouterConfig:
    return ROUTERS.get(name) or PRODUCTS[name]


def room(config: RouterConfig, movement: str) -> float:
    """For three pairs in four; for all where nothing is dropped."""
    dropless = movement == "grouped" and not config.selection.traits.fits
    return AMPLE if dropless else 0.75


def layer_spec(config: RouterConfig, movement: str, capacity_factor: float) -> MoESpec:
    return MoESpec(
        num_experts=EXPERTS,
        d_ff=6,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        buffer_factor=AMPLE,
        dispatch=movement,
        router=config,
    )


def layer_params(spec: MoESpec) -> nnx.State:
    """Of a router that is far from uniform, with a state that has moved."""
    params = jax.tree.map(lambda leaf: leaf, moe_layer_params(spec, BACKBONE))
    if "router" in params:
        params["router"] = jax.tree.map(lambda leaf: 4 * leaf, params["router"])
    if "controller" in params:
        state = np.arange(params["controller"][...].size, dtype=np.float32).reshape(params["controller"].shape)
        params["controller"] = params["controller"].replace(0.02 * np.sin(state))
    return params


@dataclasses.dataclass
class Seen:
    """What a layer does with a batch in one mode. Of who was chosen: experts, weights and whether there was a slot,
    `[B, T, K]`."""

    y: np.ndarray
    report: MoEReport
    chosen: tuple[np.ndarray, np.ndarray, np.ndarray]


jax.tree_util.register_dataclass(Seen)
ORDER = np.random.default_rng(7).permutation(ROWS)
MODES = ("train", "eval", "generate")
NAMES = np.random.default_rng(8).permutation(EXPERTS)  # who was 5 is now 0, say
WHOLE, TASK, POLICY = (1.0, 0.1, 0.1, 0.01), (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)
"""Coefficients of the task, of what a policy learns, of balance and z-loss."""


def modes(config: RouterConfig, movement: str, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The typical have all of them. Else training stands for evaluation on a mesh and without drops, where that does
    less and nothing else; and generation is like any other unless it is about who is chosen and who has a slot."""
    if config in [ROUTERS[name] for name in TYPICAL]:
        return MODES
    if shape != ONE_DEVICE or movement == "grouped":
        return MODES[:1]
    about = ("logits", "selection", "order", "overflow", "weight")
    default = RouterConfig(**BASE)
    return MODES if any(getattr(config, axis) != getattr(default, axis) for axis in about) else MODES[:2]


@functools.lru_cache(maxsize=2)
def compiled(config: RouterConfig, movement: str, shape: tuple[int, int, int]):
    """`run(params, x, direction, fields of a batch, key, coefficients)` → what a layer does in every mode, and the
    gradients of training in variables and input: one program."""
    spec, others = layer_spec(config, movement, room(config, movement)), modes(config, movement, shape)[1:]
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))

    def see(params, x, batch, mode, key=None):
        y, report = nnx.merge(graph, params)(x, Context(batch=batch, mode=mode, key=key, record=True))
        kept = report.decisions.kept
        weights = jnp.where(kept, report.decisions.weights, 0)
        chosen = (report.decisions.experts, weights, kept)
        return Seen(y=y, report=dataclasses.replace(report, decisions=None), chosen=chosen)

    @jax.jit
    def everything(params, x, direction, batch, key, coefficients):
        def loss(params, x):
            seen = see(params, x, batch, "train", key)
            choices, real = seen.report.choices, batch.segments > 0
            learnt = 0 if choices is None else (real * (choices.log_probability + choices.baseline)).sum()
            terms = ((seen.y * direction).sum(), learnt, seen.report.balance_sum, seen.report.z_sum)
            return sum(c * term for c, term in zip(coefficients, terms, strict=True)), seen

        grads, train = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return {"train": train, "grads": grads} | {mode: see(params, x, batch, mode) for mode in others}

    def run(params, x, direction, arrays, key=3, coefficients=WHOLE):
        with on_mesh(shape):
            operands = put_params(params, mesh), put_rows(x, mesh), put_rows(direction, mesh), put_batch(arrays, mesh)
            return to_numpy(everything(*operands, jax.random.key(key), coefficients))

    return run


def batch_fields() -> dict[str, np.ndarray]:
    arrays = host_batch(ROWS, LENGTH)
    return arrays | {"domains": np.where(arrays["segments"] > 0, arrays["segments"] + np.arange(ROWS)[:, None] % 3, 0)}


REAL = host_batch(ROWS, LENGTH)["segments"] > 0


def run(router: str, movement: str, shape: tuple[int, int, int], change: str = ""):
    """What `compiled` gives for one batch, or for that batch, its key or its router changed."""
    return _run(router_of(router), movement, shape, change)


@functools.cache
def _run(config: RouterConfig, movement: str, shape: tuple[int, int, int], change: str):
    params = layer_params(layer_spec(config, movement, room(config, movement)))
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, ROWS, LENGTH, BACKBONE.d_model)).astype(np.float32)
    arrays, more = batch_fields(), {}
    if change == "key":
        more["key"] = 4
    elif change == "padding":
        x = np.where(REAL[..., None], x, 100).astype(np.float32)
        for name in ("tokens", "targets", "positions", "domains"):
            arrays[name] = np.where(REAL, arrays[name], 5).astype(np.int32)
    elif change == "rows":
        x, direction = x[ORDER], direction[ORDER]
        arrays = {name: array[ORDER] for name, array in arrays.items()}
    elif change == "experts":
        params["experts"] = jax.tree.map(lambda leaf: leaf[NAMES], params["experts"])
        renamed = lambda leaf: leaf.replace(leaf[...][..., NAMES])  # noqa: E731
        if "router" in params:
            params["router"] = nnx.State({**params["router"], "weight": renamed(params["router"]["weight"])})
        if "controller" in params:
            params["controller"] = renamed(params["controller"])
    elif change == "zeros":
        params["router"] = jax.tree.map(lambda leaf: 0 * leaf, params["router"])
    elif change in ("task", "policy"):
        more["coefficients"] = {"task": TASK, "policy": POLICY}[change]
    else:
        assert change in ("", "again")
    return compiled(config, movement, shape)(params, x, direction, arrays, **more)


def by_hand(router: str, movement: str, experts, weights) -> np.ndarray:
    """Each token's sum over the experts it reached of weight times network, in float64."""
    config = router_of(router)
    params = layer_params(layer_spec(config, movement, room(config, movement)))["experts"]
    x = np.random.default_rng(0).normal(size=(2, ROWS, LENGTH, BACKBONE.d_model)).astype(np.float32)[0]
    w_in, w_out = (np.asarray(params[name][...], np.float64) for name in ("w_in", "w_out"))
    of_all = np.stack([slow.feed_forward(x.astype(np.float64), w_in[e], w_out[e]) for e in range(EXPERTS)], axis=-2)
    return (weights[..., None] * np.take_along_axis(of_all, np.maximum(experts, 0)[..., None], axis=2)).sum(2)


def in_modes(router: str, movement: str, shape: tuple[int, int, int]) -> list[tuple[str, Seen]]:
    found = run(router, movement, shape)
    return [(mode, found[mode]) for mode in MODES if mode in found]


def equal(one, other) -> bool:
    """To the last bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("router, movement, shape", laws(), scope="class")
class TestLaws:
    def test_u0_the_ledger_conserves(self, router, movement, shape):
        """Every assigned pair is processed or dropped, in int32, and the counts are those of the decisions."""
        selection, overflow = router_of(router).selection, router_of(router).overflow
        counts = ("assigned", "processed", "dropped_capacity", "tokens", "masked", "unserved", "slots")
        for _, seen in in_modes(router, movement, shape):
            report, (experts, _, kept) = seen.report, seen.chosen
            assert np.array_equal(report.assigned, report.processed + report.dropped)
            assert {getattr(report, name).dtype for name in counts} == {np.dtype("int32")}
            assert report.tokens == REAL.sum() and report.masked == (~REAL).sum()
            assert report.unserved == (REAL & ~kept.any(-1)).sum()
            assert (report.assigned.sum(), report.processed.sum()) == ((experts >= 0).sum(), kept.sum())
            if isinstance(overflow, Drop):  # else pairs are counted for the expert that was chosen first
                of = lambda pairs: np.bincount(experts[pairs], minlength=EXPERTS)  # noqa: E731
                assert np.array_equal(report.assigned, of(experts >= 0))
                assert np.array_equal(report.processed, of(kept))
            beyond = ((experts >= 0).sum(-1) > REAL * selection.experts_per_token).any()
            assert selection.traits.beyond_k or not beyond
            assert (report.processed > 0).any(), "a ledger without pairs proves nothing"

    def test_u1_the_output_is_the_sum_over_kept_pairs(self, router, movement, shape):
        for mode, seen in in_modes(router, movement, shape):
            if mode == "train" and router_of(router).output_masking:
                continue
            experts, weights, _ = seen.chosen
            assert_close(seen.y, by_hand(router, movement, experts, weights).astype(np.float32))

    def test_u2_the_order_of_rows_does_not_matter(self, router, movement, shape):
        plain, other = run(router, movement, shape), run(router, movement, shape, "rows")
        for mode, one in in_modes(router, movement, shape):
            two = other[mode]
            choices = jax.tree.map(lambda values: values[ORDER], one.report.choices)
            report = dataclasses.replace(one.report, choices=choices)
            moved = Seen(y=one.y[ORDER], report=report, chosen=tuple(values[ORDER] for values in one.chosen))
            assert_close(two, moved)
        (grads, dx), (other_grads, other_dx) = plain["grads"], other["grads"]
        assert_close((other_grads, other_dx), (grads, dx[ORDER]))

    def test_u2_renaming_experts_renames_the_decision(self, router, movement, shape):
        config = router_of(router)
        selection = config.selection
        named = selection.traits.fixed or isinstance(selection, Prototypes) or not isinstance(config.limit, NoLimit)
        if named or isinstance(config.logits, (ProductKey, DSelectK)) or isinstance(config.controller, Annealing):
            pytest.skip("experts have places here")
        if isinstance(config.score, Relu) and not selection.traits.sparse:
            pytest.skip("scores of 0 tie, and ties go to the lower expert")
        for mode, one in in_modes(router, movement, shape):
            if mode == "train":  # noise is an expert's own
                continue
            two = run(router, movement, shape, "experts")[mode]
            assert np.array_equal(two.report.assigned, one.report.assigned[NAMES])
            assert np.array_equal(two.report.processed, one.report.processed[NAMES])
            assert_close(two.y, one.y)

    def test_u3_experts_fill_exactly_the_slots_they_have(self, router, movement, shape):
        """In every group, which is a row here: as many pairs as there are, at most its slots."""
        config = router_of(router)
        spec = layer_spec(config, movement, room(config, movement))
        traits = config.selection.traits
        for mode, seen in in_modes(router, movement, shape):
            experts, _, kept = seen.chosen
            count = lambda pairs: np.stack([(pairs & (experts == e)).sum((1, 2)) for e in range(EXPERTS)], 1)  # noqa: E731
            assert (np.diff(np.sort(np.where(experts < 0, -1 - np.arange(experts.shape[-1]), experts))) > 0).all()
            limit = spec.capacities(LENGTH, mode)[REAL.sum(1)][:, None]
            if movement == "grouped" and not traits.fits:
                assert kept.sum() == (experts >= 0).sum()
            elif isinstance(config.overflow, Drop):
                assert np.array_equal(count(kept), np.minimum(count(experts >= 0), limit))
            else:
                assert (count(kept) <= limit).all()
            scarce = mode != "generate" and movement != "grouped"
            if scarce and not (traits.fits or traits.together or traits.train_only) and router in ROUTERS:
                assert (seen.report.dropped > 0).any(), "slots that suffice prove nothing"

    def test_u4_who_has_no_slot_gets_exactly_zero(self, router, movement, shape):
        for mode, seen in in_modes(router, movement, shape):
            served = seen.chosen[2].any(-1)
            assert (seen.y[~served] == 0).all()
            masked = router_of(router).output_masking and mode == "train"
            weighed = (seen.chosen[1] > 0).any(-1)  # by more than a score of 0
            assert masked or (seen.y[weighed] != 0).any(-1).all()

    def test_u7_what_stands_in_padding_changes_nothing(self, router, movement, shape):
        plain = run(router, movement, shape)
        other = run(router, movement, shape, "padding")
        of_real = lambda report: dataclasses.replace(  # noqa: E731
            report, choices=jax.tree.map(lambda values: np.where(REAL, values, 0), report.choices)
        )
        for mode, _ in in_modes(router, movement, shape):  # what a policy did with padding is rewarded with nothing
            one, two = (dataclasses.replace(x[mode], report=of_real(x[mode].report)) for x in (other, plain))
            assert equal(one, two)
        assert equal(other["grads"], plain["grads"])
        assert (plain["grads"][1][~REAL] == 0).all()
        assert all((seen.y[~REAL] == 0).all() for _, seen in in_modes(router, movement, shape))

    def test_u8_a_key_decides_in_training_and_there_alone(self, router, movement, shape):
        config = router_of(router)
        plain, other = run(router, movement, shape), run(router, movement, shape, "key")
        assert equal(run(router, movement, shape, "again"), plain)
        assert all(equal(other[mode], seen) for mode, seen in in_modes(router, movement, shape) if mode != "train")
        needs = config.selection.traits.needs | (frozenset() if movement == "grouped" else config.order.traits.needs)
        moves = config.learned and (config.jitter or not config.noise.silent)
        blind = config.logits.traits.blind and config.noise.silent
        draws = (moves and not blind) or needs & {"noise", "lots"} or config.output_masking
        assert equal(other["train"].chosen, plain["train"].chosen) != bool(draws)

    def test_u13_a_router_of_zeros_is_finite_and_conserves(self, router, movement, shape):
        if not router_of(router).learned:
            pytest.skip("there is no router")
        found = run(router, movement, shape, "zeros")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found) if np.issubdtype(leaf.dtype, np.floating))
        for mode, _ in in_modes(router, movement, shape):
            report = found[mode].report
            assert np.array_equal(report.assigned, report.processed + report.dropped)

    def test_u14_the_task_moves_exactly_the_routers_that_learn(self, router, movement, shape):
        """By the weights of pairs; a policy by the log-probability of what it did."""
        config = router_of(router)
        grads = run(router, movement, shape, "task")["grads"][0]
        assert ("router" in grads) == config.learned
        if "controller" in grads:
            assert (grads["controller"][...] == 0).all(), "a state has no gradient"
        if not config.learned:
            return
        moved = lambda grads: {name: bool((leaf[...] != 0).any()) for name, leaf in grads["router"].items()}  # noqa: E731
        if isinstance(config.weight, Constant):
            assert not any(moved(grads).values())
        if config.selection.traits.reinforce:
            grads = run(router, movement, shape, "policy")["grads"][0]
        assert all(moved(grads).values()), moved(grads)


@pytest.mark.parametrize("router, movement, shape", cases(), scope="class")
class TestMeshes:
    def test_u10_the_numbers_are_those_of_one_device(self, router, movement, shape):
        found, expected = run(router, movement, shape), run(router, movement, ONE_DEVICE)
        assert_close(decided(found), decided({name: expected[name] for name in found}))


def decided(found: dict) -> dict:
    """Without what a layer that has room for all says of its rows: where they were computed is a device's own."""

    def without(seen):
        if not isinstance(seen, Seen) or seen.report.block_rows is None:
            return seen
        return dataclasses.replace(
            seen, report=dataclasses.replace(seen.report, slots=None, block_rows=None, exchange=None)
        )

    return {name: without(seen) for name, seen in found.items()}


@pytest.mark.parametrize("router", [r if r in TYPICAL else pytest.param(r, marks=pytest.mark.slow) for r in ROUTERS])
def test_u1_gradients_do_not_depend_on_the_movement(router):
    assert_close(run(router, "gather", ONE_DEVICE), run(router, "einsum", ONE_DEVICE))


def test_u1_nor_do_they_where_nothing_is_dropped(monkeypatch):
    """With slots for all, the layer without slots is one more movement."""
    monkeypatch.setattr(sys.modules[__name__], "room", lambda config, movement: AMPLE)
    config, one = dataclasses.replace(ROUTERS["selection=top_p"], jitter=0.25), ONE_DEVICE  # compiled nowhere else
    first, second = (decided(_run(config, movement, one, "")) for movement in ("grouped", "gather"))
    assert_close(first["grads"], second["grads"])
    first, second = first["train"], second["train"]
    no_slots = dataclasses.replace(second.report, slots=None)
    assert_close(first, dataclasses.replace(second, report=no_slots))


def outputs(router: str, capacity_factor: float, changed_from: int | None) -> np.ndarray:
    """`[B, T, D]` of a layer whose tokens from a position on are replaced."""
    spec = layer_spec(router_of(router), "gather", capacity_factor)
    spec = dataclasses.replace(spec, router=dataclasses.replace(spec.router, jitter=0.0))
    rng = np.random.default_rng(1)
    x, other = rng.normal(size=(2, ROWS, LENGTH, BACKBONE.d_model)).astype(np.float32)
    arrays = host_batch(ROWS, LENGTH, padded=0)
    if changed_from is not None:
        x[:, changed_from:] = other[:, changed_from:]
        arrays["tokens"] = np.concatenate(
            [arrays["tokens"][:, :changed_from], arrays["tokens"][:, changed_from:] + 1], axis=1
        )
    params = jax.tree.map(lambda leaf: leaf, moe_layer_params(spec, BACKBONE))
    if "router" in params:
        params["router"] = jax.tree.map(lambda leaf: 4 * leaf, params["router"])
    y, _ = moe_layer_runner(spec, BACKBONE, ONE_DEVICE)(params, x, arrays, key=jax.random.key(3))
    return y


@pytest.mark.parametrize("axis, name", [(a, name) for a in ("logits", "selection") for name, _ in variants(a)])
def test_it_sees_the_future_exactly_when_it_says_so(axis, name):
    """U6: with room for all, what comes later changes nothing; of the others the leak is shown to exist."""
    router, at = f"{axis}={name}", LENGTH // 2 + 1  # within the second document
    causal = getattr(ROUTERS[router], axis).traits.causal
    factor = AMPLE if causal else 0.75  # with room for all, an expert takes everyone
    before = outputs(router, factor, None)[:, :at]
    assert np.array_equal(outputs(router, factor, at)[:, :at], before) == causal
    assert not np.array_equal(outputs(router, factor, 0)[:, :at], before), "the change is one that can be seen"


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("k", [1, 2])
def test_an_order_of_slots_sees_the_future_exactly_when_it_says_so(name, k, monkeypatch):
    """Where slots are scarce; choice-major with k = 2 lets later first choices push out second ones, as documented."""
    router = RouterConfig(**(BASE | {"order": ORDERS[name](), "selection": TopK(k=k), "weight": Raw()}))
    monkeypatch.setitem(ROUTERS, f"{name}-{k}", router)
    causal = router.order.traits.causal and not (name == "choice_major" and k > 1)
    leaks = [
        not np.array_equal(outputs(f"{name}-{k}", 0.5, at)[:, :at], outputs(f"{name}-{k}", 0.5, None)[:, :at])
        for at in range(1, LENGTH)
    ]
    assert any(leaks) == (not causal)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_becomes_of_overflow_depends_on_the_future_exactly_when_it_says_so(name, monkeypatch):
    router = RouterConfig(**(BASE | PARTNERS[("overflow", "next_best")] | {"overflow": OVERFLOWS[name]()}))
    monkeypatch.setitem(ROUTERS, name, router)
    leaks = [
        not np.array_equal(outputs(name, 0.5, at)[:, :at], outputs(name, 0.5, None)[:, :at]) for at in range(1, LENGTH)
    ]
    assert any(leaks) == (not router.overflow.traits.causal)


@pytest.mark.parametrize("axis", ["logits", "selection", "order", "overflow"])
def test_a_leak_has_to_be_allowed(axis):
    for name, entry in variants(axis):
        settings = PARTNERS.get((axis, name), {}) | {axis: entry}
        if entry.traits.causal:
            RouterConfig(**settings).check_causal()
            continue
        with pytest.raises(ConfigError, match="allow_leak=true accepts that") as error:
            RouterConfig(**settings).check_causal()
        RouterConfig(**settings, allow_leak=True).check_causal()
        assert error.value.key == axis


def test_every_entry_is_here():
    names = {router.partition("=")[2] for router in ROUTERS}
    assert names >= {name for axis in AXES for name, _ in variants(axis)}
