"""What-if: recorded settings give the recorded drops; other settings give what a router with them would have given."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.test_router_contract import routers

from sparsejax.base.errors import RequestError
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.plan.what_if import Question, kept_pairs, what_if
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.orders import ByScore, Random, TokenMajor
from sparsejax.routers.overflow import NextBest
from sparsejax.routers.replay import record
from sparsejax.routers.router import decide
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.trace import Trace

from runs import here
from support import known

ROWS, LENGTH, EXPERTS = 4, 8, 8
ROUTERS = {name: router for name, router in routers().items() if name.split("=")[0] in ("selection", "order", "limit")}


def traced(router, size=None, factor=1.0, free=0, mode="eval", **fields):
    """The trace of one layer that routed random logits, in evaluation, and the decision."""
    spec = MoESpec(
        num_experts=EXPERTS - free,
        zero_experts=free,
        group_size=size,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        router=router,
    )
    model = ModelConfig(d_model=8, num_heads=2, pattern=("moe",), repeats=1, blocks={"moe": spec}, **fields)
    config = ExperimentConfig(model=model, data=DataConfig(sequence_length=LENGTH, batch_size=ROWS))
    config = dataclasses.replace(config, mesh=config.mesh.resolve(1))
    size = size or LENGTH
    mask = np.arange(ROWS * LENGTH).reshape(-1, size) < ROWS * LENGTH - 3
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(*mask.shape, EXPERTS)), jnp.float32)
    capacities = spec.capacities(size, "eval")
    inputs = known(mask, num_slots=int(capacities[-1]), training=False, tokens=jnp.asarray(mask).cumsum(-1))
    inputs = dataclasses.replace(inputs, limit=jnp.asarray(capacities)[mask.sum(-1)], free=free)
    decision = decide(logits, inputs, router)
    layers = {"00_moe": jax.tree.map(np.asarray, record(decision, ROWS))}
    return Trace(
        config=config, mode=mode, step=0, tokens=np.where(mask, 0, -1).reshape(ROWS, LENGTH), layers=layers
    ), decision


def kept_under(trace, question):
    spec = trace.config.model.blocks["moe"]
    assert isinstance(spec, MoESpec)
    return kept_pairs(trace, trace.layers["00_moe"], spec, question)


@pytest.mark.parametrize("name", ROUTERS)
def test_recorded_settings_drop_what_was_dropped(name):
    trace, decision = traced(ROUTERS[name], size=16)
    layer = trace.layers["00_moe"]
    assert np.array_equal(kept_under(trace, Question()), layer.kept)
    told = what_if(trace)["00_moe"]
    assert told["assigned"] == decision.slots.assigned.tolist()
    assert told["processed"] == decision.slots.processed.tolist()
    assert sum(told["dropped"]) == int((decision.pairs.valid & ~decision.slots.keep).sum())


@pytest.mark.parametrize(
    ("question", "router", "size", "factor"),
    [
        (Question(k=1), RouterConfig(selection=TopK(k=1), weight=Raw()), None, 1.0),
        (Question(capacity_factor=0.5), RouterConfig(), None, 0.5),
        (Question(order=TokenMajor(), capacity_factor=0.75), RouterConfig(order=TokenMajor()), None, 0.75),
        (Question(order=ByScore()), RouterConfig(order=ByScore(), allow_leak=True), None, 1.0),
        (Question(group_size=16), RouterConfig(), 16, 1.0),
    ],
    ids=["k", "capacity", "order and capacity", "by_score", "group_size"],
)
def test_other_settings_drop_what_a_router_with_them_drops(question, router, size, factor):
    recorded, _ = traced(RouterConfig())
    _, wanted = traced(router, size, factor)
    kept = kept_under(recorded, question)
    assert np.array_equal(kept, record(wanted, ROWS).kept)
    assert not np.array_equal(kept, recorded.layers["00_moe"].kept[..., : kept.shape[-1]])
    assert what_if(recorded, question)["00_moe"]["processed"] == wanted.slots.processed.tolist()


def test_what_was_drawn_is_told_as_recorded_and_asked_for_another_order():
    drawn = RouterConfig(order=Random(), allow_leak=True)
    trace, decision = traced(drawn, mode="train")
    told = what_if(trace)["00_moe"]
    assert told["processed"] == decision.slots.processed.tolist()
    assert what_if(trace, Question(devices=2))["00_moe"]["processed"] == told["processed"]
    other = Question(order=TokenMajor())
    assert what_if(trace, other) == what_if(traced(RouterConfig(), mode="train")[0], other)
    with pytest.raises(RequestError, match="will not draw the same again"):
        what_if(trace, Question(capacity_factor=0.5))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_free_experts_need_no_slots(factor):
    trace, _ = traced(RouterConfig(), free=2)
    wanted, decision = traced(RouterConfig(), free=2, factor=factor)
    told = what_if(trace, Question(capacity_factor=factor))["00_moe"]
    layer = wanted.layers["00_moe"]
    assert np.array_equal(kept_under(trace, Question(capacity_factor=factor)), layer.kept)
    assert told["processed"] == np.bincount(layer.experts[layer.kept], minlength=EXPERTS).tolist()
    assert told["dropped"][-2:] == [0, 0] and len(told["assigned"]) == EXPERTS and sum(told["dropped"]) > 0
    assert told["slot_utilisation"] == decision.slots.processed.sum() / decision.slots.pair.size
    pairs = (layer.experts < EXPERTS - 2) & layer.kept
    devices = what_if(wanted, Question(devices=2))["00_moe"]
    away = pairs & (layer.experts * 2 // (EXPERTS - 2) != (np.arange(ROWS) // 2)[:, None, None])
    assert devices["bytes_by_pair"] == away.sum() * 8 * 4 * 2


def test_a_layer_that_cannot_answer_says_so_beside_those_that_can(tmp_path):
    """Where a token is sent on to depends on free slots of experts that the trace does not rank."""
    one, sent = (
        traced(RouterConfig())[0],
        RouterConfig(selection=TopK(k=1), weight=Raw(), overflow=NextBest(), allow_leak=True),
    )
    other, _ = traced(sent)
    model = one.config.model
    spec = other.config.model.blocks["moe"]
    blocks = {"moe": model.blocks["moe"], "next": spec}
    model = dataclasses.replace(model, pattern=("moe", "next"), blocks=blocks)
    both = {"00_moe": one.layers["00_moe"], "01_next": other.layers["00_moe"]}
    trace = dataclasses.replace(one, config=dataclasses.replace(one.config, model=model), layers=both)
    assert what_if(trace)["01_next"]["processed"] == np.bincount(both["01_next"].experts[both["01_next"].kept]).tolist()
    told = what_if(trace, Question(capacity_factor=0.5))
    assert told["00_moe"] == what_if(one, Question(capacity_factor=0.5))["00_moe"]
    assert list(told["01_next"]) == ["refused"] and "overflow=next_best" in told["01_next"]["refused"]
    trace.save(tmp_path / "both.npz")
    table = here("trace", tmp_path / "both.npz", "--capacity-factor=0.5")
    assert table.status == 0 and "01_next: overflow=next_best: where else" in table.out
    with pytest.raises(RequestError, match="overflow=next_best"):
        what_if(other, Question(capacity_factor=0.5))


def test_movement_by_hand():
    """Four rows on two devices: rows 0 and 1 live on the first. Pairs travel d_model · 4 bytes each way."""
    trace, _ = traced(RouterConfig(), factor=8.0)
    layer = trace.layers["00_moe"]
    chosen = np.asarray(layer.experts)
    for placement in (None, tuple(e % 2 for e in range(EXPERTS))):
        placed = np.asarray(placement or (0, 0, 0, 0, 1, 1, 1, 1))
        pairs = tokens = devices = 0
        for row in range(ROWS):
            for t in range(LENGTH):
                where = [placed[e] for e in chosen[row, t] if e >= 0]
                away = [d for d in where if d != row // 2]
                pairs, tokens, devices = pairs + len(away), tokens + len(set(away)), devices + len(set(where))
        told = what_if(trace, Question(devices=2, device_of_expert=placement))["00_moe"]
        assert (told["bytes_by_pair"], told["bytes_by_device"]) == (pairs * 8 * 4 * 2, tokens * 8 * 4 * 2)
        assert told["devices_per_token"] == pytest.approx(devices / trace.mask.sum())
        # Every row has a slot for each of its 8 tokens at each of 8 experts, half of them on the other device.
        assert told["bytes_of_slots"] == ROWS * 8 * 4 * 8 * 4 * 2
    assert what_if(trace)["00_moe"]["bytes_of_slots"] == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    traced(RouterConfig())[0].save(path)
    return path


def test_the_command(file):
    told = here(
        "trace", file, "--format=json", "--k=1", "--capacity-factor=1", "--order=token_major", "--devices=2"
    ).json
    assert told["asked"] == {"capacity_factor": 1.0, "k": 1, "order": "token_major", "devices": 2}
    assert sum(told["what_if"]["00_moe"]["assigned"]) * 2 == sum(told["recorded"]["00_moe"]["assigned"])
    table = here("trace", file, "--devices=2", "--placement=0,1,0,1,0,1,0,1")
    assert table.status == 0 and "as recorded" in table.out and "with devices=2, placement=(0, 1" in table.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--k=3"], "--k=3: the trace has 2 choices of a token"),
        (["--group-size=5"], "--group-size=5 does not divide the 32 tokens"),
        (["--order=tok"], "--order: unknown order 'tok'; known: choice_major, token_major"),
        (["--devices=3"], "--devices=3: the 4 rows of a microbatch do not split evenly"),
        (["--placement=0,1"], "--placement: a device of 0 … 0 (--devices) for each of 8 experts"),
        (["--devices=2", "--placement=a"], "argument --placement: 'a' is not D,D,…"),
        (["--capacity-factor=0"], "--capacity-factor=0.0 is no positive number"),
        (["--config.train.steps=3"], "--config.train.steps has no effect on trace"),
        (["--workdir=x"], "unknown flag '--workdir=x' for trace"),
    ],
)
def test_wrong_requests_are_one_line(file, words, part):
    assert part in here("trace", file, *words).error


def test_a_file_that_is_none(tmp_path):
    assert "could not be read" in here("trace", tmp_path / "nothing.npz").error
    (tmp_path / "text.npz").write_text(json.dumps({}))
    assert "not a trace" in here("trace", tmp_path / "text.npz").error
    assert "required: FILE.npz" in here("trace").error
