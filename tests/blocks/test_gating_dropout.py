"""Steps without routed experts: one coin for everybody, nothing computed, and a ledger of zeros."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import LossFree
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Constant

from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    moe_layer_params,
    moe_layer_runner,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

BACKBONE = ModelConfig(d_model=8, num_heads=2)
SPEC = MoESpec(num_experts=8, d_ff=6, router=RouterConfig(controller=LossFree()), gating_dropout=0.3)
PARAMS = moe_layer_params(SPEC, BACKBONE)
X = np.random.default_rng(0).normal(size=(8, 6, 8)).astype(np.float32)
BATCH = host_batch(8, 6)


def run(spec, shape=ONE_DEVICE, seed=0, mode="train"):
    return moe_layer_runner(spec, BACKBONE, shape)(PARAMS, X, BATCH, key=jax.random.key(seed), mode=mode)


def skips(seed):
    return bool(jax.random.bernoulli(jax.random.key(seed), 0.3))


WITHOUT, WITH = next(seed for seed in range(99) if skips(seed)), next(seed for seed in range(99) if not skips(seed))


@pytest.mark.parametrize("shape", [ONE_DEVICE, (2, 2, 2)])
def test_a_step_is_skipped_by_all_devices_or_by_none(shape):
    plain = run(dataclasses.replace(SPEC, gating_dropout=0.0))
    assert_close(run(SPEC, shape, WITH), plain)
    y, moe = run(SPEC, shape, WITHOUT)
    assert (y == 0).all() and all((leaf == 0).all() for leaf in jax.tree.leaves(moe))


def test_without_a_key_as_outside_training_nothing_is_skipped():
    for mode in ("eval", "generate"):
        y, _ = moe_layer_runner(SPEC, BACKBONE, ONE_DEVICE)(PARAMS, X, BATCH, mode=mode)
        assert (y != 0).any()


def test_a_skipped_step_moves_no_balancing_state():
    _, moe = run(SPEC, seed=WITHOUT)
    state = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    state -= state.mean()
    np.testing.assert_allclose(SPEC.router.controller.update(state, moe, 2), state, atol=1e-6)


def test_shared_experts_stay():
    spec = dataclasses.replace(SPEC, shared_experts=1)
    params = moe_layer_params(spec, BACKBONE)
    y, _ = moe_layer_runner(spec, BACKBONE, ONE_DEVICE)(params, X, BATCH, key=jax.random.key(WITHOUT))
    assert (np.abs(y).sum(-1) > 0).all()


def test_nothing_is_communicated_in_a_skipped_step():
    """One branch holds all of the layer's `shard_map`, with its collectives; the other none."""
    with on_mesh((2, 2, 2)) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, SPEC))
        layer = lambda params, x, batch: jax.tree.leaves(  # noqa: E731
            nnx.merge(graph, params)(x, Context(batch=batch, mode="train", key=jax.random.key(0)))
        )
        program = jax.make_jaxpr(layer)(put_params(PARAMS, mesh), put_rows(X, mesh), put_batch(BATCH, mesh)).jaxpr
    (cond,) = [equation for equation in program.eqns if equation.primitive.name == "cond"]
    assert sorted("shard_map" in str(branch) for branch in cond.params["branches"]) == [False, True]
    outside = [equation for equation in program.eqns if equation is not cond]
    assert not any(equation.primitive.name == "shard_map" for equation in outside)


def test_all_layers_of_a_step_have_one_coin():
    key = jax.random.key(5)
    batch = Batch(**host_batch(2, 4))  # type: ignore
    contexts = [Context(batch=batch, mode="train", key=key).at_layer(layer) for layer in (0, 1)]
    assert all(context.step_key is key for context in contexts)
    assert contexts[0].key != contexts[1].key


def test_what_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match=r"1\.0 is outside") as error:
        MoESpec(gating_dropout=1.0)
    assert error.value.key == "gating_dropout"


@pytest.mark.parametrize("seed", [WITHOUT, WITH])
def test_gradients_are_those_of_one_device(seed):
    def grads(shape):
        with on_mesh(shape) as mesh:
            graph = graph_of(lambda key: MoELayer(key, BACKBONE, SPEC))

            @jax.jit
            def of(params, x, batch):
                context = Context(batch=batch, mode="train", key=jax.random.key(seed))
                return jax.grad(lambda p, x: (nnx.merge(graph, p)(x, context)[0] ** 2).sum(), (0, 1))(params, x)

            return to_numpy(of(put_params(PARAMS, mesh), put_rows(X, mesh), put_batch(BATCH, mesh)))

    found = grads((2, 2, 2))
    assert_close(found, grads(ONE_DEVICE))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(found)) == (seed == WITH)


STAYING = moe_layer_params(dataclasses.replace(SPEC, router=RouterConfig()), BACKBONE)


class TestStay:
    """Gate-Drop: a token's experts are those of its own device."""

    MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2)]

    @staticmethod
    def spec(**changed):
        router = RouterConfig(selection=TopK(k=2), **changed.pop("router", {}))
        given = {"num_experts": 8, "d_ff": 6, "router": router, "gating_dropout": 0.3, "gating_dropout_by": "stay"}
        return MoESpec(**given | changed)

    @staticmethod
    def expected(spec, params, shape):
        """Row by row, from the equations: (y, processed pairs by expert)."""
        data, expert, _ = shape
        layer = nnx.to_pure_dict(params)
        logits = X @ np.asarray(layer["router"]["weight"])
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        y, counts, each = np.zeros_like(X), np.zeros(8, int), 8 // expert
        for row in range(len(X)):
            device = row // (len(X) // (data * expert)) % expert
            own = np.arange(device * each, (device + 1) * each)
            for token in np.flatnonzero(BATCH["segments"][row]):
                chosen = own[np.argsort(-scores[row, token, own], kind="stable")[:2]]
                weight = scores[row, token, chosen] / scores[row, token, chosen].sum()
                for e, w in zip(chosen, weight, strict=True):
                    h = np.asarray(jax.nn.gelu(X[row, token] @ np.asarray(layer["experts"]["w_in"][e])))
                    y[row, token] += w * (h @ np.asarray(layer["experts"]["w_out"][e]))
                    counts[e] += 1
        return y, counts

    @pytest.mark.parametrize("dispatch", ["gather", "grouped"])
    @pytest.mark.parametrize("shape", MESHES)
    def test_equals_the_equations(self, shape, dispatch):
        spec = self.spec(dispatch=dispatch)
        run = moe_layer_runner(spec, BACKBONE, shape)
        y, moe = run(STAYING, X, BATCH, key=jax.random.key(WITHOUT))
        expected, counts = self.expected(spec, STAYING, shape)
        assert_close(y, expected.astype(np.float32))
        np.testing.assert_array_equal(moe.assigned, counts)
        np.testing.assert_array_equal(moe.processed, counts)
        assert moe.unserved == 0 and moe.dropped.sum() == 0

    def test_other_steps_and_evaluation_are_as_ever(self):
        for mode, seed in (("train", WITH), ("eval", None)):
            key = None if seed is None else jax.random.key(seed)
            plain, stays = (
                moe_layer_runner(self.spec(**changed), BACKBONE, (2, 2, 2))(STAYING, X, BATCH, key=key, mode=mode)
                for changed in ({"gating_dropout": 0.0, "gating_dropout_by": "skip"}, {})
            )
            assert_close(stays, plain)

    def test_one_device_has_all_experts(self):
        plain = self.spec(gating_dropout=0.0, gating_dropout_by="skip", dispatch="grouped")
        expected, _ = moe_layer_runner(plain, BACKBONE, ONE_DEVICE)(STAYING, X, BATCH, key=jax.random.key(WITHOUT))
        y, _ = moe_layer_runner(self.spec(), BACKBONE, ONE_DEVICE)(STAYING, X, BATCH, key=jax.random.key(WITHOUT))
        assert_close(y, expected)

    @pytest.mark.parametrize("dispatch", ["gather", "grouped"])
    def test_nothing_is_exchanged(self, dispatch):
        """The branch of a step whose tokens stay has no collective over the experts' axis but sums of counts."""
        with on_mesh((2, 4, 1)) as mesh:
            spec = self.spec(dispatch=dispatch)
            graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))
            layer = lambda params, x, batch: jax.tree.leaves(  # noqa: E731
                nnx.merge(graph, params)(x, Context(batch=batch, mode="train", key=jax.random.key(0)))
            )
            program = jax.make_jaxpr(layer)(put_params(STAYING, mesh), put_rows(X, mesh), put_batch(BATCH, mesh)).jaxpr
        (cond,) = [equation for equation in program.eqns if equation.primitive.name == "cond"]
        moved = ["all_to_all" in str(branch) for branch in cond.params["branches"]]
        assert sorted(moved) == [False, True]

    def test_gradients_reach_own_experts_alone(self):
        spec = self.spec()
        with on_mesh((1, 8, 1)) as mesh:
            graph = graph_of(lambda key: MoELayer(key, BACKBONE, spec))

            @jax.jit
            def of(params, x, batch):
                context = Context(batch=batch, mode="train", key=jax.random.key(WITHOUT))
                counts = (jnp.arange(8) < 3)[:, None, None]
                loss = lambda params: (counts * nnx.merge(graph, params)(x, context)[0] ** 2).sum()  # noqa: E731
                return jax.grad(loss)(params)

            grads = to_numpy(of(put_params(STAYING, mesh), put_rows(X, mesh), put_batch(BATCH, mesh)))
        touched = [(np.asarray(each) != 0).any() for each in nnx.to_pure_dict(grads)["experts"]["w_in"]]
        assert touched == [True] * 3 + [False] * 5

    @pytest.mark.parametrize(
        "changed, words",
        [
            ({"router": {}, "replicated": True}, "every device has all"),
            ({"dispatch": "gather", "expert_dropout": 0.1}, "take no slots"),
        ],
    )
    def test_what_does_not_go_with_it(self, changed, words):
        with pytest.raises(ConfigError, match=words):
            self.spec(**changed)

    def test_a_table_ranks_nobody(self):
        with pytest.raises(ConfigError, match="not hash"):
            MoESpec(router=RouterConfig(selection=Hash(), weight=Constant()), gating_dropout_by="stay")
