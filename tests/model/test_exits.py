"""Which exits a config may ask for, what they weigh in each step, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.model.config import ModelConfig
from sparsejax.model.continued import continued
from sparsejax.model.cost import component_costs, forward_flops
from sparsejax.model.exits import Alternating, ExitHeads, Gradual, NoExits, Rotational, TwoStage
from sparsejax.model.heads import Classes
from sparsejax.model.lm import LanguageModel

from reference import exit_training as reference
from support import ONE_DEVICE, on_mesh

DEPTHS, LAYERS = (2, 3, 5), 6


@pytest.mark.parametrize("rule", ["uniform", "linear", "sum_l", "geometric"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_weights_are_those_of_the_papers(rule, scale):
    weighting = ExitHeads(layers=DEPTHS, weights=rule, scale=scale, distill=0.25).weighting(jnp.int32(7), 10, LAYERS)
    want = reference.weights(rule, DEPTHS, LAYERS, scale)
    np.testing.assert_allclose(weighting.hard + weighting.soft, want, rtol=1e-6)
    np.testing.assert_allclose(weighting.soft, [*(0.25 * want[:-1]), 0], rtol=1e-6)


def active(curriculum, step, steps=10):
    return np.asarray(curriculum.factors(jnp.int32(step), steps, len(DEPTHS))).astype(int).tolist()


def test_who_learns_when():
    assert [active(Rotational(every=3), step) for step in range(4)] == [
        [1, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 0, 1],
        [1, 0, 0, 1],
    ]
    assert [active(Gradual(until=0.6), step) for step in (0, 1, 2, 4, 6, 9)] == [
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert active(Gradual(until=0.0), 0) == [1, 1, 1, 1]
    assert [active(Alternating(), step) for step in (0, 1, 2)] == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert [active(TwoStage(start=0.5), step) for step in (4, 5)] == [[0, 0, 0, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": ()}, "one or more ascending"),
        ({"layers": (3, 2)}, "one or more ascending"),
        ({"layers": (0, 2)}, "from 1"),
        ({"layers": (2,), "scale": -1.0}, "allowed: 0 or more"),
        ({"layers": (2,), "distill": 1.5}, "outside 0 … 1"),
        ({"layers": (2,), "norm": "shared", "curriculum": TwoStage()}, "would train nothing"),
        ({"layers": (2,), "scale": 0.0, "curriculum": TwoStage()}, "they have no weight"),
        ({"layers": (1,), "weights": "sum_l", "curriculum": TwoStage()}, "they have no weight"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ExitHeads(**settings)


def test_exits_lie_before_the_last_layer():
    with pytest.raises(ConfigError, match=r"exits\.layers: 4 is not less than the model's 4 layers"):
        ModelConfig(exits=ExitHeads(layers=(2, 4)))
    with pytest.raises(ConfigError, match=r"layer_dropout: 1\.0 is outside"):
        ModelConfig(layer_dropout=1.0)


def test_exits_begin_on_top_of_a_model_that_had_none_and_can_be_left_behind():
    plain = ModelConfig(d_model=8, num_heads=2, vocab_size=16, pattern=("dense",))
    exits = dataclasses.replace(plain, exits=ExitHeads(layers=(1,), head="own"))
    with on_mesh(ONE_DEVICE):
        trained, fresh = (nnx.state(LanguageModel(jax.random.key(n), c)) for n, c in enumerate((plain, exits)))
        paths = lambda state: dict(nnx.to_flat_state(state))  # noqa: E731
        begun = paths(continued(exits, fresh, plain, trained))
        back = paths(continued(plain, trained, exits, fresh))
    assert begun.keys() == paths(fresh).keys() and back.keys() == paths(trained).keys()
    for path, variable in begun.items():
        source = fresh if path[0] == "exits" else trained
        np.testing.assert_array_equal(variable[...], paths(source)[path][...])
    np.testing.assert_array_equal(back["embedding", "table"][...], paths(fresh)["embedding", "table"][...])


def test_every_exit_costs_a_head():
    plain = component_costs(ModelConfig())
    shared, own = (
        component_costs(ModelConfig(exits=ExitHeads(layers=(1, 3), head=head))) for head in ("shared", "own")
    )
    assert "exit_heads" not in plain
    assert shared["exit_heads"].per_token == own["exit_heads"].per_token == 2 * plain["head"].per_token
    assert shared["exit_heads"].parameters == 2 * 128
    assert own["exit_heads"].parameters == 2 * (128 + 256 * 128)


def test_of_classes_it_costs_that_once_a_row():
    exits = ExitHeads(layers=(1, 3), head="own")
    config = ModelConfig(
        d_model=16, num_heads=2, causal=False, pattern=("dense",), repeats=4, head=Classes(classes=5), exits=exits
    )
    cost = component_costs(config)["exit_heads"]
    assert (cost.per_token, cost.per_row, cost.parameters) == (0, 2 * 2 * 16 * 5, 2 * (16 + 16 * 5))
    plain = dataclasses.replace(config, exits=NoExits())
    more = forward_flops(config, 40, 80, rows=3) - forward_flops(plain, 40, 80, rows=3)
    assert more == forward_flops(config, 40, 80, 0.0, 3) - forward_flops(plain, 40, 80, 0.0, 3) == 3 * cost.per_row
