"""Leaves out of tensors: every part of a leaf is that part of what NumPy makes of the tensors."""

import numpy as np
import pytest

from upcycle_jax.checkpoints.huggingface.base import Rows, Source, consecutive
from upcycle_jax.checkpoints.huggingface.views import read_leaf
from upcycle_jax.checkpoints.reader import checked_index

RNG = np.random.default_rng(0)
HEADS, SIZE, WIDTH = 3, 4, 5
# Heads of GPT-NeoX: q, k and v of head 0, then those of head 1, ...
INTERLEAVED = RNG.normal(size=(HEADS * 3 * SIZE, WIDTH)).astype(np.float32)
BY_HEAD = INTERLEAVED.reshape(HEADS, 3, SIZE, WIDTH)
# Rows of GGUF's Llama: pairs that turn together lie beside each other.
PAIRED = RNG.normal(size=(HEADS * SIZE, WIDTH)).astype(np.float32)
STACKED = RNG.normal(size=(3, 2 * SIZE, WIDTH)).astype(np.float32)  # [E, 2f, d], gate first
EXPERTS = [RNG.normal(size=(SIZE, WIDTH)).astype(np.float32) for _ in range(6)]
VECTOR = np.arange(HEADS * 3 * SIZE, dtype=np.float32)
TENSORS = {
    "interleaved": INTERLEAVED,
    "paired": PAIRED,
    "stacked": STACKED,
    "vector": VECTOR,
    **{f"expert {e}": value for e, value in enumerate(EXPERTS)},
}
KEYS = Rows((HEADS, SIZE), (3 * SIZE, 1), offset=SIZE)
PAIRS = Rows((HEADS, 2, SIZE // 2), (SIZE, 1, 2))
CASES = {
    "a tensor": (Source("paired"), PAIRED),
    "transposed": (Source("paired", transposed=True), PAIRED.T),
    "times a factor": (Source("paired", factor=2.0), 2 * PAIRED),
    "consecutive rows": (
        Source("paired", transposed=True, rows=consecutive(2, 5)),
        PAIRED[2:7].T,
    ),
    "keys of interleaved heads": (
        Source("interleaved", transposed=True, rows=KEYS),
        BY_HEAD[:, 1].reshape(-1, WIDTH).T,
    ),
    "a bias of interleaved heads": (
        Source("vector", rows=KEYS),
        VECTOR.reshape(HEADS, 3, SIZE)[:, 1].ravel(),
    ),
    "paired rows": (
        Source("paired", rows=PAIRS),
        PAIRED.reshape(HEADS, SIZE // 2, 2, WIDTH).swapaxes(1, 2).reshape(-1, WIDTH),
    ),
    "second half of stacked experts": (
        Source("stacked", transposed=True, rows=consecutive(SIZE, SIZE)),
        STACKED[:, SIZE:].swapaxes(1, 2),
    ),
    "experts of tensors of their own": (
        tuple(Source(f"expert {e}", transposed=True) for e in range(6)),
        np.stack([value.T for value in EXPERTS]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_leaves(name):
    sources, want = CASES[name]
    read_bytes = []

    def read(tensor, index):
        part = TENSORS[tensor][index]
        read_bytes.append(part.nbytes)
        return part

    first = sources[0] if isinstance(sources, tuple) else sources
    assert (
        first.leaf_shape(TENSORS[first.tensor].shape) == want.shape[-TENSORS[first.tensor].ndim :]
    )
    for part in [
        (),
        (slice(1, 3),),
        (slice(0, 0),),
        tuple(slice(1, n - 1) for n in want.shape),
        tuple(slice(n - 1, n) for n in want.shape),
    ]:
        index = checked_index(name, want.shape, part)
        got = read_leaf(sources, read, index, np.dtype(np.float32))
        np.testing.assert_array_equal(got, want[index])
        assert got.flags.c_contiguous
        # What lies between rows is not read along, but for the few of neighbours.
        assert sum(read_bytes) <= 2 * got.nbytes
        read_bytes.clear()


def test_the_rows_of_interleaved_heads_by_hand():
    # 2 heads of 2; rows of the tensor: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1.
    values = Rows((2, 2), (6, 1), offset=4)
    assert values.indices().tolist() == [4, 5, 10, 11]
    assert values.indices(1, 3).tolist() == [5, 10]
