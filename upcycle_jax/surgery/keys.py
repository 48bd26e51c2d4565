"""Random keys: a function of (seed, parameter path, expert) and of nothing else.

The same functions serve the online and the offline path, so that both draw the same bits whatever
the sharding.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from upcycle_jax.distributed import host_device

IMPLEMENTATION = "threefry2x32"


def stable_hash(path: str) -> np.uint32:
    """The first four bytes of SHA-256 of a path: the same on every machine and in every process.

    >>> int(stable_hash("target/encoder/layers_1/mlp/expert/wi_0/kernel"))
    4055180577
    """
    return np.uint32(int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big"))


class KeySource(NamedTuple):
    """What the keys of one leaf are made of; small integers, so that one compiled program serves
    every leaf of a shape.

    Attributes:
      seed: the recipe's seed, uint32.
      leaf: hash of the leaf's own path, uint32: draws that differ between the matrices of an MLP.
      layer: hash of the MLP's path, uint32: draws that the matrices of an MLP share (which hidden
        units are redrawn, say).
    """

    seed: np.uint32
    leaf: np.uint32
    layer: np.uint32


def key_source(seed: int, leaf_path: str, layer_path: str) -> KeySource:
    """The key source of a leaf.

    Raises:
      ValueError: the seed does not fit into 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range: choose one from 0 to 4294967295")
    return KeySource(np.uint32(seed), stable_hash(leaf_path), stable_hash(layer_path))


def expert_key(
    seed: jax.Array | np.uint32, path_hash: jax.Array | np.uint32, expert: jax.Array | int
) -> jax.Array:
    """The key of one expert of one path: `fold_in(fold_in(key(seed), hash), expert)`."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), path_hash), expert
    )


def permutation(seed: np.uint32, path_hash: np.uint32, number: int, size: int) -> np.ndarray:
    """Permutation `number` of `range(size)` of a path, int32 `[size]`, made on the host from
    integers alone.

    Random bits are sorted stably, so that the result does not depend on the backend.
    """
    return np.argsort(draw("bits", seed, path_hash, number, (size,)), kind="stable").astype(
        np.int32
    )


@functools.lru_cache(maxsize=64)
def _drawing(kind: str, shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    draws = {
        "bits": lambda key: jax.random.bits(key, shape, "uint32"),
        "normal": lambda key: jax.random.normal(key, shape),
        "uniform": lambda key: jax.random.uniform(key, shape),
        # Cut at two deviations, as T5X's initialisers do.
        "truncated_normal": lambda key: jax.random.truncated_normal(key, -2.0, 2.0, shape),
    }
    return jax.jit(lambda seed, path_hash, expert: draws[kind](expert_key(seed, path_hash, expert)))


def draw(
    kind: str, seed: np.uint32, path_hash: np.uint32, expert: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Random numbers of one expert: 'bits' (uint32), 'normal', 'uniform' or 'truncated_normal'
    (float32), of mean 0 and unit scale.

    They are always drawn for a whole slab by one compiled program on the host's CPU. Drawn inside a
    sharded program, normal values were seen to differ in the last bit from one mesh to the next
    (vectorised and scalar logarithms, fused multiply-adds), and then online and offline results
    would not be equal.
    """
    with jax.default_device(host_device()), jax.threefry_partitionable(True):
        return np.asarray(
            _drawing(kind, tuple(shape))(np.uint32(seed), np.uint32(path_hash), np.uint32(expert))
        )
