"""What a program holds at its fullest moment: small programs written by hand, and one that says it itself."""

import pytest

from sparsejax.plan.live import live_at_peak

KIB = 1024


def module(*lines, before=""):
    return "\n".join(
        ["HloModule m, is_scheduled=true", before, "ENTRY %main () -> f32[] {", *(f"  {x}" for x in lines), "}"]
    )


def held(text):
    return [(each.kind, each.bytes) for each in live_at_peak(text)]


def test_a_buffer_lives_until_it_is_last_read():
    text = module(
        "%p = f32[256]{0} parameter(0)",
        "%a = f32[256]{0} exponential(%p)",
        "%b = f32[512]{0} broadcast(%a)",
        "%c = f32[1024]{0} broadcast(%b)",  # a is gone by now
        "ROOT %d = f32[1]{0} reduce(%c)",
    )
    assert held(text) == [("f32[1024]", 4 * KIB), ("f32[512]", 2 * KIB)]


def test_names_for_the_same_place_take_no_room():
    text = module(
        "%p = f32[256]{0} parameter(0)",
        "%a = f32[256]{0} exponential(%p)",
        "%b = f32[16,16]{1,0} bitcast(%a)",
        "%t = (f32[16,16]{1,0}, f32[256]{0}) tuple(%b, %p)",
        "%g = f32[16,16]{1,0} get-tuple-element(%t), index=0",
        "%h = f32[256]{0} get-tuple-element(%t), index=1",  # the program's argument
        "%u = f32[16,16]{1,0} dynamic-update-slice(%g, %h, %i)",
        "ROOT %d = f32[16]{0} reduce(%u)",
    )
    assert held(text) == [("f32[256]", KIB), ("f32[16]", 64)]


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("{1,0}", 100 * 64 * 4),
        ("{1,0:T(8,128)}", 104 * 128 * 4),
        ("{0,1:T(8,128)}", 128 * 64 * 4),
        ("{1,0:T(8,128)S(1)}", 0),  # in fast memory
    ],
)
def test_tiles_pad_and_fast_memory_is_not_counted(layout, size):
    text = module("%p = f32[8]{0} parameter(0)", f"ROOT %a = f32[100,64]{layout} broadcast(%p)")
    assert sum(each.bytes for each in live_at_peak(text)) == size


LOOP = """
%add (q0: f32[3,256], q1: f32[256], q2: s32[]) -> f32[3,256] {
  %q0 = f32[3,256]{1,0} parameter(0)
  %q1 = f32[256]{0} parameter(1)
  %q2 = s32[] parameter(2)
  %r = f32[1,256]{1,0} bitcast(%q1)
  ROOT %u = f32[3,256]{1,0} dynamic-update-slice(%q0, %r, %q2), metadata={op_name="jit(f)/while/body/update"}
}

%body (t: (s32[], f32[3,256])) -> (s32[], f32[3,256]) {
  %t = (s32[], f32[3,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %s = f32[3,256]{1,0} get-tuple-element(%t), index=1
  %x = f32[256]{0} exponential(%i), metadata={op_name="jit(f)/while/body/closed_call/attention/exp"}
  %v = f32[3,256]{1,0} fusion(%s, %x, %i), kind=kLoop, calls=%add
  ROOT %o = (s32[], f32[3,256]{1,0}) tuple(%i, %v)
}
"""


def test_a_loop_works_in_place_and_names_what_it_fills():
    text = module(
        "%z = s32[]{:S(1)} constant(0)",
        '%s0 = f32[3,256]{1,0} broadcast(%z), metadata={op_name="broadcast.1"}',
        "%t0 = (s32[], f32[3,256]{1,0}) tuple(%z, %s0)",
        "%w = (s32[], f32[3,256]{1,0}) while(%t0), condition=%c, body=%body",
        "ROOT %g = f32[3,256]{1,0} get-tuple-element(%w), index=1",
        before=LOOP,
    )
    stack, inner = live_at_peak(text)
    assert (stack.kind, stack.bytes, stack.scope) == ("f32[3,256]", 3 * KIB, inner.scope)
    assert inner.kind == "f32[256]" and "/attention/" in inner.scope
