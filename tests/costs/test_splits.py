"""How arrays are divided, by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from upcycle_jax.costs import flops, splits
from upcycle_jax.costs.flops import Value

D, E, M = ("data",), ("expert",), ("model",)
MESH = {"data": 4, "expert": 2, "model": 2}


def test_specs_are_read():
    assert splits.of_spec(PartitionSpec(("data", "expert"), None, "model"), 4) == (
        ("data", "expert"),
        (),
        M,
        (),
    )
    assert splits.local_shape((16, 10, 7), ((), D, M), MESH) == (16, 3, 4)


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        # Columns of 196 take 256; the 64 or 16 others are multiples of 8.
        ((64, 16, 196, 196), 64 * 16 * 196 * 256),
        # Rows of 196 take 200, columns of 1024 are whole tiles.
        ((1, 196, 1024), 200 * 1024),
        # 256 tokens as columns and heads of 64 as rows: no padding.
        ((256, 12, 64), 256 * 12 * 64),
        ((300, 1), 300),
        ((3, 5), 8 * 128),
    ],
)
def test_tiles_pad_the_order_of_axes_that_they_pad_least(shape, elements):
    assert splits.tiled_size(shape, (8, 128)) == elements


@pytest.mark.parametrize(
    ("before", "split", "after", "expected"),
    [
        # [batch, length, d] <-> [batch * length, d], divided over the batch.
        ((8, 16, 4), (D, (), M), (128, 4), (D, M)),
        ((128, 4), (D, M), (8, 16, 4), (D, (), M)),
        # Hidden units to heads and back; heads stay together.
        ((8, 64), ((), M), (8, 4, 16), ((), M, ())),
        ((8, 4, 16), ((), M, ()), (8, 64), ((), M)),
        # The length's parts are not next to each other in one dimension of rows.
        ((8, 16, 4), ((), D, ()), (128, 4), ((), ())),
        # Dimensions of one element come and go.
        ((8, 1, 4), (D, (), M), (8, 4), (D, M)),
        ((8, 4), (D, M), (1, 8, 4), ((), D, M)),
    ],
)
def test_reshaped(before, split, after, expected):
    assert splits.reshaped(split, before, after) == expected


def results(function, *arguments):
    """Splits of the results of a function of (shape, split)."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, _, dtype in arguments]
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    values = [Value(split) for _, split, _ in arguments]
    known = flops.count(jaxpr, values, MESH)[1]
    return [flops.value_of(var, known).split for var in jaxpr.outvars]


F32, I32 = jnp.float32, jnp.int32


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        # Rows divided over data, a kernel under FSDP: it is fetched.
        (jnp.matmul, [((64, 16), (D, ()), F32), ((16, 8), (D, M), F32)], (D, M)),
        # Experts: their own axis goes first, groups keep the other.
        (
            lambda x, k: jnp.einsum("gecd,edf->gecf", x, k),
            [((8, 4, 5, 6), ((*D, *E), (), (), ()), F32), ((4, 6, 7), (E, (), M), F32)],
            (D, E, (), M),
        ),
        # An embedding: positions are divided as their ids are, vectors are whole.
        (
            lambda table, ids: table[ids],
            [((100, 6), (M, ()), F32), ((8, 5), (D, ()), I32)],
            (D, (), ()),
        ),
        # Its gradient is a sum over all positions.
        (
            lambda rows, ids: jnp.zeros((100, 6)).at[ids].add(rows),
            [((8, 5, 6), (D, (), ()), F32), ((8, 5), (D, ()), I32)],
            ((), ()),
        ),
        # Tokens of groups into slots, each group for itself.
        (
            jax.vmap(lambda tokens, index: tokens[index]),
            [((8, 5, 6), (D, (), ()), F32), ((8, 3, 2), (D, (), ()), I32)],
            (D, (), (), ()),
        ),
        # What is sorted and put in place stays divided.
        (jnp.sort, [((64,), (D,), F32)], (D,)),
        (
            lambda rows, index: jnp.zeros(80).at[index].set(rows),
            [((64,), (D,), F32), ((64,), (D,), I32)],
            (D,),
        ),
        (lambda x: jnp.sum(x, axis=1), [((8, 16, 4), (D, M, ()), F32)], (D, ())),
        (lambda x: x.T[None], [((8, 16), (D, M), F32)], ((), M, D)),
        (lambda x: x[:, :3], [((8, 16), (D, M), F32)], (D, ())),
        (lambda x, y: x + y, [((8, 16), (D, ()), F32), ((8, 16), ((), M), F32)], (D, M)),
        # A loop's carry is divided as its body leaves it.
        (
            lambda x: jax.lax.fori_loop(0, 3, lambda i, total: total + x, jnp.zeros((8, 16))),
            [((8, 16), (D, M), F32)],
            (D, M),
        ),
    ],
)
def test_operations(function, arguments, expected):
    assert results(function, *arguments) == [expected]
