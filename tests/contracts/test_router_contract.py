"""What every router owes, with every movement, on every mesh: the ledger's law, and the numbers of one device.

Entries of the routers' registries are found by name: a new one is under contract as soon as it can be configured.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.dispatch import MOVEMENTS
from sparsejax.routers.balance import BALANCES, LoadBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import CONTROLLERS, ExpertThreshold
from sparsejax.routers.limits import LIMITS
from sparsejax.routers.logits import LOGITS
from sparsejax.routers.noise import NOISES, Gaussian, Learned
from sparsejax.routers.orders import ORDERS
from sparsejax.routers.overflow import OVERFLOWS
from sparsejax.routers.scores import SCORES, Relu
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Threshold, TopK
from sparsejax.routers.weights import WEIGHTS, Constant, Raw

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


def cases():
    """Every selection with every movement on one device, and every router with `gather` on one sharded mesh (against
    `einsum` on one device); the rest are slow tests, among them a tenth of the products of all axes."""
    found = []
    for router, movement, shape in itertools.product(ROUTERS, DISPATCHES, MESHES):
        selects = router.startswith("selection=")
        quick = (selects and shape == ONE_DEVICE) or (movement == "gather" and shape == (2, 2, 2))
        quick |= movement == "grouped" and shape == (2, 2, 2) and router in EXCHANGED
        name = f"{router}-{movement}-{mesh_name(shape)}"
        found.append(pytest.param(router, movement, shape, id=name, marks=[] if quick else [pytest.mark.slow]))
    for router in list(PRODUCTS)[::10]:
        found.append(pytest.param(router, "gather", (2, 2, 2), id=router, marks=[pytest.mark.slow]))
    return found


EXCHANGED = ("selection=top_k", "selection=top_p", "selection=expert_choice")
"""One of each kind of list, sent to other devices without a capacity."""

AMPLE = 8.0  # slots for every token, whatever it chooses


def room(router: str, movement: str) -> float:
    """For three pairs in four; for all where nothing is dropped."""
    dropless = movement == "grouped" and not ROUTERS[router].selection.traits.fits
    return AMPLE if dropless else 0.75


def layer_spec(router: str, movement: str, capacity_factor: float) -> MoESpec:
    config = ROUTERS.get(router) or PRODUCTS[router]
    fields = {"dispatch": movement, "router": config, "capacity_factor": capacity_factor, "buffer_factor": AMPLE}
    return MoESpec(num_experts=EXPERTS, d_ff=6, **fields)


@functools.cache
def run(router: str, movement: str, shape: tuple[int, int, int], capacity_factor: float):
    """(output, report, gradients in variables and input) of one layer."""
    spec = layer_spec(router, movement, capacity_factor)
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, ROWS, LENGTH, BACKBONE.d_model)).astype(np.float32)
    params = jax.tree.map(lambda leaf: leaf, moe_layer_params(spec, BACKBONE))
    if "router" in params:
        params["router"] = jax.tree.map(lambda leaf: 4 * leaf, params["router"])  # far from uniform
    if "controller" in params:
        state = np.arange(params["controller"][...].size, dtype=np.float32).reshape(params["controller"].shape)
        params["controller"] = params["controller"].replace(0.02 * np.sin(state))
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))

        @jax.jit
        def value_and_grads(params, x, direction, batch):
            def loss(params, x):
                context = Context(batch=batch, mode="train", key=jax.random.key(3))
                y, report = nnx.merge(graph, params)(x, context)
                choices, real = report.choices, batch.segments > 0
                learnt = 0 if choices is None else (real * (choices.log_probability + choices.baseline)).sum()
                task = (y * direction).sum() + 0.1 * learnt
                return task + 0.1 * report.balance_sum + 0.01 * report.z_sum, (y, report)

            grads, (y, report) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return y, report, grads

        operands = put_params(params, mesh), put_rows(x, mesh), put_rows(direction, mesh)
        return to_numpy(value_and_grads(*operands, put_batch(host_batch(ROWS, LENGTH), mesh)))


@pytest.mark.parametrize("router, movement, shape", cases())
class TestContract:
    def test_every_assigned_pair_is_processed_or_dropped(self, router, movement, shape):
        _, report, _ = run(router, movement, shape, room(router, movement))
        assert np.array_equal(report.assigned, report.processed + report.dropped)
        counts = ("assigned", "processed", "dropped_capacity", "tokens", "masked", "unserved", "slots")
        assert {getattr(report, name).dtype for name in counts} == {np.dtype("int32")}
        real = (host_batch(ROWS, LENGTH)["segments"] > 0).sum()
        assert report.tokens == real and report.masked == ROWS * LENGTH - real
        selection = (ROUTERS.get(router) or PRODUCTS[router]).selection
        if not selection.traits.variable_k:
            assert report.assigned.sum() == real * selection.experts_per_token
        assert (report.processed > 0).any(), "a ledger without pairs proves nothing"
        traits = selection.traits
        if movement == "grouped":
            assert (report.dropped == 0).all()
        elif router in ROUTERS and not (traits.fits or traits.together or traits.train_only):  # room for all, balance
            assert (report.dropped > 0).any(), "nor does one without drops"

    def test_the_numbers_are_those_of_one_device(self, router, movement, shape):
        factor = room(router, movement)
        (y, report, grads), expected = run(router, movement, shape, factor), run(router, "einsum", ONE_DEVICE, factor)
        if report.block_rows is not None:
            report, expected = _without_slots(report), (expected[0], _without_slots(expected[1]), expected[2])
        assert_close((y, report, grads), expected)

    def test_nothing_but_the_score_makes_a_weight(self, router, movement, shape):
        """A controller's state has no gradient."""
        grads = run(router, movement, shape, room(router, movement))[2][0]
        if "controller" in grads:
            assert (grads["controller"][...] == 0).all()


def _without_slots(report):
    """Where rows are computed expert by expert, how many slots that took is the devices' affair."""
    return dataclasses.replace(report, slots=None, block_rows=None, exchange=None)


def outputs(router: str, capacity_factor: float, changed_from: int | None) -> np.ndarray:
    """`[B, T, D]` of a layer whose tokens from a position on are replaced."""
    spec = layer_spec(router, "gather", capacity_factor)
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
            assert not RouterConfig(**settings).allow_leak
            continue
        with pytest.raises(ConfigError, match="allow_leak=true accepts that") as error:
            RouterConfig(**settings)
        assert error.value.key == axis


def test_every_entry_is_here():
    names = {router.partition("=")[2] for router in ROUTERS}
    assert names >= {name for axis in AXES for name, _ in variants(axis)}
