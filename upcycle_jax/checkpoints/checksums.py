"""Checksums of arrays that NumPy on the host and jax on any mesh compute alike.

The checksum of an array is a sum, so it can be taken in parts and in any order, and of a sharded
array without data of other hosts: each device adds up what it holds. With the array as 32-bit words
x[i] in C order (types of one or two bytes are widened, those of eight bytes are two words, the
lower one first),

    lane 1 = sum over i of mix(x[i]) * (h | 1)                         mod 2**32
    lane 2 = sum over i of mix(x[i]) * (h * SCATTER ^ h >> 16 | 1)     mod 2**32,  h = mix(i)

to which a digest of dtype and shape is added. `mix` is a bijection of words and the weights are
odd, hence invertible: a change of one word always changes both lanes. Other damage goes unnoticed
with a probability of about 2**-62. No protection against an adversary. Positions wrap after 2**32
words.

`mix` is the "lowbias32" function of C. Wellons, "Prospecting for Hash Functions" (2018).
"""

import dataclasses
import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import trees
from upcycle_jax.distributed import host_device, in_turn
from upcycle_jax.types import PyTree

PREFIX = "sum64:"
"""What the text of a checksum begins with; 16 hexadecimal digits follow."""

_SCATTER = 0x9E3779B1
_SLAB = 1 << 15
"""Words that the host treats at a time: they stay in the processor's cache."""
_COMPILED = 1 << 20
"""Words that the host's compiled program treats at a time. It is four times as fast as NumPy and
takes a tenth of a second to compile, so that smaller arrays are left to NumPy.
"""
_ALIGNMENT = 64
"""Bytes: arrays that begin at a multiple of it are not copied for a compiled program."""
_AT_HAND = 1 << 16
"""Bytes of an array in this process's own memory up to which it is summed sooner than a program for
its kind is compiled.
"""


def checksum(array: np.ndarray) -> str:
    """The checksum of a host array, e.g. 'sum64:0123456789abcdef'.

    Args:
      array: of bool, integers or floats (bfloat16 and float8 included) of up to 8 bytes, any shape.

    Raises:
      ValueError: another dtype.
    """
    array = np.asarray(array)
    total = Accumulator(array.shape, array.dtype)
    total.add(None, array)
    return total.text()


class Accumulator:
    """The checksum of an array that is read part by part, in any order.

    Args:
      shape: of the whole array.
      dtype: of the whole array.

    Raises:
      ValueError: a dtype that has no checksum.
    """

    def __init__(self, shape: Sequence[int], dtype: Any):
        self._shape, self._dtype = tuple(int(n) for n in shape), np.dtype(dtype)
        self._words_per_element = _words_per_element(self._dtype)
        self._strides = _strides(self._shape)
        self._lanes, self._elements = [0, 0], 0

    def add(self, index: Sequence[slice] | None, block: np.ndarray) -> None:
        """Takes in one part. Every element must come exactly once.

        Args:
          index: where the part lies, one slice of step 1 per leading dimension; None for all.
          block: the values.

        Raises:
          ValueError: the block is not of this shape and dtype.
        """
        slices = tuple(index or ())
        slices += (slice(None),) * (len(self._shape) - len(slices))
        bounds = [entry.indices(size) for entry, size in zip(slices, self._shape, strict=True)]
        block = np.asarray(block)
        wanted = tuple(stop - start for start, stop, _ in bounds)
        if block.shape != wanted or block.dtype.name != self._dtype.name:
            raise ValueError(
                f"a block {block.dtype.name}{list(block.shape)} is not the part"
                f" {self._dtype.name}{list(wanted)}"
            )
        first = sum(at * stride for (at, _, _), stride in zip(bounds, self._strides, strict=True))
        self._elements += block.size
        if block.flags.c_contiguous and _is_run(block.shape, self._strides):
            for offset, rest in self._add_compiled(block.reshape(-1), first):
                self._add_slabs(rest, first + offset, [1])
        else:
            self._add_slabs(block, first, self._strides)

    def merge(self, other: "Accumulator") -> None:
        """Takes in the parts that another accumulator of the same array has, e.g. one of another
        thread: an accumulator must not be added to by two at a time.

        Raises:
          ValueError: the other one is of another shape or dtype.
        """
        if (other._shape, other._dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"{other._dtype.name}{list(other._shape)} is not {self._dtype.name}"
                f"{list(self._shape)}"
            )
        self._lanes = [
            mine + theirs for mine, theirs in zip(self._lanes, other._lanes, strict=True)
        ]
        self._elements += other._elements

    def text(self) -> str:
        """The checksum of the whole array.

        Raises:
          ValueError: the parts have fewer or more elements than the array.
        """
        size = math.prod(self._shape)
        if self._elements != size:
            raise ValueError(f"{self._elements} elements were added up, the array has {size}")
        return _text(self._lanes, self._shape, self._dtype)

    def _add_compiled(self, run: np.ndarray, first: int) -> list[tuple[int, np.ndarray]]:
        """Adds the long part of a run of elements, whose first one has the linear index `first`.

        Returns:
          What is left to add: pieces, with their places in the run.
        """
        each = self._words_per_element
        most, head = _COMPILED // each, -run.ctypes.data % _ALIGNMENT // run.itemsize
        # Compiled for large arrays, and used for such parts of them as are worth the padding.
        long = math.prod(self._shape) >= most and run.size - head >= most // 4
        cpu = host_device() if long else None
        if cpu is None:
            return [(0, run)]
        with jax.default_device(cpu):
            for start in range(head, run.size, most):
                part = run[start : start + most]
                words = _unsigned(part)
                if part.size < most:
                    if part.size < most // 4:
                        return [(0, run[:head]), (start, part)]
                    # Words of zero add nothing, wherever they are.
                    words = _padded(words)
                place = np.uint32((first + start) * each % 2**32)
                for lane, found in enumerate(np.asarray(_run_sums(words, place))):
                    self._lanes[lane] += int(found)
        return [(0, run[:head])]

    def _add_slabs(self, block: np.ndarray, first: int, strides: Sequence[int]) -> None:
        """Adds a block, by NumPy, whose first element has the linear index `first`.

        Args:
          block: the values.
          first: see above.
          strides: how many elements of the whole array its neighbours along each axis are apart.
        """
        scratch = _Scratch(min(block.size * self._words_per_element, _SLAB))
        for offset, slab in _slabs(block, strides, _SLAB // self._words_per_element):
            self._add(slab, first + offset, strides, scratch)

    def _add(
        self, slab: np.ndarray, first: int, strides: Sequence[int], scratch: "_Scratch"
    ) -> None:
        """Adds the words of a block that fits `scratch`; see `_add_slabs`."""
        each, words = self._words_per_element, _host_words(slab)
        where, mixed, spare = (part[: words.size] for part in scratch.parts)
        if _is_run(slab.shape, strides):
            np.add(scratch.counted[: words.size], np.uint32(first * each % 2**32), out=where)
        else:
            places: np.ndarray = np.full((1,) * slab.ndim, first * each % 2**32, np.uint32)
            for axis, (size, stride) in enumerate(zip(slab.shape, strides, strict=True)):
                steps = np.arange(size, dtype=np.uint32) * np.uint32(stride * each % 2**32)
                places = places + steps.reshape((-1,) + (1,) * (slab.ndim - 1 - axis))
            places = places[..., None] + np.arange(each, dtype=np.uint32)
            where[...] = places.reshape(-1)
        _mix_into(where, where, spare)
        _mix_into(words, mixed, spare)
        for lane, weigh in enumerate((_first_weights, _second_weights)):
            weights = weigh(where, spare)
            np.multiply(mixed, weights, out=weights)
            self._lanes[lane] += int(np.sum(weights, dtype=np.uint32))


class _Scratch:
    """Room for the words of one slab: memory that is taken anew for every step of the arithmetic
    would cost ten times as much as that.
    """

    def __init__(self, words: int):
        self.counted = np.arange(words, dtype=np.uint32)
        self.parts = tuple(np.empty(words, np.uint32) for _ in range(3))


def _mix_into(words: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
    """`_mix` of uint32 words, into `out`, which may be `words`; `spare` is overwritten."""
    source = words
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        np.right_shift(source, np.uint32(shift), out=spare)
        np.bitwise_xor(source, spare, out=out)
        np.multiply(out, np.uint32(factor), out=out)
        source = out
    np.right_shift(out, np.uint32(16), out=spare)
    np.bitwise_xor(out, spare, out=out)


def _first_weights(spread: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`_weights` of the first lane, of mixed positions, into `out`."""
    return np.bitwise_or(spread, np.uint32(1), out=out)


def _second_weights(spread: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`_weights` of the second lane, of mixed positions, into `out`; `spread` is used up."""
    np.multiply(spread, np.uint32(_SCATTER), out=out)
    np.right_shift(spread, np.uint32(16), out=spread)
    np.bitwise_xor(out, spread, out=out)
    return np.bitwise_or(out, np.uint32(1), out=out)


def _is_run(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a block of an array with these strides is one run of its elements."""
    counted = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != counted:
            return False
        counted *= size
    return True


class _Padding(threading.local):
    """Words of each thread, of the size that a compiled program takes."""

    room: np.ndarray | None = None


_padding = _Padding()


def _padded(words: np.ndarray) -> np.ndarray:
    """Words followed by zeros, valid until this thread's next call."""
    room = _padding.room
    if room is None or (room.size, room.dtype) != (_COMPILED, words.dtype):
        _padding.room = room = aligned(_COMPILED * words.itemsize).view(words.dtype)
    room[: words.size] = words
    room[words.size :] = 0
    return room


def aligned(nbytes: int) -> np.ndarray:
    """Room for so many bytes, which a compiled program takes without a copy."""
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + nbytes]


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """What one pass over an array on the devices finds.

    Attributes:
      checksum: as `checksum` gives it for the same values.
      nonfinite: how many elements are NaN or infinite; 0 for types that cannot be.
    """

    checksum: str
    nonfinite: int


def device_summaries(tree: PyTree) -> dict[str, LeafSummary]:
    """Checksums of the leaves, by path, and how many of their elements are not finite.

    jax arrays are summed where they lie, whatever their sharding, in one pass over memory; every
    process of a run must call this and gets every result. Host arrays, and small ones on the CPU
    devices of this process alone, are summed on the host.

    Args:
      tree: nested dict of arrays, or a flat one by path.

    Raises:
      ValueError: a leaf's dtype has no checksum.
    """
    flat = trees.flatten(tree)
    for leaf in flat.values():
        _words_per_element(np.dtype(leaf.dtype))
    on_device = {
        path: leaf
        for path, leaf in flat.items()
        if isinstance(leaf, jax.Array) and not _is_at_hand(leaf)
    }
    # Compiled once for every kind of leaf, of which a model has few.
    sums = jax.device_get({path: in_turn(_leaf_sums(leaf)) for path, leaf in on_device.items()})
    summaries = {}
    for path, leaf in flat.items():
        if path in sums:
            first, second, nonfinite, any_nonfinite = (int(value) for value in sums[path])
            text = _text((first, second), leaf.shape, np.dtype(leaf.dtype))
            summaries[path] = LeafSummary(text, nonfinite or any_nonfinite)
        else:
            summaries[path] = LeafSummary(checksum(leaf), nonfinite_count(leaf))
    return summaries


def _is_at_hand(leaf: jax.Array) -> bool:
    """Whether an array is small, and all of it in the memory of this process."""
    devices: set[Any] = leaf.sharding.device_set
    return (
        leaf.nbytes <= _AT_HAND
        and leaf.is_fully_addressable
        and all(device.platform == "cpu" for device in devices)
    )


def device_checksums(tree: PyTree) -> dict[str, str]:
    """The checksums of `device_summaries` alone."""
    return {path: summary.checksum for path, summary in device_summaries(tree).items()}


def nonfinite_count(array: np.ndarray) -> int:
    """How many elements of a host array are NaN or infinite."""
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return 0
    exponent = _EXPONENT_BITS.get(array.dtype.name)
    if (
        exponent is not None and array.dtype.isnative
    ):  # NumPy's own test of these goes element by element.
        bits = array.view(np.uint16) & exponent
        return int(np.count_nonzero(bits == exponent))
    return int(array.size - np.count_nonzero(np.isfinite(array)))


_EXPONENT_BITS = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
"""All of them are set where a number is NaN or infinite."""


@jax.jit
def _leaf_sums(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Both lanes, and the number of elements that are not finite (modulo 2**32), and whether
    there are any.
    """
    words = _device_words(leaf)
    where = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        where = where + steps * jnp.uint32(stride % 2**32)
    bad = jnp.zeros(words.shape, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        bad = (~jnp.isfinite(leaf)).astype(jnp.uint32)
        if words.ndim > leaf.ndim:  # two words per element
            bad = jnp.stack([bad, jnp.zeros_like(bad)], axis=-1)
    mixed = _mix(words)
    operands = (*(mixed * weights for weights in _weights(where)), bad, bad)
    # One reduction of four values is one pass; four reductions would be four.
    return jax.lax.reduce(
        operands,
        (jnp.uint32(0),) * 4,
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] | b[3]),
        tuple(range(words.ndim)),
    )


@jax.jit
def _run_sums(words: jax.Array, first: jax.Array) -> jax.Array:
    """Both lanes `[2]` of words of one to four bytes `[n]`, of which the first one lies at `first`
    (modulo 2**32) in the array.
    """
    mixed = _mix(words.astype(jnp.uint32))
    where = first + jax.lax.iota(jnp.uint32, words.size)
    operands = tuple(mixed * weights for weights in _weights(where))
    lanes = jax.lax.reduce(
        operands, (jnp.uint32(0),) * 2, lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,)
    )
    return jnp.stack(lanes)


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of the
    input.
    """
    words = words ^ (words >> 16)
    words = words * np.uint32(0x7FEB352D)
    words = words ^ (words >> 15)
    words = words * np.uint32(0x846CA68B)
    return words ^ (words >> 16)


def _weights(where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The odd weights of both lanes at the given positions."""
    spread = _mix(where)
    return spread | 1, ((spread * np.uint32(_SCATTER)) ^ (spread >> 16)) | 1


def _slabs(
    block: np.ndarray, strides: Sequence[int], most: int, axis: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a block into small ones of at most so many elements; with each, its linear distance from
    the block's first element in the array whose strides (in elements) are given.
    """
    if not block.size:
        return
    if block.size <= most:
        yield 0, block
        return
    rows = max(1, most // math.prod(block.shape[axis + 1 :]))
    for first in range(0, block.shape[axis], rows):
        part = block[(slice(None),) * axis + (slice(first, first + rows),)]
        for offset, slab in _slabs(part, strides, most, axis + 1):
            yield first * strides[axis] + offset, slab


def _strides(shape: Sequence[int]) -> list[int]:
    """Distance in elements between neighbours along each dimension, in C order."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _words_per_element(dtype: np.dtype) -> int:
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    sized = dtype.itemsize in (1, 2, 4, 8) and not dtype.name.startswith(("int4", "uint4", "int2"))
    if not sized or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise ValueError(
            f"arrays of {dtype.name} have no checksum: bool, integers and floats of 1, 2, 4 or 8"
            " bytes have"
        )
    return 2 if dtype.itemsize == 8 else 1


def _host_words(array: np.ndarray) -> np.ndarray:
    """The words of an array, flat, in C order."""
    return _unsigned(np.ascontiguousarray(array).reshape(-1)).astype(np.uint32, copy=False)


def _unsigned(run: np.ndarray) -> np.ndarray:
    """The words of a run of elements, not widened yet."""
    run = run.astype(run.dtype.newbyteorder("<"), copy=False)
    return run.view(f"<u{min(4, run.dtype.itemsize)}")


def _device_words(array: jax.Array) -> jax.Array:
    """The words of an array in its own shape; those of eight-byte types along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}"))
    return words.astype(jnp.uint32)


def _text(lanes: Sequence[int], shape: Sequence[int], dtype: np.dtype) -> str:
    kind = f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
    digest = hashlib.sha256(kind.encode()).digest()
    first, second = (
        (lane + int.from_bytes(digest[at : at + 4], "little")) % 2**32
        for lane, at in zip(lanes, (0, 4), strict=True)
    )
    return f"{PREFIX}{first:08x}{second:08x}"
