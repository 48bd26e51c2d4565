"""Compiled programs, read from texts written by hand: loops of TPU programs, and arrays in the
chip's own memory.
"""

import pytest

from upcycle_jax.planning import hlo
from upcycle_jax.planning.hlo import Array

LOOP = """\
HloModule loop

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %step)
  %y = f32[8]{0:T(128)S(1)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)S(1)}) tuple(%next, %y)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(9)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%zero)
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%start, %a)
  %w = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%carry), condition=%condition.1, body=%body.1
  ROOT %out = f32[8]{0:T(128)S(1)} get-tuple-element(%w), index=1
}
"""


def test_a_loop_over_a_counter_runs_as_often_as_its_condition_says():
    # 1, 3, 5, 7: four times below 9.
    times = hlo.parse(LOOP).times
    assert times["body.1", False] == 4 and times["main", False] == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("direction=LT", "direction=NE"),
        ("%n = s32[]{:T(128)} constant(9)", "%n = s32[]{:T(128)} parameter(1)"),
        ("%step = s32[]{:T(128)} constant(2)", "%step = s32[]{:T(128)} negate(%i)"),
        ("add(%i, %step)", "multiply(%i, %step)"),
        ("tuple(%start, %a)", "tuple(%a, %a)"),
    ],
)
def test_loops_of_other_kinds_are_of_unknown_length(before, after):
    times = hlo.parse(LOOP.replace(before, after)).times
    assert times["body.1", True] == 1 and not times["body.1", False]


def test_arrays_say_their_bytes_and_where_they_are():
    program = hlo.parse(LOOP)
    body = program.computations["body.1"]
    counter, row = body.instructions["t"].arrays
    assert counter == Array("s32", (), True) and row == Array("f32", (8,), is_in_memory=False)
    assert (counter.nbytes, row.nbytes, str(row)) == (4, 32, "f32[8]")
    assert [array.nbytes for array in hlo.arrays("(bf16[4,8]{1,0}, pred[3], s4[8])")] == [64, 3, 4]
    assert body.instructions["t"].operands == ("next", "y")
    assert body.root is not None and body.root.name == "t"
