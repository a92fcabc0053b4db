"""Scores that sharpen with the steps of training: the temperature, what it divides, and who is taken in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.routers import presets
from sparsejax.routers.annealing import Annealing
from sparsejax.routers.candidates import Noise
from sparsejax.routers.noise import Gumbel
from sparsejax.routers.presets import dts_gate
from sparsejax.routers.router import decide

from reference import routing as slow
from support import assert_close, known

GROUPS, SIZE, EXPERTS = 2, 12, 8
LOGITS = np.random.default_rng(0).normal(size=(GROUPS, SIZE, EXPERTS)).astype(np.float32)
COOLING = Annealing(start=4.0, end=0.01, steps=10)


def state_after(steps, controller=COOLING):
    state = jnp.zeros((2, EXPERTS))
    for _ in range(steps):
        state = controller.update(state, None, 2)
    return state


def decided(steps, noisy=False, **fields):
    config = type(dts_gate())(**(vars(dts_gate()) | {"controller": COOLING} | fields))
    keys = jax.random.split(jax.random.key(0), GROUPS)
    noise = Noise(keys_B=keys, row_length=SIZE, groups=(GROUPS, SIZE)) if noisy else None
    given = known(np.ones((GROUPS, SIZE), bool), SIZE, noise=noise)
    spread = jnp.ones_like(LOGITS) if noisy else None
    return decide(jnp.asarray(LOGITS), given, config, state_after(steps), spread), noise


@pytest.mark.parametrize("steps, expected", [(0, 4.0), (5, 2.005), (10, 0.01), (99, 0.01)])
def test_the_temperature_falls_by_equal_differences_and_stays(steps, expected):
    assert float(COOLING.temperature(state_after(steps))) == pytest.approx(expected)


@pytest.mark.parametrize("steps, temperature", [(0, 4.0), (5, 2.005)])
def test_logits_and_noise_are_divided_and_the_z_loss_sees_neither(steps, temperature):
    decision, noise = decided(steps, noisy=True)
    warm = (LOGITS.astype(np.float64) + np.asarray(Gumbel().draw(noise, EXPERTS))) / temperature
    expected = np.apply_along_axis(slow.score, -1, warm, "softmax").astype(np.float32)
    assert_close(decision.probabilities_GSE, expected, 1e-5)
    assert np.array_equal(decision.logits_GSE, LOGITS)


def test_from_everyone_to_one():
    taken = [int(decided(steps)[0].pairs.valid.sum()) / (GROUPS * SIZE) for steps in range(0, 11)]
    assert taken[0] > 0.9 * EXPERTS and taken[-1] == 1 and taken == sorted(taken, reverse=True)
    last = decided(10)[0].pairs
    assert np.array_equal(last.expert[last.valid].reshape(GROUPS, SIZE), LOGITS.argmax(-1))


def test_repeats_of_a_layer_count_alike_and_the_ranking_gets_nothing():
    state = COOLING.update(jnp.zeros((3, 2, EXPERTS)), None, 2)
    assert (state[:, 1] == 1).all() and (state[:, 0] == 0).all()


@pytest.mark.parametrize("fields, key", [({"start": 0.0}, "start"), ({"end": 3.0}, "end"), ({"steps": 0}, "steps")])
def test_wrong_settings(fields, key):
    with pytest.raises(ConfigError) as error:
        Annealing(**fields)
    assert error.value.key == key


def test_where_there_is_no_router_nothing_cools():
    assert "controller" in presets.hash().unused() and "controller" not in dts_gate().unused()
    assert "controller" in type(dts_gate())(**(vars(presets.hash()) | {"controller": COOLING})).unused()
