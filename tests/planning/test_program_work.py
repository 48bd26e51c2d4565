"""FLOPs and bytes of compiled programs, by hand and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from upcycle_jax.planning import hlo, program_work
from upcycle_jax.planning.program_work import Work

# A product of 16 x 32 and 32 x 8 in a loop over three layers, whose matrices are slices of one
# array and whose results are written into another.
TEXT = """\
HloModule program

%scaled (a: f32[3,16,8], b: f32[3,32,8], x: f32[16,32], i: s32[]) -> f32[3,16,8] {
  %a = f32[3,16,8]{2,1,0} parameter(0)
  %b = f32[3,32,8]{2,1,0} parameter(1)
  %x = f32[16,32]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %row = f32[1,32,8]{2,1,0} dynamic-slice(%b, %i), dynamic_slice_sizes={1,32,8}
  %w = f32[32,8]{1,0} bitcast(%row)
  %y = f32[16,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %new = f32[1,16,8]{2,1,0} bitcast(%y)
  ROOT %all = f32[3,16,8]{2,1,0} dynamic-update-slice(%a, %new, %i)
}

%body (p: (s32[], f32[3,16,8], f32[3,32,8], f32[16,32])) -> (s32[], f32[3,16,8]) {
  %p = (s32[], f32[3,16,8], f32[3,32,8], f32[16,32]) parameter(0)
  %i = s32[]{:S(1)} get-tuple-element(%p), index=0
  %a = f32[3,16,8]{2,1,0} get-tuple-element(%p), index=1
  %b = f32[3,32,8]{2,1,0} get-tuple-element(%p), index=2
  %x = f32[16,32]{1,0:S(1)} get-tuple-element(%p), index=3
  %one = s32[]{:S(1)} constant(1)
  %next = s32[]{:S(1)} add(%i, %one)
  %f = f32[3,16,8]{2,1,0} fusion(%a, %b, %x, %i), kind=kOutput, calls=%scaled
  ROOT %t = (s32[], f32[3,16,8], f32[3,32,8], f32[16,32]) tuple(%next, %f, %b, %x)
}

%condition (p: (s32[], f32[3,16,8], f32[3,32,8], f32[16,32])) -> pred[] {
  %p = (s32[], f32[3,16,8], f32[3,32,8], f32[16,32]) parameter(0)
  %n = s32[]{:S(1)} constant(3)
  %i = s32[]{:S(1)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:S(1)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[3,16,8], b: f32[3,32,8], x: f32[16,32]) -> f32[3,16,8] {
  %a = f32[3,16,8]{2,1,0} parameter(0)
  %b = f32[3,32,8]{2,1,0} parameter(1)
  %x = f32[16,32]{1,0} parameter(2)
  %fetched = (f32[16,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[16,32]{1,0:S(1)} copy-done(%fetched)
  %zero = s32[]{:S(1)} constant(0)
  %carry = (s32[], f32[3,16,8], f32[3,32,8], f32[16,32]) tuple(%zero, %a, %b, %near)
  %w = (s32[], f32[3,16,8], f32[3,32,8], f32[16,32]) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[3,16,8]{2,1,0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_moves_the_slices_that_it_works_on():
    # Three times 2 x 16 x 8 x 32 FLOPs. X is fetched into the chip's memory once (16 x 32 floats);
    # a round reads one layer's matrix of 32 x 8 and writes 16 x 8.
    found = program_work.work(hlo.parse(TEXT))
    assert found == Work(3 * 2 * 16 * 8 * 32, 4 * (16 * 32 + 3 * (32 * 8 + 16 * 8)))


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    text = TEXT.replace("direction=LT", "direction=NE")
    assert program_work.work(hlo.parse(text)) == Work(
        2 * 16 * 8 * 32, 4 * (16 * 32 + 32 * 8 + 16 * 8), open_ended=True
    )


@pytest.mark.parametrize(
    ("line", "lhs", "rhs", "result", "flops"),
    [
        # A batch of 2 x 4 products of 196 x 64 and 64 x 196: batches are axes of the window.
        (
            "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf",
            (2, 196, 4, 64),
            (2, 196, 4, 64),
            (2, 4, 196, 196),
            2 * 2 * 4 * 196 * 196 * 64,
        ),
        # 2 x 196 rows of 256 times 256 x (4 x 64): heads are a window over padding.
        (
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            (2, 196, 256, 1),
            (256, 4, 64, 1),
            (2, 196, 4, 64),
            2 * 2 * 196 * 256 * 4 * 64,
        ),
        # Patches of 4 x 4 of an image of 8 x 8 with 3 colours, 5 features.
        (
            "window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f",
            (1, 8, 8, 3),
            (4, 4, 3, 5),
            (1, 2, 2, 5),
            2 * 2 * 2 * 4 * 4 * 3 * 5,
        ),
    ],
)
def test_convolutions_count_what_meets(line, lhs, rhs, result, flops):
    def text(name, shape):
        return f"  %{name} = f32[{','.join(map(str, shape))}] "

    program = hlo.parse(
        "ENTRY %main (x: f32[]) -> f32[] {\n"
        f"{text('x', lhs)}parameter(0)\n{text('w', rhs)}parameter(1)\n"
        f"{text('y', result)}convolution(%x, %w), {line}\n}}\n"
    )
    assert program_work.work(program).flops == flops


def test_a_choice_counts_the_branch_with_the_least_work():
    def branch(name, size):
        return (
            f"%{name} (x: f32[8,{size}]) -> f32[8,8] {{\n  %x = f32[8,{size}] parameter(0)\n"
            "  ROOT %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1},"
            " rhs_contracting_dims={1}\n}\n\n"
        )

    text = (
        branch("short", 4)
        + branch("long", 64)
        + "ENTRY %main (p: pred[]) -> f32[8,8] {\n  %p = pred[] parameter(0)\n"
        "  ROOT %c = f32[8,8] conditional(%p, %p, %p), branch_computations={%long, %short}\n}\n"
    )
    assert program_work.work(hlo.parse(text)).flops == 2 * 8 * 8 * 4


def test_a_real_loop_counts_as_often_as_it_runs():
    """Three layers in a loop, of [4, 8] rows and [8, 8] matrices."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.dot(x, w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 8), (3, 8, 8))]
    compiled = jax.jit(layers).lower(*shapes).compile()
    program = hlo.parse(compiled.as_text())
    if not any(
        item.opcode == "dot"
        for c in program.computations.values()
        for item in c.instructions.values()
    ):
        pytest.skip("this backend has other instructions for products")
    assert program_work.work(program).flops == 3 * 2 * 4 * 8 * 8
