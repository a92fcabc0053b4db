"""The lookup layer's config: what is refused, what it costs, and the presets."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import MeshConfig, Rules
from sparsejax.data.config import DataConfig
from sparsejax.memory import presets
from sparsejax.memory.addresses import ADDRESSES
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import CONSUMES
from sparsejax.memory.contents import CONTENTS, GateRow, PartialExpert, Vector
from sparsejax.memory.layer import MemoryLayer
from sparsejax.memory.learned import ProductKeys, Softmax
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.memory.n_grams import NGrams
from sparsejax.memory.projections import UpProjection
from sparsejax.memory.token_ids import TokenId
from sparsejax.model.config import ModelConfig
from sparsejax.train.config import ExperimentConfig

from lookups import BACKBONE, GRID, VOCAB
from support import ONE_DEVICE, on_mesh


@pytest.mark.parametrize(
    "make,key,said",
    [
        (lambda: MemorySpec(place="embedding", blocks=("dense",)), "blocks", "is in no block"),
        (lambda: MemorySpec().check(BACKBONE, VOCAB), "blocks", "none is named"),
        (lambda: MemorySpec(address=Hyperplanes(), storage="host"), "storage", r"known from the input \(token_id"),
        (
            lambda: MemorySpec(content=Vector(size=4), blocks=("dense",)).check(BACKBONE, VOCAB),
            "content",
            "d_model=8 numbers, not 4",
        ),
        (
            lambda: MemorySpec(address=NGrams(buckets=2**28), blocks=("dense",)).check(BACKBONE, VOCAB),
            "address",
            "more than an int32",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, key, said):
    with pytest.raises(ConfigError, match=said) as error:
        make()
    assert error.value.key == key


@pytest.mark.parametrize("name", GRID)
def test_parameters_are_those_that_there_are(name):
    """Of one layer; the table's are rows times width."""
    spec = GRID[name]
    with on_mesh(ONE_DEVICE):
        layer = jax.eval_shape(lambda: MemoryLayer(jax.random.key(0), BACKBONE, VOCAB, spec))
    made = sum(variable.size for variable in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    costs = spec.costs(BACKBONE, VOCAB, layers=1)
    table = spec.rows(VOCAB) * spec.row_width(BACKBONE)
    assert costs["memory_table"].parameters == table
    assert sum(cost.parameters for cost in costs.values()) == made + table


def test_costs_of_three_layers_by_hand():
    """d = 8; three layers, each 2 rows of rank 3: 2 · 3 · 8 = 48 numbers."""
    spec = presets.peer(address=Softmax(entries=5, k=2), content=PartialExpert(rank=3), blocks=("dense",))
    costs = spec.costs(BACKBONE, VOCAB, layers=3)
    assert costs["memory_table"].parameters == 3 * 5 * 48
    assert costs["memory_table"].active == 3 * 2 * 48
    assert costs["memory_table"].gathered == 3 * 2 * 48 * 4
    assert costs["memory_address"].parameters == 3 * 8 * 5
    assert costs["memory_address"].per_token == 3 * 2 * 8 * 5
    assert costs["memory_consume"].per_token == 3 * 2 * 2 * 48  # FLOPs of two rows, all of whose numbers are used once
    shared = presets.peer(
        address=Softmax(entries=5, k=2), content=PartialExpert(rank=3), blocks=("dense",), shared=True
    )
    assert shared.costs(BACKBONE, VOCAB, layers=3)["memory_table"].parameters == 5 * 48
    assert shared.costs(BACKBONE, VOCAB, layers=3)["memory_table"].gathered == 3 * 2 * 48 * 4


TABLE = {
    "token_id": ("token_id", "vector", "add", "before_feed_forward", False),
    "lsh": ("hyperplanes", "vector", "add", "before_feed_forward", False),
    "softmax": ("softmax", "vector", "add", "before_feed_forward", False),
    "partial_experts": ("token_id", "partial_expert", "expert", "parallel", False),
    "engram": ("n_grams", "vector", "gated_add", "before_attention", False),
    "per_layer_embedding": ("token_id", "vector", "per_layer", "after", False),
    "product_key": ("product_keys", "vector", "add", "parallel", False),
    "memory_plus": ("product_keys", "vector", "gated_output", "parallel", True),
    "peer": ("product_keys", "partial_expert", "expert", "parallel", False),
    "stem": ("token_id", "gate_row", "up_projection", "after", False),
    "over_encoding": ("n_grams", "vector", "project", "embedding", False),
    "n_grammer": ("latent_bigrams", "vector", "project", "embedding", False),
    "l3": ("token_id", "key_values", "add", "parallel", False),
}
"""Presets on the axes: address, content, consume, place, shared."""


def test_presets_are_the_settings_of_the_table():
    found = {}
    for name, preset in presets.PRESETS.items():
        spec = preset()
        axes = ADDRESSES.name_of(spec.address), CONTENTS.name_of(spec.content), CONSUMES.name_of(spec.consume)
        found[name] = (*axes, spec.place, spec.shared)
    assert found == TABLE


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_go_with_a_model_and_take_overrides(name):
    backbone = ModelConfig(d_model=128, vocab_size=VOCAB)
    preset = presets.PRESETS[name]
    blocks = () if preset().place == "embedding" else ("dense",)
    spec = preset(blocks=blocks, storage="rows")
    spec.check(backbone, VOCAB)
    assert spec.blocks == blocks and spec.storage == "rows"
    assert (
        np.isfinite([part.stddev for part in spec.row_parts(backbone)]).all()
        and preset(address=spec.address) == preset()
    )


def test_named_settings_of_the_papers():
    assert presets.peer().address == ProductKeys(heads=8, k=16, norm_query=True)
    assert presets.peer().content == PartialExpert(rank=1)
    engram = presets.engram()
    assert engram.address.lookups == 16 and engram.consume.window(BACKBONE) == (9, 8)
    assert presets.stem(content=GateRow(d_ff=12)).consume == UpProjection()


@pytest.mark.parametrize(
    "spec,unused",
    [
        (MemorySpec(place="embedding"), {"shared"}),
        (MemorySpec(), set()),
        (TokenId(), {"seed"}),
        (TokenId(buckets=4), set()),
        (Hyperplanes(centre=False), {"decay"}),
    ],
)
def test_settings_without_effect_are_named(spec, unused):
    assert set(spec.unused()) == unused


def test_fixed_variables_know_their_axes():
    """The training state asks every variable how it is split."""
    for name in GRID:
        with on_mesh(ONE_DEVICE):
            layer = jax.eval_shape(lambda: MemoryLayer(jax.random.key(0), BACKBONE, VOCAB, GRID[name]))
        for _, variable in nnx.to_flat_state(nnx.state(layer)):
            assert len(variable.get_metadata()["axes"]) == len(variable.shape)
            assert isinstance(variable, nnx.Param) or "group" not in variable.get_metadata()


@pytest.mark.parametrize(
    "spec,mesh,key,said",
    [
        (MemorySpec(storage="features", blocks=("dense",)), (2, 2, 1), None, ""),
        (
            MemorySpec(address=TokenId(buckets=10), storage="rows", blocks=("dense",)),
            (2, 2, 1),
            "storage",
            "10 rows are not shared out evenly over mesh.data=2 × mesh.expert=2 devices",
        ),
        (
            presets.l3(storage="features", blocks=("dense",)),
            (5, 1, 1),
            "storage",
            "96 features are not shared out evenly over mesh.data=5",
        ),
        (
            presets.stem(content=GateRow(d_ff=9), blocks=("dense",)),
            (1, 1, 2),
            "content",
            "9 is not divisible by mesh.tensor=2",
        ),
    ],
)
def test_what_devices_share_out_has_to_be_divisible(spec, mesh, key, said):
    data, expert, tensor = mesh

    def make():
        return ExperimentConfig(
            model=ModelConfig(d_model=8 if data != 5 else 12, num_heads=2, memory={"ids": spec}),
            data=DataConfig(batch_size=20),
            mesh=MeshConfig(data=data, expert=expert, tensor=tensor, rules=Rules(embed=None)),
        )

    if key is None:
        make()
        return
    with pytest.raises(ConfigError, match=said) as error:
        make()
    assert error.value.key == f"model.memory.ids.{key}"
