"""The reader of collectives: programs whose traffic is known, compiled here, and every textual form that XLA writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.plan.collectives import read_collectives
from sparsejax.plan.hlo import module_of

from support import on_mesh

MESH = (2, 4, 1)
ROWS, WIDTH = 8, 16  # of a device: 512 bytes in float32


def compiled(function, out_specs=P()):
    """The text of `function` on a device's own `[8, 16]`."""
    with on_mesh(MESH) as mesh:
        sharding = jax.NamedSharding(mesh, P(("data", "expert")))
        x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=sharding)
        mapped = jax.shard_map(function, in_specs=P(("data", "expert")), out_specs=out_specs, check_vma=False)
        return jax.jit(mapped).lower(x).compile().as_text()


def moved(text):
    return [(each.kind, each.axes, each.bytes) for each in read_collectives(text, MESH)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: jax.lax.psum(x, "data"), ("all-reduce", ("data",), 2 * 512 // 2)),
        (lambda x: jax.lax.psum(x, ("data", "expert")), ("all-reduce", ("data", "expert"), 2 * 512 * 7 // 8)),
        (lambda x: jax.lax.all_gather(x, "expert"), ("all-gather", ("expert",), 3 * 512)),
        (lambda x: jax.lax.psum_scatter(x, "expert", tiled=True), ("reduce-scatter", ("expert",), 512 * 3 // 4)),
        (lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True), ("all-to-all", ("expert",), 512 * 3 // 4)),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), ("collective-permute", ("data",), 512)),
    ],
)
def test_what_a_device_sends(function, expected):
    assert moved(compiled(function)) == [expected]


def test_loops_send_as_often_as_they_run():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "expert") * 0.1, None), x, None, length=5)[0]

    (each,) = read_collectives(compiled(loop), MESH)
    assert (each.times, each.once, each.loop_unknown) == (5, 2 * 512 * 3 // 4, False)


def test_the_place_in_the_program_is_told():
    def named(x):
        with jax.named_scope("exchange"):
            return jax.lax.psum(x, "data")

    (each,) = read_collectives(compiled(named), MESH)
    assert "exchange" in each.scope


def module(*lines):
    """A program of these lines."""
    return "\n".join(["HloModule m", "", "ENTRY %main (p: f32[8,16]) -> f32[8,16] {", *(f"  {x}" for x in lines), "}"])


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("[2,4]<=[8]", ("expert",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "expert")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("expert",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "expert")),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("expert",)),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_2'}", ("data",)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([8]) {'axis_1'}", ("expert",)),
        ("{}", ("data", "expert")),
        ("{{0,1},{2,3},{4,5},{6,7}}", None),
    ],
)
def test_groups_of_devices_in_every_form(groups, axes):
    line = f"ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    (each,) = read_collectives(module(line), MESH)
    assert each.axes == axes
    devices = {("expert",): 4, ("data",): 2, ("data", "expert"): 8, None: 2}[axes]
    assert each.bytes == 2 * 512 * (devices - 1) // devices


def test_an_unknown_form_is_no_guess():
    with pytest.raises(ValueError, match="unknown form"):
        read_collectives(module("ROOT %r = f32[8,16]{1,0} all-reduce(%p), replica_groups=<new>, to_apply=%add"), MESH)


def test_several_arrays_in_one_and_asynchronous_pairs():
    group = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    text = module(
        f"%a = (f32[8]{{0}}, bf16[16]{{0}}) all-reduce(%p, %q), channel_id=1, {group}, to_apply=%add",
        f"%b = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%c), channel_id=2, {group}, dimensions={{0}}",
        "%d = f32[8]{0} all-gather-done(%b)",
    )
    assert moved(text) == [("all-reduce", ("expert",), 2 * 64 * 3 // 4), ("all-gather", ("expert",), 32 * 3 // 4)]


@pytest.mark.parametrize(
    ("result", "opcode", "size"),
    [
        ("((f32[8]{0}), f32[8]{0})", "all-to-all-start", 32 * 3 // 4),
        ("((f32[8]{0}), f32[2]{0})", "reduce-scatter-start", 8 * 3),
        ("(f32[8]{0}, f32[4]{0})", "all-reduce-start", 2 * 48 * 3 // 4),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[])", "collective-permute-start", 32),
    ],
)
def test_starts_name_their_operands_too(result, opcode, size):
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    groups = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}" if "permute" in opcode else groups
    assert [each.bytes for each in read_collectives(module(f"%a = {result} {opcode}(%p), {groups}"), MESH)] == [size]


def test_one_that_the_compiler_took_apart_counts_once():
    """On TPU: a start, a step beside other work, an end, of the same chain."""
    part = 'all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}'
    computation = "\n".join(["%part (p: f32[2]) -> f32[8] {", f"  ROOT %g = f32[8]{{0}} {part}", "}", ""])
    calls = [f"%x{i} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%part" for i in range(3)]
    assert moved(computation + module(*calls)) == [("all-gather", ("expert",), 24)]


def test_a_loop_says_its_length_by_its_condition():
    """As the TPU compiler writes it: without a trip count."""
    text = "\n".join(
        [
            "HloModule m",
            "%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {",
            "  %r = f32[8]{0} all-reduce(%v), channel_id=1, replica_groups={}, to_apply=%add",
            "}",
            "%condition (t: (s32[], f32[8])) -> pred[] {",
            "  %n = s32[]{:T(128)} constant(6), metadata={}",
            "  %i = s32[]{:T(128)} get-tuple-element(%t), index=0",
            "  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}",
            "}",
            "ENTRY %main (p: f32[8]) -> f32[8] {",
            "  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body",
            "}",
        ]
    )
    (each,) = read_collectives(text, MESH)
    assert (each.times, each.loop_unknown) == (6, False)


@pytest.mark.parametrize(
    ("scope", "module"),
    [
        (
            "jit(train_step)/jvp()/while/body/closed_call/feed_forward/shard_map/exchange/all_to_all",
            "feed_forward/exchange",
        ),
        ("jit(train_step)/transpose(jvp())/while/body/closed_call/attention/dot_general", "attention, backward"),
        ("jit(train_step)/reduce_sum", "step"),
    ],
)
def test_the_module_of_a_scope(scope, module):
    assert module_of(scope) == module
