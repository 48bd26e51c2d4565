"""Tensors written as safetensors: the files of the library, byte for byte, within the memory."""

import threading

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from upcycle_jax.checkpoints.huggingface.assembly import Piece, Tensor
from upcycle_jax.checkpoints.huggingface.base import Leaf, Source, consecutive
from upcycle_jax.checkpoints.huggingface.shards import write_tensors
from upcycle_jax.trees import LeafSpec

RNG = np.random.default_rng(0)


def leaf(value, read=None):
    spec = LeafSpec(value.shape, value.dtype)
    return Leaf(spec, read or (lambda index: np.array(value[index])))


def tensor(name, value, *, transposed=False, dtype=None, read=None):
    """A tensor that is a leaf, or its transpose."""
    piece = Piece(name, leaf(value, read), None, Source(name, transposed=transposed))
    return Tensor(name, (piece,), np.dtype(dtype or value.dtype))


def normal(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


def test_files_are_those_of_the_library(tmp_path):
    wide, stacked, halves = normal(70, 4500), normal(2, 3, 65), (normal(5, 4), normal(5, 6))
    whole = np.concatenate(halves, axis=1).T
    fused = tuple(
        Piece(f"half {n}", leaf(half), None, Source("fused", True, rows=consecutive(at, rows)))
        for n, (half, at, rows) in enumerate(zip(halves, (0, 4), (4, 6), strict=True))
    )
    experts = normal(3, 4, 5)
    expected = {
        "wide": wide.T,  # more than one part of 1 MiB
        "stacked": stacked.swapaxes(1, 2),
        'ünïcode "quoted" \x7f': normal(3),
        "half": normal(7, 3, dtype="float16"),
        "brain": normal(5, 3, dtype="bfloat16"),
        "double": normal(2, 2, dtype="float64"),
        "scalar": normal(),
        "nothing": normal(0, 3),
        "cast": wide.astype("bfloat16"),
        "fused": whole,
        "expert 1": experts[1].T,
    }
    tensors = [
        tensor("wide", wide, transposed=True),
        tensor("stacked", stacked, transposed=True),
        *(tensor(name, value) for name, value in list(expected.items())[2:8]),
        tensor("cast", wide, dtype="bfloat16"),
        Tensor("fused", fused, np.dtype("float32")),
        Tensor(
            "expert 1",
            (Piece("experts", leaf(experts), 1, Source("expert 1", transposed=True)),),
            np.dtype("float32"),
        ),
    ]
    write_tensors(tensors, tmp_path, 1 << 30)
    contiguous = {name: np.array(value, order="C") for name, value in expected.items()}
    save_file(contiguous, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


def test_no_more_is_held_than_allowed(tmp_path):
    lock, held, most = threading.Lock(), 0, 0
    value = normal(64, 64)  # 16 KiB; 48 KiB are held: stored, decoded, written

    def read(index):
        nonlocal held, most
        with lock:
            held, most = held + 1, max(most, held + 1)
        out = np.array(value[index])
        with lock:
            held -= 1
        return out

    tensors = [tensor(f"tensor {n}", value, read=read) for n in range(9)]
    write_tensors(tensors, tmp_path, 40 << 10)  # one at a time
    assert most == 1
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards][:1] == ["model-00001-of-00005.safetensors"]
    assert [len(load_file(path)) for path in shards] == [2, 2, 2, 2, 1]


def test_the_first_tensor_that_cannot_be_written_is_named(tmp_path):
    def damaged(name):
        def read(index):
            raise ValueError(f"{name} is damaged")

        return tensor(name, normal(2), read=read)

    tensors = [tensor("a", normal(2)), damaged("b"), damaged("c"), tensor("d", normal(2))]
    for _ in range(5):
        with pytest.raises(ValueError, match="^b is damaged$"):
            write_tensors(tensors, tmp_path, 1 << 30)
