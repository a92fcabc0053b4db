"""What devices have to send at least, by hand; which collectives serve what; how long they take."""

import dataclasses

import pytest

from sparsejax.base.sharding import MeshConfig
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.token_ids import TokenId
from sparsejax.model.config import ModelConfig
from sparsejax.plan.chips import CHIPS
from sparsejax.plan.collectives import Collective
from sparsejax.plan.layout import layout
from sparsejax.plan.roofline import roofline
from sparsejax.plan.topology import TARGETS
from sparsejax.plan.traffic import (
    EXCHANGE,
    GATHERS,
    GRADIENTS,
    OTHER,
    TABLES,
    TENSOR,
    Need,
    by_kind,
    least_bytes,
    needs,
    purpose_of,
)
from sparsejax.plan.work import expert_flops
from sparsejax.train.config import ExperimentConfig, TrainConfig

BLOCKS = {"dense": DenseSpec(d_ff=32), "moe": MoESpec(num_experts=8, d_ff=32, router=MoESpec().router)}
MODEL = ModelConfig(d_model=16, num_heads=4, vocab_size=64, repeats=1, dtype="bfloat16", blocks=BLOCKS)
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(batch_size=16, sequence_length=8), train=TrainConfig(accumulation=2)
)
TOKENS = 8 * 8  # of a microbatch


def on(data, expert, tensor, config=CONFIG):
    return dataclasses.replace(config, mesh=MeshConfig(data=data, expert=expert, tensor=tensor))


def with_experts(config, **changes):
    blocks = BLOCKS | {"moe": dataclasses.replace(BLOCKS["moe"], **changes)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, blocks=blocks))


def least(config):
    return least_bytes(config, layout(config).tensors)


def test_one_device_sends_nothing():
    assert set(least(on(1, 1, 1)).values()) == {0}


def test_the_exchange():
    """Two microbatches; there and back, twice; two choices; three of four leave."""
    config = on(2, 4, 1)
    assert least(config)[EXCHANGE] == 2 * 4 * TOKENS // 8 * 2 * 16 * 2 * 3 // 4
    fixed = dataclasses.replace(config.mesh, rules=dataclasses.replace(config.mesh.rules, experts=None))
    assert least(dataclasses.replace(config, mesh=fixed))[EXCHANGE] == 0


def test_replicated_experts_exchange_nothing_and_gathered_tokens_travel_to_all():
    config = on(2, 4, 1)
    assert least(with_experts(config, replicated=True))[EXCHANGE] == 0
    gathered = with_experts(config, dispatch="grouped", exchange="all_gather")
    assert least(gathered)[EXCHANGE] == 2 * 4 * TOKENS // 8 * 3 * 16 * 2
    assert least(with_experts(config, exchange="all_gather")) == least(config), "slots are exchanged by all-to-all"


@pytest.mark.parametrize("changes", [{"replicated": True}, {"exchange": "all_gather"}])
def test_without_a_buffer_its_factor_adds_no_rows(changes):
    of = lambda **more: expert_flops(with_experts(on(2, 4, 1), dispatch="grouped", **more), "tpu")  # noqa: E731
    assert of(buffer_factor=3.0, **changes) == of(**changes) == of() / 2 == of(buffer_factor=3.0) / 3


def test_parameters_are_gathered_and_their_gradients_scattered():
    """All but the norms (5 × 16) are split over `data`; the norms' gradients are a sum that all get."""
    found = layout(on(4, 1, 1))
    parameters = sum(4 * t.bytes_per_device // 4 for t in found.tensors if t.kind == "parameters" and "data" in t.spec)
    norms = 5 * 16
    told = least(on(4, 1, 1))
    assert told[GATHERS] == 2 * parameters * 2 * 3 // 4
    assert told[GRADIENTS] == 2 * parameters * 2 * 3 // 4 + 2 * norms * 2 * 3 // 4
    again = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat="full"))
    embedding = 2 * 64 * 16 * 2 * 3 // 4
    assert least(on(4, 1, 1, again))[GATHERS] == 2 * told[GATHERS] - embedding


def test_tensor_parallelism_sums_the_outputs_of_layers():
    told = least(on(1, 1, 4))
    assert told[TENSOR] == 2 * (4 * 2 + 2) * 2 * TOKENS * 16 * 2 * 3 // 4 and told[GATHERS] == 0


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"storage": "rows"}, 2 * TOKENS // 8 * 16 * (2 + 4) * 7 / 8),
        ({"storage": "features"}, 2 * TOKENS // 8 * 16 * (2 + 2) * 7 / 8),
        ({"storage": "rows", "blocks": ("dense", "moe")}, 2 * 2 * TOKENS // 8 * 16 * (2 + 4) * 7 / 8),
        ({"storage": "rows", "blocks": ("dense", "moe"), "shared": True}, 2 * TOKENS // 8 * 16 * (2 + 2 * 4) * 7 / 8),
        ({"storage": "replicated"}, 2 * 64 * 16 * 4 * 7 / 8),
        ({"storage": "replicated", "address": TokenId(buckets=4096)}, 7 * 2 * TOKENS // 8 * 16 * 4),
    ],
    ids=str,
)
def test_rows_of_tables_go_there_and_back(memory, expected):
    """And tables are no parameters that are gathered or summed. Two microbatches on eight devices."""
    spec = MemorySpec(**({"blocks": ("dense",), "place": "parallel"} | memory))
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, memory={"ids": spec}))
    found, plain = least(on(4, 2, 1, config)), least(on(4, 2, 1))
    assert found == plain | {TABLES: expected}


@pytest.mark.parametrize("scope", ["jvp(memory/ids/prefetch)/shard_map/op", "memory/ids/fetch/op", "tables/while/op"])
def test_traffic_of_tables_is_known_by_its_scope(scope):
    for kind, axes in (("all-to-all", ("expert",)), ("all-reduce", ("data", "expert")), ("all-gather", ("data",))):
        assert purpose_of(sent(kind, axes, scope=f"jit(step)/{scope}")) == TABLES


def sent(kind, axes, size=100, scope="jit(step)/while/body/feed_forward/op"):
    return Collective(kind=kind, axes=axes, scope=scope, once=size, times=1, loop_unknown=False)


MOVED = "jit(step)/while/body/feed_forward/exchange/op"


@pytest.mark.parametrize(
    ("kind", "axes", "purpose"),
    [
        ("all-to-all", ("expert",), EXCHANGE),
        ("ragged-all-to-all", ("expert",), EXCHANGE),
        ("all-gather", ("data",), GATHERS),
        ("reduce-scatter", ("data",), GRADIENTS),
        ("all-reduce", ("data", "expert"), GRADIENTS),
        ("all-reduce", ("tensor",), TENSOR),
        ("all-gather", ("expert",), OTHER),
        ("all-to-all", ("data",), OTHER),
        ("collective-permute", (), OTHER),
    ],
)
def test_what_a_collective_is_for(kind, axes, purpose):
    assert purpose_of(sent(kind, axes)) == purpose


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_gathers_of_tokens_are_known_by_their_scope(kind):
    """They are a row of their own beside gathers along the same axis."""
    rows = by_kind([sent(kind, ("expert",), 7, MOVED), sent(kind, ("expert",), 50), sent(kind, ("expert",), 2, MOVED)])
    assert [row.bytes for row in rows if row.purpose == EXCHANGE] == [9]
    assert [row.bytes for row in rows if row.purpose != EXCHANGE] == [50]
    assert purpose_of(sent(kind, ("data",), scope=MOVED)) != EXCHANGE


def test_sent_beside_least():
    config = on(2, 4, 1)
    moved = by_kind([sent("all-to-all", ("expert",), 7)])
    told = {each.purpose: each for each in needs(config, layout(config), moved)}
    assert told[EXCHANGE] == Need(purpose=EXCHANGE, sent=7, least=least(config)[EXCHANGE])
    assert told[GATHERS].sent == 0 and TENSOR not in told and OTHER not in told


def test_the_longest_of_three_bounds_a_step():
    chip = CHIPS["v5e"]
    time = roofline(chip, 197e12, 819e9 * 2, by_kind([sent("all-gather", ("data",), 100 * 10**9)]), (4, 4, 1), 16)
    assert (time.products, time.memory, time.links) == (1, 2, 0.5)
    assert (time.bound, time.shortest, time.longest) == ("memory", 2, 3.5)


def test_what_goes_beyond_a_host_goes_at_the_speed_of_its_network():
    """Two hosts of 8: the axis expert stays inside one."""
    chip = CHIPS["h100"]
    moved = lambda axes: by_kind([sent("all-reduce", axes, 450 * 10**9)])  # noqa: E731
    seconds = lambda axes: roofline(chip, 0, 0, moved(axes), (2, 8, 1), 8).links  # noqa: E731
    assert seconds(("expert",)) == 1
    assert seconds(("data",)) == seconds(("data", "expert")) == seconds(()) == 9


def test_chips():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://") and 1e14 < chip.flops < 1e16
        assert chip.memory_bandwidth > chip.links > chip.network
        assert chip.of_device.flops * chip.cores == chip.flops
    assert CHIPS["tpu7x"].of_device.memory == 96 * 1024**3


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.platform == "cuda"], ids=lambda c: c.name)
def test_a_gpu_has_the_memory_that_its_compiler_is_told_of(chip):
    assert f"device_memory_size: {chip.memory}\n" in (TARGETS / f"{chip.name}.txtpb").read_text()
