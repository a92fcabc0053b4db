"""The plan: exact bytes, slots and layouts on meshes that do not exist, allocating nothing; its tables and its JSON."""

import argparse
import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import pytest

from sparsejax.base.config import Loaded
from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import shard_batch
from sparsejax.base.structs import LOADED
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.recursion import MixtureOfRecursions
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.ops.capacity import capacity
from sparsejax.plan import command
from sparsejax.plan.abstract import abstract_batch, abstract_mesh
from sparsejax.plan.activations import saved_for_backward
from sparsejax.plan.estimate import plan, what_is_left_out
from sparsejax.plan.format import bytes_, flops
from sparsejax.plan.layout import groups_per_device, layout
from sparsejax.plan.tables import print_plan
from sparsejax.plan.work import work
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.optimizer import Adafactor
from sparsejax.train.state import abstract_state, init_state, make_optimizer

from support import host_batch, on_mesh

BLOCKS = {"dense": DenseSpec(), "moe": MoESpec(num_experts=4, d_ff=16, shared_experts=1)}
SMALL = ExperimentConfig(
    model=ModelConfig(d_model=16, num_heads=4, vocab_size=32, repeats=1, blocks=BLOCKS),
    data=DataConfig(batch_size=16, sequence_length=8),
    train=TrainConfig(accumulation=2),
)
EXPERTS = "params.stack.units.blocks.1.feed_forward.experts.w_in"


@pytest.fixture(scope="module")
def small():
    """The plan of SMALL on one device and on eight."""
    return plan(SMALL, [(1, 1, 1), (2, 2, 2)])


def on(config, data, expert, tensor):
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=data, expert=expert, tensor=tensor))


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def test_bytes_are_those_of_a_real_state():
    config = with_model(on(SMALL, 2, 2, 2), pattern=("moe",))
    config = dataclasses.replace(config, optimizer=Adafactor(factored_from=4))
    planned = layout(config)
    with on_mesh((2, 2, 2)):
        tx = make_optimizer(config)
        state = jax.jit(lambda: init_state(config, tx))()
    held = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.nbytes, state)
    of = planned.bytes_per_device
    assert of["parameters"] == of["gradients"] == sum(jax.tree.leaves(held.params))
    assert of["optimizer_state"] == sum(jax.tree.leaves(held.opt_state))
    assert of["balancing_state"] == sum(jax.tree.leaves(held.model_state))
    assert of["counters"] == held.step + held.nonfinite + held.nonfinite_streak
    assert of["total"] == sum(size for name, size in of.items() if name != "total")
    assert sum(tensor.bytes_per_device for tensor in planned.tensors) == sum(jax.tree.leaves(held))
    specs = {tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)}
    assert specs == {tensor.spec for tensor in planned.tensors if tensor.kind == "parameters"}


def test_the_abstract_batch_is_the_one_that_the_loop_makes(small):
    config = on(SMALL, 2, 2, 2)
    with on_mesh((2, 2, 2)) as mesh:
        real = shard_batch(host_batch(16, 8), mesh, accumulation=2)
    abstract = abstract_batch(config, abstract_mesh(config.mesh))
    assert set(abstract) == set(real) == set(LOADED)
    for name, array in real.items():
        assert (array.shape, array.dtype) == (abstract[name].shape, abstract[name].dtype), name
        assert array.sharding.spec == abstract[name].sharding.spec, name
    held = sum(array.addressable_shards[0].data.nbytes for array in real.values())
    assert small.layouts[1].bytes_per_device["batch"] == held


def test_tensors_say_where_they_lie(small):
    tensors = {tensor.name: tensor for tensor in small.layouts[1].tensors}
    experts = tensors[EXPERTS]
    assert (experts.shape, experts.dtype, experts.kind) == ((1, 4, 16, 16), "float32", "parameters")
    assert experts.axes == ("experts", "embed", "mlp")
    assert experts.spec == (None, "expert", "data", "tensor")
    assert experts.bytes_per_device == 4 * 4 * 16 * 16 // 8
    assert tensors["params.final_norm.scale"].spec == (None,)
    moments = [t for name, t in tensors.items() if name.startswith("opt_state") and name.endswith("experts.w_in")]
    assert len(moments) == 2 and all(moment.spec == experts.spec for moment in moments)


def test_slots_of_train_and_eval(small):
    train, evaluation = small.work.slots
    assert (train.mode, train.block, train.layers, train.group_size) == ("train", "moe", ("01_moe",), 8)
    assert train.slots_per_expert == capacity(8, 4, 2, 1.25, "per_choice") == 5
    assert (evaluation.mode, evaluation.slots_per_expert) == ("eval", 8)
    assert train.slots_per_token == 4 * 5 / 8
    pair = 2 * 2 * 16 * 16
    assert (train.ideal_flops, train.padded_flops, train.movement_flops) == (2 * pair, 2.5 * pair, 0)
    # 16 rows in 2 microbatches: 8 on one device, 2 on each of 4 batch shards, a group each.
    assert [each.groups_per_device for each in small.layouts] == [{"moe": 8}, {"moe": 2}]
    of = small.work.flops_per_token
    assert of["forward_padded"] - of["forward"] == 0.5 * pair
    assert of["training"] == 3 * of["forward"]
    assert small.tokens_per_step == 128 and small.flops_per_step == 128 * of["training"]


def test_a_step_of_two_passes_is_twice_the_work(small):
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, consistency=1.0))
    twice = plan(config)
    assert twice.flops_per_step == 2 * small.flops_per_step and twice.tokens_per_step == small.tokens_per_step
    assert any("both passes" in note for note in twice.notes)
    kept = [each.layouts[0].estimates["saved_for_backward"] for each in (small, twice)]
    assert kept[1] > 1.9 * kept[0]


def test_small_groups_and_the_einsum_movement():
    spec = dataclasses.replace(BLOCKS["moe"], group_size=4, dispatch="einsum", capacity_factor=1.0)
    config = with_model(SMALL, blocks=BLOCKS | {"moe": spec})
    planned = work(config.model, sequence_length=8)
    row = planned.slots[0]
    assert (row.group_size, row.slots_per_expert, row.slots_per_token) == (4, 2, 2)
    assert row.movement_flops == 2 * (2 * 4 * 2 * 16)
    assert groups_per_device(config) == {"moe": 16}
    (router,) = planned.routers
    assert router.axes.items() >= {"selection.k": 2, "dispatch": "einsum", "balance.scope": "global"}.items()


def test_what_is_kept_for_the_backward_pass_follows_mesh_and_remat(small):
    one, eight = (each.estimates for each in small.layouts)
    assert one["logits"] == 8 * 8 * 32 * 4 < one["saved_for_backward"]
    assert one["moe/slots"] == 8 * 4 * 5 * 16 * 4 == 4 * eight["moe/slots"]
    assert eight["saved_for_backward"] < one["saved_for_backward"] / 3
    (experts,) = {t.shape for t in small.layouts[0].tensors if t.name == EXPERTS}
    remat = dict(saved_by(with_model(SMALL, remat="full", scan=False)))
    assert 0 < sum(remat.values()) < one["saved_for_backward"] / 2
    assert f"float32{list(experts)}" not in remat and f"float32{list(experts[1:])}" not in remat  # no parameters
    assert sum(small.layouts[0].saved_largest.values()) <= one["saved_for_backward"]


def test_what_layers_with_shapes_of_their_own_keep_is_near_that_of_equal_ones():
    """Recursions on all tokens, unrolled, beside scanned ones: no slice of a parameter passes for what is kept."""
    given = dict(pattern=("dense",), repeats=3, tied_repeats=True, scan=False)
    wide, kept = with_model(SMALL, d_model=64), {}
    for least, execution in ((1.0, "masked"), (1.0, "compact"), (0.2, "compact")):
        select = MixtureOfRecursions(capacity=least, execution=execution)
        kept[least, execution] = sum(size for _, size in saved_by(with_model(wide, **given, select=select)))
    assert kept[1.0, "compact"] == pytest.approx(kept[1.0, "masked"], rel=0.25)
    assert kept[0.2, "compact"] < 0.75 * kept[1.0, "compact"]


def saved_by(config):
    mesh = abstract_mesh(config.mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config, make_optimizer(config), mesh)
        return saved_for_backward(config, state, abstract_batch(config, mesh))


HUGE = """
import time
import jax
from sparsejax.base.sharding import MeshConfig
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.plan.estimate import plan
from sparsejax.train.config import ExperimentConfig

blocks = {"dense": DenseSpec(gated=True), "moe": MoESpec(num_experts=64, d_ff=4096, gated=True)}
shape = {"vocab_size": 128_000, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "repeats": 30}
model = ModelConfig(**shape, blocks=blocks, dtype="bfloat16")
data = DataConfig(batch_size=1024, sequence_length=4096)
start = time.perf_counter()
result = plan(ExperimentConfig(model=model, data=data, mesh=MeshConfig(data=64, expert=8)))
print(time.perf_counter() - start)
assert result.work.parameters > 100e9, result.work.parameters
(mesh,) = result.layouts
assert mesh.devices == 512
(experts,) = (part.parameters for part in result.work.components if part.name == "experts")
assert 512 * sum(t.bytes_per_device for t in mesh.tensors if "experts" in t.name) == 3 * 4 * experts
assert sum(array.nbytes for array in jax.live_arrays()) < 1e6, jax.live_arrays()
assert len(jax.devices()) == 1
"""


def test_a_hundred_billion_parameters_on_512_devices_that_are_not_there():
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((3, 1, 1), "config.data.batch_size: 16 rows do not split evenly"),
        ((1, 8, 1), "config.model.blocks.moe.num_experts: 4 is not divisible by mesh.expert=8"),
        ((1, 0, 1), "config.mesh.expert: 0 is not a number of devices"),
        ((-1, 1, 1), "config.mesh.data: -1 is filled in from a run's devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ConfigError, match=message):
        plan(SMALL, [(1, 1, 1), mesh])


def rendered(result):
    stream = io.StringIO()
    print_plan(result, [], stream)
    return stream.getvalue()


def test_tables(small):
    text = rendered(small)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["class"] == ["class", "1×1×1", "2×2×2"]
    assert f"{small.work.parameters:,}" in text and f"{small.work.active:,}" in text
    assert lines["block"][-5:] == ["slots/token", "ideal", "padded", "padded/ideal", "movement"]
    slots = next(line.split() for line in text.splitlines() if re.match("moe +train", line))
    assert slots[2:10] == ["1", "4", "2", "1.25", "8", "8/2", "5", "2.5"]
    assert slots[10:] == ["2.05", "kFLOP", "2.56", "kFLOP", "1.250", "0"]
    assert lines["model.remat_names"][1].startswith("remat=none")
    assert lines["balance.coefficient"] == ["balance.coefficient", "0.01"]
    assert "expert data tensor" in text
    assert "\x1b" not in text and "…" not in text


def test_tables_fit_a_narrow_terminal(small, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_plan(small, [], stream)
    text = re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_is_one_object_on_one_line(small, capsys, monkeypatch):
    plans = {(SMALL, ((1, 1, 1), (2, 2, 2))): small}
    monkeypatch.setattr(command, "plan", lambda config, meshes: plans[config, tuple(meshes)])
    args = argparse.Namespace(
        mesh=[(1, 1, 1), (2, 2, 2)], format="json", topology=None, search=None, imbalance=None, load=None
    )
    assert command.plan_command(Loaded(config=SMALL, provenance={}), args) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert [each["mesh"] for each in record["layouts"]] == [[1, 1, 1], [2, 2, 2]]
    assert record["parameters"] == sum(part["parameters"] for part in record["components"])
    assert record["unused"]["model.remat_names"].startswith("remat=none")
    fields = {"name", "kind", "shape", "dtype", "axes", "spec", "bytes_per_device", "in_host_memory"}
    assert set(record["layouts"][0]["tensors"][0]) == fields
    assert record["slots"][0]["slots_per_expert"] == 5


def test_notes_say_what_is_left_out():
    notes = " ".join(what_is_left_out(with_model(SMALL, remat="full")))
    assert "remat=full" in notes and "accumulation=2" in notes and "saved_for_backward" in notes
    assert "accumulation" not in " ".join(what_is_left_out(dataclasses.replace(SMALL, train=TrainConfig())))


def test_units():
    assert [flops(n) for n in (0, 512, 2_298_880, 1.5e15)] == ["0", "512 FLOP", "2.3 MFLOP", "1.5 PFLOP"]
    assert [bytes_(n) for n in (0, 12, 1023 * 1024, 3 * 2**30)] == ["0", "12 B", "1023 KiB", "3 GiB"]
