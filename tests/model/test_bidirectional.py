"""Models without a causal mask: what a token sees, what they may contain, what they cost, and what they cannot do."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.config import load
from sparsejax.base.errors import ConfigError
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.sequence import AveragePooling
from sparsejax.blocks.soft import SoftSpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import mean_keys
from sparsejax.model.lm import LanguageModel, init_caches
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import SELECTORS
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.step import attended_keys

from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

BLOCKS = {"dense": DenseSpec(d_ff=16), "soft": SoftSpec(num_experts=2, slots_per_expert=2, d_ff=8)}
SHAPE = {"d_model": 16, "num_heads": 2, "vocab_size": 32, "pattern": ("dense",), "repeats": 2, "causal": False}
ENCODER = ModelConfig(**SHAPE, blocks=BLOCKS)


@functools.cache
def params():
    return host_params(lambda key: LanguageModel(key, ENCODER))


def logits(config, arrays):
    with on_mesh(ONE_DEVICE) as mesh:
        graph = graph_of(lambda key: LanguageModel(key, config))
        call = jax.jit(lambda params, batch: nnx.merge(graph, params)(batch, mode="eval").logits)
        return to_numpy(call(put_params(params(), mesh), put_batch(arrays, mesh)))


class TestWhatATokenSees:
    @pytest.mark.parametrize("causal", [True, False])
    def test_later_tokens_of_its_document(self, causal):
        config, arrays = dataclasses.replace(ENCODER, causal=causal), host_batch(2, 8, documents=2, padded=0)
        later = {name: array.copy() for name, array in arrays.items()}
        later["tokens"][:, 3] = (later["tokens"][:, 3] + 1) % 32  # the last of the first document
        moved = np.abs(logits(config, arrays) - logits(config, later)).max(-1)
        assert (moved[:, :3] > 1e-4).all() != causal and (moved[:, :3] == 0).all() == causal
        assert (moved[:, 4:] == 0).all(), "the other document sees none of it"

    def test_a_document_is_the_same_wherever_it_is_packed(self):
        packed = host_batch(1, 8, documents=2, padded=0)
        alone = {name: array[:, 4:] if array.ndim == 2 else array for name, array in packed.items()}
        assert_close(logits(ENCODER, packed)[:, 4:], logits(ENCODER, alone))


class TestWhatItMayContain:
    """Blocks, routers and layers that let a token see later ones."""

    LEAKY = (
        {"pattern": ("soft",)},
        {"pattern": ("moe",), "blocks": {"moe": MoESpec(router=RouterConfig(selection=SELECTORS["expert_choice"]()))}},
        {"sequence": AveragePooling(blocks=("dense",))},
    )

    @pytest.mark.parametrize("fields", LEAKY, ids=["soft", "router", "pool"])
    def test_only_a_causal_model_must_not(self, fields):
        given = SHAPE | {"blocks": BLOCKS} | fields
        ModelConfig(**given)
        with pytest.raises(ConfigError, match="which a causal model must not see; allow_leak=true"):
            ModelConfig(**(given | {"causal": True}))

    @pytest.mark.parametrize(
        "key, more",
        [
            ("model.blocks.soft.allow_leak", {"model.blocks.soft": "soft", "model.pattern": "(soft,)"}),
            ("model.blocks.moe.router.allow_leak", {"model.blocks.moe.router.selection": "expert_choice"}),
            ("model.sequence.allow_leak", {"model.sequence": "pool", "model.sequence.blocks": "(dense,)"}),
        ],
    )
    def test_accepting_a_leak_has_no_effect(self, key, more):
        settings = {"model.causal": "false", "data.task": "masked", key: "true"} | more
        with pytest.raises(ConfigError, match="has no effect: causal=false") as error:
            load(ExperimentConfig, None, list(settings.items()))
        assert error.value.key == key


class TestCost:
    def test_a_token_attends_to_its_whole_document(self):
        arrays = host_batch(3, 12, documents=3, padded=2)
        segments = arrays["segments"]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
        order = np.arange(12)
        for causal, expected in ((False, same.sum()), (True, (same & (order[:, None] >= order)).sum())):
            assert attended_keys(arrays["positions"][None], segments[None], causal) == expected

    def test_of_a_row(self):
        assert mean_keys(ENCODER, 64) == 64
        assert mean_keys(dataclasses.replace(ENCODER, causal=True), 64) == 32.5


def test_it_does_not_generate():
    with on_mesh(ONE_DEVICE), pytest.raises(ConfigError, match="generation") as error:
        init_caches(ENCODER, 1, 8)
    assert error.value.key == "model.causal"
