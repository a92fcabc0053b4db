"""What every router owes, with every movement, on every mesh: the ledger's law, and the numbers of one device.

Entries of the routers' registries are found by name: a new one is under contract as soon as it can be configured.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from support import (
    MESHES,
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    mesh_name,
    moe_layer_params,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.dispatch import MOVEMENTS
from sparsejax.routers.balance import LoadBalance
from sparsejax.routers.router import RouterConfig
from sparsejax.routers.scores import SCORES
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.weights import WEIGHTS

ROWS, LENGTH, EXPERTS = 8, 6, 8
BACKBONE = ModelConfig(d_model=8, num_heads=2)
VARIANTS = {
    "top_k": {"top_1": {"k": 1}, "top_2": {"k": 2}},
    "renormalized": {"before": {"drop": "before"}, "after": {"drop": "after"}},
}
"""Settings of an entry that are a mechanism of their own; an entry that is not named has its defaults."""


def variants(registry):
    """(name, entry) of everything in a registry."""
    settings = [(name, VARIANTS.get(name, {name: {}})) for name in registry]
    return [(variant, registry[name](**fields)) for name, of_entry in settings for variant, fields in of_entry.items()]


def routers():
    """Test id → router: the product of the registries. What a config refuses is left out."""
    found = {}
    for (score, s), (selection, t), (weight, w) in itertools.product(*map(variants, (SCORES, SELECTORS, WEIGHTS))):
        with_loss = LoadBalance(scope="sequence", coefficient=0.1)
        try:
            found[f"{score}-{selection}-{weight}"] = RouterConfig(
                score=s, selection=t, weight=w, balance=with_loss, jitter=0.2
            )
        except ConfigError:
            continue
    return found


ROUTERS = routers()


def cover():
    """The fewest routers of the product, taken greedily, that have every entry in them."""
    parts = {name: set(name.split("-")) for name in ROUTERS}
    missing, chosen = set().union(*parts.values()), []
    while missing:
        chosen.append(max(parts, key=lambda name: len(parts[name] & missing)))
        missing -= parts[chosen[-1]]
    return chosen


def cases():
    """A cover of the registries with `gather` on every mesh, with every movement on two; the rest are slow tests."""
    found = []
    for router, movement, shape in itertools.product(ROUTERS, MOVEMENTS, MESHES):
        quick = router in cover() and (movement == "gather" or shape in (ONE_DEVICE, (2, 2, 2)))
        name = f"{router}-{movement}-{mesh_name(shape)}"
        found.append(pytest.param(router, movement, shape, id=name, marks=[] if quick else [pytest.mark.slow]))
    return found


@functools.cache
def run(router: str, movement: str, shape: tuple[int, int, int]):
    """(output, report, gradients in parameters and input) of one layer, with room for three pairs in four."""
    spec = MoESpec(num_experts=EXPERTS, d_ff=6, capacity_factor=0.75, dispatch=movement, router=ROUTERS[router])
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, ROWS, LENGTH, BACKBONE.d_model)).astype(np.float32)
    params = jax.tree.map(lambda leaf: leaf, moe_layer_params(spec, BACKBONE))
    params["router"] = params["router"].replace(4 * params["router"][...])  # far from uniform
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))

        @jax.jit
        def value_and_grads(params, x, direction, batch):
            def loss(params, x):
                context = Context(batch=batch, mode="train", key=jax.random.key(3))
                y, report = nnx.merge(graph, params)(x, context)
                return (y * direction).sum() + 0.1 * report.balance_sum + 0.01 * report.z_sum, (y, report)

            grads, (y, report) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return y, report, grads

        operands = put_params(params, mesh), put_rows(x, mesh), put_rows(direction, mesh)
        return to_numpy(value_and_grads(*operands, put_batch(host_batch(ROWS, LENGTH), mesh)))


@pytest.mark.parametrize("router, movement, shape", cases())
class TestContract:
    def test_every_assigned_pair_is_processed_or_dropped(self, router, movement, shape):
        _, report, _ = run(router, movement, shape)
        assert np.array_equal(report.assigned, report.processed + report.dropped)
        counts = ("assigned", "processed", "dropped_capacity", "tokens", "masked", "unserved", "slots")
        assert {getattr(report, name).dtype for name in counts} == {np.dtype("int32")}
        real = (host_batch(ROWS, LENGTH)["segments"] > 0).sum()
        assert report.tokens == real and report.masked == ROWS * LENGTH - real
        assert report.assigned.sum() == real * ROUTERS[router].selection.experts_per_token
        assert (report.dropped > 0).any() and (report.processed > 0).any(), "a ledger without drops proves nothing"

    def test_the_numbers_are_those_of_one_device(self, router, movement, shape):
        assert_close(run(router, movement, shape), run(router, "einsum", ONE_DEVICE))


def test_the_cover_holds_every_entry():
    names = {name for chosen in cover() for name in chosen.split("-")}
    assert names == {name for registry in (SCORES, SELECTORS, WEIGHTS) for name, _ in variants(registry)}
