"""Transposes in memory: the bits that NumPy's own have, by jax's runtime and without it."""

import ml_dtypes
import numpy as np
import pytest

from upcycle_jax.checkpoints.huggingface import transposing
from upcycle_jax.checkpoints.huggingface.transposing import transposed, transposed_parts

DTYPES = ("bool", "int8", "float16", "float32", "float64", "int64", "bfloat16", "float8_e4m3fn")


@pytest.fixture(params=["jax", "numpy"])
def way(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(transposing, "host_device", lambda: None)
    return request.param


def random_bits(shape, name):
    """Any bits: NaNs with payloads, infinities and denormals among them."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    rng = np.random.default_rng(0)
    if name == "bool":
        return rng.random(shape) < 0.5
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (130, 67), (2, 3, 33, 129)])
def test_the_bits_are_those_of_numpy(way, name, shape):
    value = random_bits(shape, name)
    expected = np.ascontiguousarray(value.swapaxes(-1, -2))
    found = transposed(value)
    assert found.dtype == value.dtype and found.flags.c_contiguous and found.flags.writeable
    assert found.shape == expected.shape and found.tobytes() == expected.tobytes()
    parts = [part.copy() for part in transposed_parts(value)]
    assert b"".join(part.tobytes() for part in parts) == expected.tobytes()


def test_parts_of_arrays_into_parts_of_arrays(way):
    whole = random_bits((64, 90), "float32")
    room = np.zeros((50, 200), np.float32)
    transposed(whole[3:33:2, 40:80], room[5:45, 100:115])
    assert room[5:45, 100:115].tobytes() == whole[3:33:2, 40:80].T.tobytes()
    room[5:45, 100:115] = 0
    assert not room.any()


def test_several_parts(way, monkeypatch):
    """64 rows of the transpose at a time, the last part shorter."""
    monkeypatch.setattr(transposing, "_PART_BYTES", 1)
    value = random_bits((10, 150), "bfloat16")
    parts = [part.copy() for part in transposed_parts(value)]
    assert [part.shape for part in parts] == [(64, 10), (64, 10), (22, 10)]
    assert np.concatenate(parts).tobytes() == value.T.tobytes()
