"""The mixture-of-experts layer against the token-by-token reference, and at the settings where its value is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.context import Context, Totals
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.dispatch import MOVEMENTS
from sparsejax.routers.balance import LoadBalance, NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.scores import Sigmoid, Softmax
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw, Renormalized

from reference import moe as slow
from reference import routing as slow_routing
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

ROWS, LENGTH, WIDTH, EXPERTS, HIDDEN = 4, 8, 12, 5, 10
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2)
ROUTER = RouterConfig()
TOP_1 = RouterConfig(selection=TopK(k=1), weight=Raw())


def spec(router=ROUTER, **fields):
    return MoESpec(**({"num_experts": EXPERTS, "d_ff": HIDDEN, "capacity_factor": 0.8} | fields), router=router)


SETTINGS = {
    "Switch": spec(TOP_1),
    "Switch, gated": spec(TOP_1, gated=True),
    "top-2, raw": spec(RouterConfig(weight=Raw())),
    "top-2, renormalized before the drop": spec(),
    "top-2, renormalized after the drop": spec(RouterConfig(weight=Renormalized(drop="after"))),
    "top-3 of sigmoids, renormalized": spec(RouterConfig(score=Sigmoid(), selection=TopK(k=3)), capacity_factor=0.6),
    "top-1 of sigmoids": spec(RouterConfig(score=Sigmoid(), selection=TopK(k=1), weight=Raw())),
    "groups of half a row": spec(group_size=LENGTH // 2),
    "groups of two rows": spec(group_size=2 * LENGTH),
    "capacity per token": spec(capacity_convention="per_token", capacity_factor=1.1),
    "two shared experts, gated": spec(shared_experts=2, gated=True),
    "a shared expert, mixed": spec(shared_experts=1, mix_shared=True),
    "zero experts": spec(zero_experts=2),
    "copies, top-1": spec(TOP_1, copy_experts=3, capacity_factor=0.6),
    "constants, renormalized after the drop": spec(
        RouterConfig(selection=TopK(k=3), weight=Renormalized(drop="after")), constant_experts=2
    ),
    "all kinds in groups of half a row": spec(
        RouterConfig(selection=TopK(k=3)), zero_experts=1, copy_experts=2, constant_experts=2, group_size=LENGTH // 2
    ),
}


def with_router(params, change):
    """The same parameters with another router: `change` of the old matrix."""
    params = jax.tree.map(lambda leaf: leaf, params)
    params["router"]["weight"] = params["router"]["weight"].replace(
        np.asarray(change(params["router"]["weight"][...]), np.float32)
    )
    return params


def layer_params(layer_spec, seed=0):
    """Of a layer whose routing is far from uniform, so that experts overflow."""
    return with_router(moe_layer_params(layer_spec, BACKBONE, seed), lambda router: 4 * router)


def inputs(rows=ROWS, length=LENGTH, padded=3, seed=0):
    """(x, the fields of a batch)."""
    return (
        np.random.default_rng(seed).normal(size=(rows, length, WIDTH)).astype(np.float32),
        host_batch(rows, length, padded=padded, seed=seed),
    )


def run_layer(layer_spec, params, x, arrays, shape=ONE_DEVICE, backbone=BACKBONE, **options):
    """(y, report) as NumPy."""
    return moe_layer_runner(layer_spec, backbone, shape)(params, x, arrays, **options)


def reference(layer_spec, params, x, mask):
    """The slow layer's output for `params` in training."""
    matrices = ["w_in", "w_out"] + (["w_gate"] if layer_spec.gated else [])
    weight = layer_spec.router.weight
    layer = slow.Layer(
        router=params["router"]["weight"][...],
        **{name: params["experts"][name][...] for name in matrices},
        shared=tuple(params["shared"][name]["weight"][...] for name in matrices) if layer_spec.shared_experts else (),
        shared_mixing=params["shared_mixing"]["weight"][...] if layer_spec.mix_shared else None,
        zero=layer_spec.zero_experts,
        copy=layer_spec.copy_experts,
        **{name: params["constants"][name][...] for name in ("mix", "value") if layer_spec.constant_experts},
        k=layer_spec.experts_per_token,
        score="sigmoid" if isinstance(layer_spec.router.score, Sigmoid) else "softmax",
        weight="raw" if isinstance(weight, Raw) else weight.drop,
        factor=(round(100 * layer_spec.capacity_factor), 100),
        per_choice=layer_spec.capacity_convention == "per_choice",
        group_size=LENGTH if layer_spec.group_size is None else layer_spec.group_size,
    )
    return slow.forward(layer, x, mask)


def expected_report(groups, mask):
    """The counts and sums of a report, balance apart, from the groups of the reference and the mask in groups."""
    mask = mask.reshape(len(groups), -1)
    p = np.concatenate([g.probabilities[m] for g, m in zip(groups, mask, strict=True)])
    logits = np.concatenate([g.logits[m] for g, m in zip(groups, mask, strict=True)])
    assigned, processed = sum(g.assigned for g in groups), sum(g.processed for g in groups)
    return {
        "assigned": assigned,
        "processed": processed,
        "dropped_capacity": assigned - processed,
        "tokens": mask.sum(),
        "masked": (~mask).sum(),
        "unserved": sum((m & ~g.kept.any(-1)).sum() for g, m in zip(groups, mask, strict=True)),
        "slots": sum(g.slots.size for g in groups),
        "probability_sum": p.sum(0),
        "entropy_sum": -(p * np.log(p)).sum(),
        "z_sum": (np.log(np.exp(logits).sum(-1)) ** 2).sum(),
    }


@pytest.mark.parametrize("movement", MOVEMENTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_reference(name, movement):
    layer_spec = dataclasses.replace(SETTINGS[name], dispatch=movement)
    params, (x, arrays) = layer_params(layer_spec), inputs()
    mask = arrays["segments"] > 0
    y, report = run_layer(layer_spec, params, x, arrays)
    expected = reference(layer_spec, params, x, mask)
    assert_close(y, expected.y.astype(np.float32))
    fields = expected_report(expected.groups, mask)
    assert fields["dropped_capacity"].sum() > 0, "a case without drops shows little"
    for field, value in fields.items():
        actual = getattr(report, field)
        assert_close(actual, np.asarray(value, actual.dtype))
    dropped = np.concatenate([~g.kept.any(-1) for g in expected.groups]).reshape(ROWS, LENGTH)
    assert dropped.any() or layer_spec.experts_per_token > 1
    if not layer_spec.shared_experts:
        assert (y[dropped] == 0).all(), "a token without a slot gets exactly 0, not its probability times x"


class TestDenseLimit:
    @pytest.mark.parametrize("score", [Softmax(), Sigmoid()])
    def test_all_experts_with_ample_capacity_are_the_dense_mixture(self, score):
        router = RouterConfig(score=score, selection=TopK(k=EXPERTS), weight=Raw())
        layer_spec = spec(router, capacity_factor=1.0)
        params, (x, arrays) = layer_params(layer_spec), inputs(padded=0)
        y, report = run_layer(layer_spec, params, x, arrays)
        logits = x.astype(np.float64) @ params["router"]["weight"][...]
        scores = 1 / (1 + np.exp(-logits))
        if isinstance(score, Softmax):
            scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        w_in, w_out = (params["experts"][name][...].astype(np.float64) for name in ("w_in", "w_out"))
        dense = sum(scores[..., e, None] * slow.feed_forward(x, w_in[e], w_out[e]) for e in range(EXPERTS))
        assert_close(y, dense.astype(np.float32))
        assert report.dropped.sum() == 0

    def test_one_expert_is_an_mlp_behind_a_gate_of_one(self):
        layer_spec = spec(TOP_1, num_experts=1, capacity_factor=1.0)
        params, (x, arrays) = layer_params(layer_spec), inputs(padded=0)
        y, _ = run_layer(layer_spec, params, x, arrays)
        w_in, w_out = (params["experts"][name][0] for name in ("w_in", "w_out"))
        assert_close(y, slow.feed_forward(x.astype(np.float64), w_in, w_out).astype(np.float32))


def extended(x, arrays, rows, length):
    """The same with `rows` rows and `length` positions of padding added, the padding being full of large numbers."""
    wider = np.pad(x, ((0, rows), (0, length), (0, 0)), constant_values=9.0)
    fields = {k: np.pad(a, ((0, rows), (0, length))) for k, a in arrays.items() if a.ndim == 2}
    return wider, fields | {"rows": np.arange(x.shape[0] + rows, dtype=np.int32)}


class TestPadding:
    @pytest.mark.parametrize("movement", MOVEMENTS)
    @pytest.mark.parametrize("scope", ["sequence", "global"])
    def test_changes_no_integer_and_no_float(self, scope, movement, rows=2, length=4):
        layer_spec = spec(RouterConfig(balance=LoadBalance(scope=scope)), dispatch=movement)
        params, (x, arrays) = layer_params(layer_spec), inputs()
        y, report = run_layer(layer_spec, params, x, arrays)
        more_y, more = run_layer(layer_spec, params, *extended(x, arrays, rows, length))
        real = arrays["segments"] > 0
        assert_close(more_y[:ROWS, :LENGTH][real], y[real], 1e-6)
        assert (more_y[ROWS:] == 0).all() and (more_y[:, LENGTH:] == 0).all()
        assert more.masked == report.masked + rows * LENGTH + (ROWS + rows) * length
        same = lambda r: dataclasses.replace(r, masked=0, slots=0)  # noqa: E731
        assert_close(same(more), same(report), 1e-6)
        totals = lambda r, n: Totals(targets=r.tokens, tokens=r.tokens, rows=jnp.int32(n), microbatches=1)  # noqa: E731
        losses = lambda r: layer_spec.losses(_Report(r), totals(r, ROWS), None)  # noqa: E731
        assert_close(losses(more), losses(report), 1e-6)

    def test_padding_inside_a_group_buys_no_slots_for_the_others(self):
        layer_spec = spec(TOP_1, num_experts=2, capacity_factor=1.0)
        params, (x, arrays) = layer_params(layer_spec), inputs(rows=1, padded=4)
        x[:] = x[:, :1]  # every token wants the same expert
        _, report = run_layer(layer_spec, params, x, arrays)
        assert report.processed.sum() == 2, (
            "four tokens, two experts: two slots, not the four that eight tokens would have"
        )
        assert report.slots == 8


@dataclasses.dataclass
class _Report:
    moe: object


class TestNoise:
    JITTERED = spec(dataclasses.replace(TOP_1, jitter=0.3))

    def run(self, x, arrays, **options):
        return run_layer(self.JITTERED, layer_params(self.JITTERED), x, arrays, **options)

    def test_evaluation_ignores_the_key(self):
        x, arrays = inputs()
        plain = self.run(x, arrays, mode="eval")
        # The model hands no key to evaluation; the router must not draw from one, either.
        assert_close(self.run(x, arrays, mode="eval", key=None), plain, 0.0)
        assert_close(run_layer(spec(TOP_1), layer_params(self.JITTERED), x, arrays, mode="eval"), plain, 0.0)

    def test_one_key_is_one_noise_and_another_key_another(self):
        x, arrays = inputs()
        first, again, other = (self.run(x, arrays, key=jax.random.key(seed)) for seed in (1, 1, 2))
        assert_close(again, first, 0.0)
        assert np.abs(other[0] - first[0]).max() > 1e-3

    def test_a_row_draws_by_its_number_and_not_by_its_place(self):
        x, arrays = inputs(padded=0)
        order = np.array([2, 0, 3, 1])
        y, _ = self.run(x, arrays, key=jax.random.key(1))
        moved, _ = self.run(x[order], {k: a[order] for k, a in arrays.items()}, key=jax.random.key(1))
        assert_close(moved, y[order], 1e-6)
        unnumbered, _ = self.run(x[order], arrays, key=jax.random.key(1))
        assert np.abs(unnumbered - y[order]).max() > 1e-3

    def test_only_the_router_sees_the_noise(self):
        """With one expert the routing cannot change, and its softmax is 1: the output must not move."""
        layer_spec = spec(dataclasses.replace(TOP_1, jitter=0.9), num_experts=1, capacity_factor=1.0)
        params, (x, arrays) = layer_params(layer_spec), inputs()
        noisy, _ = run_layer(layer_spec, params, x, arrays, key=jax.random.key(1))
        assert_close(noisy, run_layer(layer_spec, params, x, arrays)[0], 0.0)


class TestPrecision:
    def test_bfloat16_experts_leave_the_router_in_float32(self):
        layer_spec = spec()
        params, (x, arrays) = layer_params(layer_spec), inputs()
        x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
        half = dataclasses.replace(BACKBONE, dtype="bfloat16")
        y32, report32 = run_layer(layer_spec, params, x, arrays)
        y16, report16 = run_layer(layer_spec, params, x, arrays, backbone=half)
        assert y16.dtype == jnp.bfloat16
        assert np.abs(y16.astype(np.float32) - y32).max() < 0.05 * np.abs(y32).max()
        assert_close(report16, report32)  # float sums to 1e-5 and every count: bfloat16 logits would differ at 1e-2

    def test_the_router_multiplies_at_full_precision(self):
        with on_mesh(ONE_DEVICE) as mesh:
            x, arrays = inputs()
            layer_spec = spec()
            run = moe_layer_runner(layer_spec, dataclasses.replace(BACKBONE, dtype="bfloat16"), ONE_DEVICE)
            operands = (put_params(layer_params(layer_spec), mesh), put_rows(x, mesh), put_batch(arrays, mesh))
            lowered = run.call.lower(*operands, None, "train").as_text()
        router = [line for line in lowered.splitlines() if "dot_general" in line and f"{WIDTH}x{EXPERTS}xf32" in line]
        assert router and all("HIGHEST" in line for line in router)


class TestTies:
    @pytest.mark.parametrize("k", [1, 2])
    def test_a_router_of_zeros_sends_every_token_to_the_first_k_experts(self, k):
        """The documented tie rule: lower index first. It drops most tokens at once; initialise routers at random."""
        layer_spec = spec(RouterConfig(selection=TopK(k=k), weight=Raw()), capacity_factor=1.0)
        params, (x, arrays) = with_router(layer_params(layer_spec), lambda router: 0 * router), inputs(padded=0)
        _, report = run_layer(layer_spec, params, x, arrays)
        tokens = ROWS * LENGTH
        assert report.assigned.tolist() == [tokens] * k + [0] * (EXPERTS - k)
        slots = math.ceil(k * LENGTH / EXPERTS)
        assert report.processed.tolist() == [ROWS * slots] * k + [0] * (EXPERTS - k)
        np.testing.assert_allclose(report.z_sum / tokens, math.log(EXPERTS) ** 2, rtol=1e-6)
        np.testing.assert_allclose(report.entropy_sum / tokens, math.log(EXPERTS), rtol=1e-6)


def gradient(layer_spec, params, x, arrays, loss, shape=ONE_DEVICE, reports=False):
    """Of `loss(y, report)` in the parameters."""
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MoELayer(key, BACKBONE, layer_spec))

        def value(params, x, batch):
            return loss(*nnx.merge(graph, params)(x, Context(batch=batch, mode="train")))

        operands = put_params(params, mesh), put_rows(x, mesh), put_batch(arrays, mesh)
        return to_numpy(jax.jit(jax.grad(value))(*operands))


class TestRouterGradient:
    @pytest.mark.parametrize(
        "router",
        [TOP_1, ROUTER, RouterConfig(weight=Renormalized(drop="after")), RouterConfig(score=Sigmoid())],
        ids=["k=1 raw", "k=2 renormalized", "k=2 renormalized after", "k=2 sigmoid"],
    )
    def test_the_task_alone_moves_the_router(self, router):
        router = dataclasses.replace(router, balance=NoBalance(), z_loss=0.0)
        layer_spec = spec(router)
        x, arrays = inputs()
        target = np.random.default_rng(5).normal(size=x.shape)
        grads = gradient(layer_spec, layer_params(layer_spec), x, arrays, lambda y, _: ((y - target) ** 2).mean())
        scale = np.abs(grads["experts"]["w_out"][...]).max()
        assert np.abs(grads["router"]["weight"][...]).max() > 1e-3 * scale

    @pytest.mark.parametrize("scope", ["sequence", "device", "microbatch", "global"])
    def test_the_balance_loss_moves_the_router_and_nothing_else(self, scope):
        layer_spec = spec(RouterConfig(balance=LoadBalance(scope=scope), z_loss=0.0))
        totals = Totals(targets=jnp.int32(1), tokens=jnp.int32(ROWS * LENGTH), rows=jnp.int32(ROWS), microbatches=1)
        loss = lambda _, report: layer_spec.losses(_Report(report), totals, None)["balance"]  # noqa: E731
        grads = gradient(layer_spec, layer_params(layer_spec), *inputs(padded=0), loss)
        assert np.abs(grads["router"]["weight"][...]).max() > 1e-5
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["experts"]))

    def test_an_expert_without_tokens_has_a_gradient_of_zero(self):
        layer_spec = spec(TOP_1)
        params, (x, arrays) = layer_params(layer_spec), inputs()
        x[:] = x[:, :1, :]
        x[:] = x[:1]
        grads = gradient(layer_spec, params, x, arrays, lambda y, _: (y**2).sum())
        chosen = int(np.argmax(x[0, 0] @ params["router"]["weight"][...]))
        used = [np.abs(grads["experts"]["w_in"][e]).max() > 0 for e in range(EXPERTS)]
        assert used == [e == chosen for e in range(EXPERTS)]


def balance_of(layer_spec, params, x, arrays, shape=ONE_DEVICE):
    """(balance loss over its coefficient, report)."""
    _, report = run_layer(layer_spec, params, x, arrays, shape)
    rows = (arrays["segments"] > 0).any(-1).sum()
    totals = Totals(targets=jnp.int32(1), tokens=report.tokens, rows=jnp.int32(rows), microbatches=1)
    terms = layer_spec.losses(_Report(jax.tree.map(jnp.asarray, report)), totals, None)
    return float(terms["balance"]) / layer_spec.router.balance.coefficient, report


def units(scope, arrays, shape):
    """The rows that make up each unit of a scope."""
    rows = len(arrays["rows"])
    devices = shape[0] * shape[1]
    return {"sequence": rows, "device": devices, "microbatch": 1, "global": 1}[scope]


SCOPES = ["sequence", "device", "microbatch", "global"]


class TestBalance:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("score", [Softmax(), Sigmoid()])
    def test_value_is_the_mean_over_units_of_the_reference(self, scope, score):
        shape = (2, 1, 1) if scope == "device" else ONE_DEVICE
        layer_spec = spec(RouterConfig(score=score, balance=LoadBalance(scope=scope, coefficient=0.5)))
        params, (x, arrays) = layer_params(layer_spec), inputs()
        value, _ = balance_of(layer_spec, params, x, arrays, shape)
        mask, groups = arrays["segments"] > 0, reference(layer_spec, params, x, arrays["segments"] > 0).groups
        parts = np.array_split(np.arange(ROWS), units(scope, arrays, shape))
        expected = [
            slow_routing.balance(
                sum(groups[row].assigned for row in part),
                np.concatenate([groups[row].probabilities[mask[row]] for row in part]),
                2,
            )
            for part in parts
        ]
        assert len(set(np.round(expected, 6))) == len(parts), "units that agree would not tell a mean from a sum"
        np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("k", [1, 2])
    def test_one_when_balanced_and_e_over_k_when_collapsed(self, scope, k):
        """Each token shouts for experts e and (k = 2) e + 1: all in turn, or all for the same."""
        experts, rows, length = 8, 2, 8
        router = RouterConfig(selection=TopK(k=k), weight=Raw(), balance=LoadBalance(scope=scope))
        layer_spec = MoESpec(num_experts=experts, d_ff=4, capacity_factor=0.5, router=router)
        backbone = ModelConfig(d_model=experts, num_heads=2)
        params = with_router(moe_layer_params(layer_spec, backbone), lambda _: np.eye(experts))
        turn = np.tile(np.arange(length), (rows, 1))
        for wanted, expected in ((turn % experts, 1.0), (0 * turn, experts / k)):
            x = sum(30.0 * np.eye(experts, dtype=np.float32)[(wanted + c) % experts] for c in range(k))
            arrays = host_batch(rows, length, padded=0)
            _, report = run_layer(layer_spec, params, x, arrays, backbone=backbone)
            totals = Totals(targets=jnp.int32(1), tokens=report.tokens, rows=jnp.int32(rows), microbatches=1)
            value = layer_spec.losses(_Report(report), totals, None)["balance"]
            np.testing.assert_allclose(value / 0.01, expected, rtol=1e-5)

    def test_loads_are_those_before_the_drop(self):
        """Capacity must not flatter the loss: the same routing with and without room has the same balance."""
        router = RouterConfig(balance=LoadBalance(scope="sequence"))
        x, arrays = inputs()
        tight, roomy = spec(router, capacity_factor=0.3), spec(router, capacity_factor=5.0)
        params = layer_params(tight)
        assert run_layer(tight, params, x, arrays)[1].dropped.sum() > 0
        np.testing.assert_allclose(
            balance_of(tight, params, x, arrays)[0], balance_of(roomy, params, x, arrays)[0], rtol=1e-6
        )

    def test_none_measures_and_costs_nothing(self):
        layer_spec = spec(RouterConfig(balance=NoBalance(), z_loss=0.0))
        x, arrays = inputs()
        _, report = run_layer(layer_spec, layer_params(layer_spec), x, arrays)
        totals = Totals(targets=jnp.int32(1), tokens=report.tokens, rows=jnp.int32(ROWS), microbatches=1)
        assert report.balance_sum > 1 and report.balance_units == 1
        assert all(value == 0 for value in layer_spec.losses(_Report(report), totals, None).values())


class TestGroups:
    def test_capacity_is_a_groups_own(self):
        """The same tokens in one group and in two: a crowded half cannot borrow the other's slots."""
        params = layer_params(spec())
        x, arrays = inputs(padded=0)
        x[:, : LENGTH // 2] = x[:, :1]  # the first half of a row wants two experts, the second half anything
        whole, halves = (run_layer(spec(capacity_factor=1.0, group_size=size), params, x, arrays)[1] for size in (8, 4))
        assert np.array_equal(whole.assigned, halves.assigned)
        assert halves.processed.sum() != whole.processed.sum()


class TestModes:
    def test_generation_drops_nothing_whatever_the_routing(self):
        layer_spec = spec(TOP_1, capacity_factor=0.1)
        params, (x, arrays) = layer_params(layer_spec), inputs()
        x[:] = x[:, :1]
        for rows in (slice(None), slice(0, 1)):
            some = {k: a[rows] for k, a in arrays.items()}
            _, report = run_layer(layer_spec, params, x[rows], some, mode="generate")
            assert report.dropped.sum() == 0
        assert run_layer(layer_spec, params, x, arrays)[1].dropped.sum() > 0

    def test_evaluation_has_its_own_capacity(self):
        layer_spec = spec(capacity_factor=0.4, eval_capacity_factor=5.0)
        params, (x, arrays) = layer_params(layer_spec), inputs()
        assert run_layer(layer_spec, params, x, arrays)[1].dropped.sum() > 0
        assert run_layer(layer_spec, params, x, arrays, mode="eval")[1].dropped.sum() == 0


class TestConfig:
    def test_more_experts_per_token_than_experts(self):
        with pytest.raises(ConfigError, match=r"4 experts per token.*num_experts=3") as error:
            MoESpec(num_experts=3, router=RouterConfig(selection=TopK(k=4)))
        assert error.value.key == "router.selection.k"

    @pytest.mark.parametrize("field", ["num_experts", "d_ff", "group_size", "capacity_factor", "eval_capacity_factor"])
    def test_sizes_must_be_positive(self, field):
        with pytest.raises(ConfigError, match="0 is not positive") as error:
            MoESpec(**{field: 0})
        assert error.value.key == field

    @pytest.mark.parametrize("field", ["capacity_factor", "eval_capacity_factor"])
    def test_capacity_without_end_is_refused_with_the_number_that_does_it(self, field):
        with pytest.raises(ConfigError, match="num_experts=8 is room for any routing") as error:
            MoESpec(**{field: math.inf})
        assert error.value.key == field

    @pytest.mark.parametrize("field, value", [("z_loss", -1.0), ("jitter", 1.0), ("jitter", -0.1)])
    def test_router_numbers_out_of_range(self, field, value):
        with pytest.raises(ConfigError) as error:
            RouterConfig(**{field: value})
        assert error.value.key == field
