"""DataConfig refuses what cannot be, and names the fields that do nothing."""

import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("sequence_length", {"sequence_length": 0}),
        ("batch_size", {"batch_size": 0}),
        ("workers", {"workers": 0}),
        ("prefetch", {"prefetch": -1}),
        ("validation_fraction", {"validation_fraction": 1.0}),
        ("validation_fraction", {"validation_fraction": -0.1}),
        ("name", {"name": ""}),
        ("path", {"name": "text"}),
    ],
)
def test_impossible_values_name_their_key(key, settings):
    with pytest.raises(ConfigError) as error:
        DataConfig(**settings)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({}, {"path", "validation_fraction", "text_feature"}),
        ({"name": "synthetic", "prefetch": 0}, {"path", "validation_fraction", "text_feature", "cache", "workers"}),
        ({"name": "lm1b"}, {"path", "validation_fraction"}),
        ({"name": "text", "path": "a.txt"}, {"text_feature"}),
        ({"name": "text", "path": "a.jsonl"}, set()),
    ],
)
def test_unused_fields(settings, unused):
    reasons = DataConfig(**settings).unused()
    assert set(reasons) == unused and all(reasons.values())
