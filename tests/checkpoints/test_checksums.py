"""One checksum, three ways: NumPy over a whole array, NumPy over parts of it, jax on a mesh."""

import hashlib
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from upcycle_jax.checkpoints import checksums
from upcycle_jax.checkpoints.checksums import Accumulator, checksum, device_checksums

TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "bool": np.bool_,
        "int8": np.int8,
        "uint16": np.uint16,
        "int32": np.int32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float32": np.float32,
    }.items()
}
HOST_TYPES = TYPES | {name: np.dtype(name) for name in ("int64", "uint64", "float64")}

few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


def bits(shape, dtype, seed=0):
    """Random bits, so NaNs of every payload are among the floats."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def by_the_formula(array):
    """The formula of the module's docstring, word by word in Python's integers."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    size = array.dtype.itemsize
    flat = np.ascontiguousarray(array).tobytes()
    each = 4 if size == 8 else size
    words = [int.from_bytes(flat[at : at + each], "little") for at in range(0, len(flat), each)]
    first = second = 0
    for i, word in enumerate(words):
        h = mix(i)
        first += mix(word) * (h | 1)
        second += mix(word) * ((h * 0x9E3779B1 % 2**32) ^ (h >> 16) | 1)
    return first % 2**32, second % 2**32


@pytest.mark.parametrize("dtype", HOST_TYPES.values(), ids=HOST_TYPES)
def test_the_host_computes_the_formula(dtype):
    array = bits((3, 5, 2), dtype)
    kind = f"{dtype.name}[3,5,2]"
    digest = np.frombuffer(hashlib.sha256(kind.encode()).digest()[:8], "<u4").tolist()
    lanes = by_the_formula(array)
    expected = [(lane + offset) % 2**32 for lane, offset in zip(lanes, digest, strict=True)]
    assert checksum(array) == "sum64:{:08x}{:08x}".format(*expected)


@pytest.fixture(scope="module", autouse=True)
def summed_on_devices():
    """Small arrays, too, whose programs take longer to compile than their sums on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_AT_HAND", -1)
        yield


@few
@hypothesis.given(
    dtype=st.sampled_from(sorted(TYPES)),
    shape=st.sampled_from([(), (8,), (0, 8), (8, 3), (2, 8, 4), (16, 24), (4, 2, 2, 8)]),
    axis=st.integers(0, 3),
    names=st.sampled_from([("a",), ("b",), ("a", "b"), ()]),
    seed=st.integers(0, 99),
)
def test_every_sharding_gives_the_checksum_of_the_host(dtype, shape, axis, names, seed):
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    array = bits(shape, TYPES[dtype], seed)
    parts = [None] * len(shape)
    if shape and names and shape[axis % len(shape)] % math.prod(mesh.shape[n] for n in names) == 0:
        parts[axis % len(shape)] = names
    placed = jax.device_put(array, NamedSharding(mesh, P(*parts)))
    found = checksums.device_summaries({"x": {"y": placed}, "host": array})
    assert found["x/y"].checksum == checksum(array) == found["host"].checksum
    bad = 0 if array.dtype.kind in "bui" else int(np.sum(~np.isfinite(array.astype(np.float32))))
    assert found["x/y"].nonfinite == bad == found["host"].nonfinite


@few
@hypothesis.given(
    dtype=st.sampled_from(sorted(HOST_TYPES)),
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    data=st.data(),
)
def test_parts_in_any_order_give_the_checksum_of_the_whole(dtype, shape, data):
    array = bits(shape, HOST_TYPES[dtype])
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
    ]
    parts = [()]
    for edges in cuts:
        parts = [(*part, slice(*pair)) for part in parts for pair in itertools.pairwise(edges)]
    total = Accumulator(shape, array.dtype)
    for index in data.draw(st.permutations(parts)):
        total.add(index, array[index])
    assert total.text() == checksum(array) == checksum(np.array(array, order="F"))


def test_large_arrays_are_cut_into_slabs_without_changing_the_sum(monkeypatch):
    array = bits((7, 9, 11), np.dtype(np.float32))
    whole = checksum(array)
    for size in (1, 2, 11, 12, 99, 100, 693):
        monkeypatch.setattr(checksums, "_SLAB", size)
        assert checksum(array) == whole
        assert checksum(array.transpose(2, 0, 1).transpose(1, 2, 0)) == whole


@pytest.mark.parametrize("dtype", HOST_TYPES.values(), ids=HOST_TYPES)
def test_the_compiled_program_of_the_host_gives_the_sums_of_numpy(dtype, monkeypatch):
    """Runs that begin anywhere in memory and in the array, whole programs, padded ones, rests."""
    array = bits((5, 67), dtype)
    whole = checksum(array)
    monkeypatch.setattr(checksums, "_COMPILED", 64)
    calls, compiled = [], checksums._run_sums
    monkeypatch.setattr(
        checksums, "_run_sums", lambda *given: calls.append(given) or compiled(*given)
    )
    assert checksum(array) == whole and len(calls) >= 335 * dtype.itemsize // 512
    assert {words.shape for words, _ in calls} == {(64,)}
    for cut in (1, 2, 3):
        room = np.empty(array.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64 + cut * dtype.itemsize
        moved = room[start : start + array.nbytes].view(dtype).reshape(array.shape)
        moved[...] = array
        total = Accumulator(array.shape, dtype)
        total.add((slice(cut, 5),), moved[cut:])
        total.add((slice(0, cut),), moved[:cut])
        assert total.text() == whole
    swapped = array.astype(dtype.newbyteorder(">")) if dtype.isnative else array
    assert checksum(swapped) == whole
    before = len(calls)
    assert checksum(np.asfortranarray(array)) == whole and len(calls) == before
    monkeypatch.setattr(checksums, "host_device", lambda: None)
    assert checksum(array) == whole and len(calls) == before


def test_positions_beyond_two_to_the_32_wrap():
    """A part of an array of 2**33 elements, of which nothing else is looked at."""
    shape, block = (2**20, 2**13), bits((2, 2**13), np.dtype(np.int8))
    sums = []
    for first in (5, 5 + 2**19):  # 2**19 rows on: 2**32 elements on
        total = Accumulator(shape, np.int8)
        total.add((slice(first, first + 2),), block)
        sums.append(total._lanes)
    assert sums[0] == sums[1]


@few
@hypothesis.given(
    dtype=st.sampled_from(sorted(HOST_TYPES)), where=st.integers(0, 23), data=st.data()
)
def test_a_changed_bit_always_changes_both_lanes(dtype, where, data):
    array = bits((4, 6), HOST_TYPES[dtype])
    before = checksum(array)
    raw = array.view(np.uint8).reshape(24, -1)
    bit = 0 if array.dtype == np.bool_ else data.draw(st.integers(0, 8 * raw.shape[1] - 1))
    raw[where, bit // 8] ^= np.uint8(1 << bit % 8)
    after = checksum(array)
    assert before[6:14] != after[6:14] and before[14:] != after[14:]


def test_structured_damage_is_seen():
    """What plain sums miss: neighbours exchanged, signs of pairs flipped, rows exchanged, zeros."""
    array = bits((64, 64), np.dtype(np.float32))
    seen = {checksum(array)}
    changed = []
    for i in range(63):
        swapped = array.copy()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        flipped = array.copy()
        flipped.view(np.uint32)[i, i : i + 2] ^= np.uint32(1 << 31)
        cut = array.copy()
        cut[i:] = 0
        exchanged = array.copy()
        exchanged[i, i : i + 2] = array[i, i : i + 2][::-1]
        changed += [swapped, flipped, cut, exchanged]
    seen |= {checksum(item) for item in changed}
    assert len(seen) == 1 + len(changed)


def test_shape_and_dtype_are_part_of_the_checksum():
    zeros = [
        np.zeros(shape, dtype)
        for shape in ((), (0,), (1,), (4,), (2, 2), (4, 1))
        for dtype in (np.float32, np.int32, ml_dtypes.bfloat16, np.float16)
    ]
    assert len({checksum(array) for array in zeros}) == len(zeros)
    swapped = np.arange(6, dtype=">f4")
    assert checksum(swapped) == checksum(swapped.astype("<f4"))


def test_two_devices_or_eight_or_none_agree_under_one_jit_and_outside():
    array = bits((16, 8), np.dtype(np.float32))
    for devices in (1, 2, 8):
        mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
        placed = jax.device_put(array, NamedSharding(mesh, P("d")))
        assert device_checksums({"x": placed}) == {"x": checksum(array)}


def test_small_arrays_on_cpu_devices_are_summed_on_the_host(monkeypatch):
    array = bits((16, 8), np.dtype(np.float32))
    array[3, 5], array[4, 0] = np.nan, np.inf
    placed = {
        str(devices): jax.device_put(
            array,
            NamedSharding(
                jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices]), P("d")
            ),
        )
        for devices in (1, 8)
    }
    want = checksums.device_summaries(placed)
    monkeypatch.setattr(checksums, "_AT_HAND", array.nbytes)
    monkeypatch.setattr(checksums, "_leaf_sums", None)
    assert checksums.device_summaries(placed) == want
    assert want["8"].nonfinite >= 2


def test_the_sum_of_a_sharded_array_moves_no_array():
    mesh = jax.make_mesh((8,), ("d",))
    placed = jax.device_put(np.zeros((64, 32), np.float32), NamedSharding(mesh, P("d")))
    text = checksums._leaf_sums.lower(placed).compile().as_text()
    assert "f32[64,32]" not in text and "u32[64,32]" not in text


def test_what_has_no_checksum_is_refused():
    for dtype in (np.complex64, "U3", object, ml_dtypes.int4):
        with pytest.raises(ValueError, match="have no checksum"):
            checksum(np.zeros(3, dtype))
    total = Accumulator((4, 2), np.float32)
    total.add((slice(0, 2),), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="4 elements were added up, the array has 8"):
        total.text()
    with pytest.raises(ValueError, match="is not the part"):
        total.add((slice(2, 4),), np.zeros((2, 2), np.float16))
