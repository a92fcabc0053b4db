"""Schedules by their values, decay masks by their effect, and the shardings of the optimizer's state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.errors import ConfigError
from sparsejax.train.optimizer import (
    GROUPS,
    OPTIMIZERS,
    Adafactor,
    AdamW,
    build,
    clip_scale,
    learning_rate_at,
    opt_state_specs,
)
from sparsejax.train.schedules import SCHEDULES, Constant, Cosine, WarmupStableDecay

SHAPES = {
    "dense": (8, 16),
    "embedding": (32, 8),
    "norm": (8,),
    "router": (8, 4),
    "expert": (4, 8, 16),
    "stream": (2, 2),
}


def parameters(shapes=SHAPES):
    """One Param of ones per group."""
    return nnx.State({group: nnx.Param(jnp.ones(shape), group=group) for group, shape in shapes.items()})


def one_step(config, gradient=0.0, steps=1000):
    """The update (a dict by group) of step 0 for a constant gradient on parameters of ones."""
    params = parameters()
    tx = build(config, steps, params)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return {group: np.asarray(updates[group][...]) for group in SHAPES}


def rates(schedule, steps, peak=2.0):
    at = learning_rate_at(AdamW(learning_rate=peak, schedule=schedule), steps)
    return np.array([at(step) for step in range(steps)])


class TestSchedules:
    def test_warm_up_starts_above_zero_and_reaches_the_peak(self):
        np.testing.assert_allclose(rates(Constant(warmup_steps=3), 6), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-6)

    def test_cosine(self):
        want = [1.0] + [0.2 + 0.9 * (1 + np.cos(np.pi * step / 9)) for step in range(9)]
        np.testing.assert_allclose(rates(Cosine(warmup_steps=1, final_fraction=0.1), 10), want, rtol=1e-6)

    def test_wsd(self):
        want = [1.0] + [2.0] * 5 + [2.0, 1.75, 1.5, 1.25]
        schedule = WarmupStableDecay(warmup_steps=1, decay_fraction=0.4, final_fraction=0.5)
        np.testing.assert_allclose(rates(schedule, 10), want, rtol=1e-6)

    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("steps", [1, 5, 40])
    def test_defaults_fit_every_run(self, name, steps):
        values = rates(SCHEDULES[name](), steps)
        assert values.max() == pytest.approx(2.0) and values.min() > 0

    def test_automatic_warm_up_is_a_tenth_of_the_run(self):
        assert np.argmax(rates(Constant(), 40)) == 4

    @pytest.mark.parametrize(
        "schedule, key, words",
        [
            (Cosine(warmup_steps=20), "schedule.warmup_steps", ["20", "10 steps", "0 to 9"]),
            (
                WarmupStableDecay(warmup_steps=5, decay_fraction=0.6),
                "schedule.decay_fraction",
                ["5 warm-up", "6 decay", "at most 0.5"],
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_with_the_numbers(self, schedule, key, words):
        with pytest.raises(ConfigError) as caught:
            build(AdamW(schedule=schedule), 10, parameters())
        assert caught.value.key == key
        assert all(word in str(caught.value) for word in words), caught.value


class TestSettings:
    @pytest.mark.parametrize(
        "make, key",
        [
            (lambda: AdamW(learning_rate=0.0), "learning_rate"),
            (lambda: AdamW(clip_norm=0.0), "clip_norm"),
            (lambda: AdamW(weight_decay=-1.0), "weight_decay"),
            (lambda: AdamW(b2=1.0), "b2"),
            (lambda: Adafactor(update_clip=0.5), "update_clip"),
            (lambda: Adafactor(momentum=1.0), "momentum"),
            (lambda: Cosine(warmup_steps=-1), "warmup_steps"),
            (lambda: Cosine(final_fraction=1.5), "final_fraction"),
        ],
    )
    def test_values_out_of_range(self, make, key):
        with pytest.raises(ConfigError, match="allowed: ") as caught:
            make()
        assert caught.value.key == key

    def test_unknown_group_suggests_the_nearest(self):
        with pytest.raises(ConfigError, match=r"'experts'.*Did you mean 'expert'?"):
            AdamW(weight_decay_groups=("experts",))

    def test_groups_are_unused_without_decay(self):
        assert AdamW().unused() == {}
        assert "weight_decay_groups" in AdamW(weight_decay=0.0).unused()


class TestUpdates:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_decay_takes_rate_times_decay_of_the_chosen_groups_only(self, name):
        config = OPTIMIZERS[name](learning_rate=0.1, weight_decay=0.5, schedule=Constant(warmup_steps=0))
        updates = one_step(config, gradient=0.0)
        for group in GROUPS:
            moved = 0.0 if group in ("norm", "stream") else -0.05
            np.testing.assert_allclose(updates[group], moved, rtol=1e-6)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_first_step_moves_parameters_of_ones_by_the_rate(self, name):
        config = OPTIMIZERS[name](learning_rate=0.01, weight_decay=0.0, schedule=Constant(warmup_steps=0))
        for update in one_step(config, gradient=0.3).values():
            np.testing.assert_allclose(update, -0.01, rtol=1e-5)

    def test_adafactor_step_is_relative_to_the_parameter(self):
        params = jax.tree.map(lambda leaf: 0.02 * leaf, parameters())
        moves = {}
        for relative in (True, False):
            config = Adafactor(
                learning_rate=0.01, weight_decay=0.0, schedule=Constant(warmup_steps=0), scale_by_parameter=relative
            )
            tx = build(config, 10, params)
            updates, _ = tx.update(params, tx.init(params), params)
            moves[relative] = float(updates["dense"][...].mean())
        assert moves[True] == pytest.approx(-0.01 * 0.02, rel=1e-4) and moves[False] == pytest.approx(-0.01, rel=1e-4)

    @pytest.mark.parametrize("norm, expected", [(100.0, 0.005), (0.5, 1.0), (0.1, 1.0), (0.0, 1.0)])
    def test_clipping_is_down_to_a_norm(self, norm, expected):
        assert float(clip_scale(AdamW(clip_norm=0.5), jnp.float32(norm))) == pytest.approx(expected)
        assert float(clip_scale(AdamW(clip_norm=None), jnp.float32(norm))) == 1


class TestStateSpecs:
    SHAPES = {"dense": (128, 128), "expert": (4, 128, 256), "norm": (128,), "router": (8, 4)}
    SPECS = {
        "dense": P("data", "tensor"),
        "expert": P("expert", None, "tensor"),
        "norm": P(None),
        "router": P("data", None),
    }

    def specs(self, config):
        params = parameters(self.SHAPES)
        return opt_state_specs(build(config, 10, params), jax.eval_shape(lambda: params), self.SPECS)

    def test_moments_are_sharded_like_their_parameters(self):
        mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"))
        with jax.set_mesh(mesh):
            specs = self.specs(AdamW())
        for moment in ("mu", "nu"):
            tree = optax.tree_utils.tree_get(specs, moment)
            assert {group: tree[group].get_value() for group in self.SPECS} == self.SPECS

    def test_factored_rows_and_columns_keep_what_is_left(self):
        mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"))
        with jax.set_mesh(mesh):
            specs = self.specs(Adafactor())
        row, column, full = (optax.tree_utils.tree_get(specs, name) for name in ("v_row", "v_col", "v"))
        # A square matrix: only the order of its axes tells the row from the column.
        assert (row["dense"].get_value(), column["dense"].get_value()) == (P("data"), P("tensor"))
        assert (row["expert"].get_value(), column["expert"].get_value()) == (P("expert", None), P("expert", "tensor"))
        assert full["router"].get_value() == P("data", None)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
    def test_a_step_leaves_the_state_with_the_same_shardings(self, name, shape):
        config = OPTIMIZERS[name]()
        mesh = jax.make_mesh(shape, ("data", "expert", "tensor"), devices=jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            host = parameters(self.SHAPES)
            tx = build(config, 10, host)
            params = nnx.State(
                {
                    g: nnx.Param(jax.device_put(host[g][...], NamedSharding(mesh, s)), group=g)
                    for g, s in self.SPECS.items()
                }
            )
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(config))
            state = jax.jit(tx.init, out_shardings=shardings)(params)
            update = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
            step = update.lower(params, state, params).compile()  # which takes no other shardings than these
            for _ in range(2):
                updates, state = step(params, state, params)
                jax.block_until_ready(state)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
        assert [leaf.sharding.spec for leaf in jax.tree.leaves(updates)] == [
            self.SPECS[group] for group in sorted(self.SPECS)
        ]
