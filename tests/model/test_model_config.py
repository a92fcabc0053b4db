"""A model config that cannot work says which key, which value, and what would."""

import dataclasses

import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig


@pytest.mark.parametrize(
    "fields, key, message",
    [
        (
            {"pattern": ("dense", "mor")},
            "pattern",
            r"no block 'mor' in model.blocks; known: dense, moe.*Did you mean 'moe'",
        ),
        ({"suffix": ("sparse",)}, "suffix", "no block 'sparse'"),
        ({"pattern": ()}, "pattern", "no layers"),
        ({"repeats": 0}, "pattern", "no layers"),
        ({"repeats": -1}, "repeats", "-1 is negative"),
        ({"remat": "names"}, "remat_names", "is empty"),
        ({"remat": "names", "remat_names": ("slot",)}, "remat_names", "'slot' matches nothing.*Did you mean 'slots'"),
        ({"pattern": ("dense",), "remat": "names", "remat_names": ("slots",)}, "remat_names", "known: attention, mlp"),
        ({"vocab_size": 1}, "vocab_size", "less than 2"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap", "not positive"),
        ({"attention_soft_cap": -1.0}, "attention_soft_cap", "not positive"),
        ({"d_model": 0}, "d_model", "not positive"),
        ({"d_model": 48, "num_heads": 5}, "num_heads", "5 does not divide d_model=48.*1, 2, 3, 4, 6, 8"),
        ({"d_model": 12, "num_heads": 4}, "head_dim", "3 is odd"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads", "3 does not divide num_heads=4; allowed: 1, 2, 4"),
    ],
)
def test_is_refused_with_the_reason(fields, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**fields)
    assert error.value.key == key


def test_heads_need_not_divide_the_width_when_their_own_is_given():
    assert ModelConfig(d_model=48, num_heads=5, head_dim=16).width_of_head == 16


def test_layers_run_from_input_to_output():
    config = ModelConfig(prefix=("dense",), pattern=("moe", "dense"), repeats=2, suffix=("moe",))
    assert config.num_layers == 6
    assert [layer.name for layer in config.layers] == ["00_dense", "01_moe", "02_dense", "03_moe", "04_dense", "05_moe"]
    assert [(layer.position, layer.repeat) for layer in config.layers] == [
        ("prefix_0", None),
        ("pattern_0", 0),
        ("pattern_1", 0),
        ("pattern_0", 1),
        ("pattern_1", 1),
        ("suffix_0", None),
    ]
    assert config.positions == {"prefix_0": "dense", "pattern_0": "moe", "pattern_1": "dense", "suffix_0": "moe"}


def test_a_config_is_hashable_and_equal_by_value():
    first, second = ModelConfig(), ModelConfig()
    assert first == second and hash(first) == hash(second)
    assert dataclasses.replace(first, blocks=dict(first.blocks) | {"moe": MoESpec(num_experts=4)}) != first


def test_what_has_no_effect_is_known():
    assert set(ModelConfig().unused()) == {"remat_names"}
    assert set(ModelConfig(pattern=("dense",)).unused()) == {"remat_names", "blocks.moe"}
    assert set(ModelConfig(prefix=("dense", "moe"), pattern=()).unused()) == {
        "remat_names",
        "repeats",
        "tied_repeats",
        "scan",
    }
