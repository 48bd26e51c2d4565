"""The tensors of a folder against the checkpoint's leaves, bit for bit."""

from collections.abc import Iterator, Mapping

import numpy as np

from upcycle_jax.checkpoints import CheckpointReader
from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.huggingface.base import Leaf, Source
from upcycle_jax.checkpoints.huggingface.decoder.tensors import places
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.moe import roles
from upcycle_jax.state_tree import TARGET

_BLOCK_ELEMENTS = 4 << 20
_SWAPPED = {"wi_0": "wi_1", "wi_1": "wi_0"}


def wrong_tensors(
    leaves: Mapping[str, Leaf], folder: CheckpointReader, model_type: str, config: DecoderConfig
) -> Iterator[str]:
    """Tensors that do not hold what they should, one line each.

    Args:
      leaves: what should be there, by path without `target/`.
      folder: what is there; it has the same leaves.
      model_type: of the folder.
      config: of its model.
    """
    behind = places(model_type, config)
    for path, leaf in leaves.items():
        sources = behind[path]
        several = not isinstance(sources, Source)
        for number, source in enumerate([sources] if isinstance(sources, Source) else sources):
            first = slice(number, number + 1) if several else slice(0, leaf.spec.shape[0])
            wrong, size, largest = _compared(leaf, folder, path, first)
            if not wrong:
                continue
            hint = _hint(leaves, folder, path, first)
            yield (
                f"{source.tensor}: {wrong} of {size} values differ, by up to {largest:.3g}"
                f"{f': {hint}' if hint else ''}"
            )


def _compared(
    leaf: Leaf, folder: CheckpointReader, path: str, first: slice
) -> tuple[int, int, float]:
    """How many values differ in a part of the first axis, of how many, and by how much."""
    wrong, size, largest = 0, 0, 0.0
    rows = max(1, _BLOCK_ELEMENTS // max(1, int(np.prod(leaf.spec.shape[1:], dtype=np.int64))))
    rest = tuple(slice(0, length) for length in leaf.spec.shape[1:])
    for start in range(first.start, first.stop, rows):
        index = (slice(start, min(start + rows, first.stop)), *rest)
        there = folder.read(TARGET + path, index)
        ours = cast(path, leaf.read(index), there.dtype, index)
        size += there.size
        differ = np.ascontiguousarray(ours).view(np.uint8) != np.ascontiguousarray(there).view(
            np.uint8
        )
        if differ.any():
            a, b = ours.astype(np.float64), there.astype(np.float64)
            wrong += int((a != b).sum()) or int(differ.any())
            gaps = np.abs(a - b)
            largest = max(largest, float(gaps.max()) if np.isfinite(gaps).all() else np.inf)
    return wrong, size, largest


def _hint(leaves: Mapping[str, Leaf], folder: CheckpointReader, path: str, first: slice) -> str:
    """What stands there instead, where it is known."""
    for one, other in _SWAPPED.items():
        swapped = path.replace(f"/{one}/kernel", f"/{other}/kernel")
        if (
            swapped != path
            and swapped in leaves
            and not _compared(leaves[swapped], folder, path, first)[0]
        ):
            return f"it holds what belongs into {'up' if other == 'wi_1' else 'gate'}"
    if f"/{roles.EXPERT}/" in path:
        leaf = leaves[path]
        for expert in range(leaf.spec.shape[0]):
            if expert != first.start and not _is_other(leaf, folder, path, first, expert):
                return f"it holds what belongs to expert {expert}"
    return ""


def _is_other(leaf: Leaf, folder: CheckpointReader, path: str, first: slice, expert: int) -> bool:
    """Whether the tensor differs from another expert's."""
    if first.stop - first.start != 1:
        return True
    moved = Leaf(leaf.spec, lambda index: leaf.read((slice(expert, expert + 1), *index[1:])))
    return bool(_compared(moved, folder, path, first)[0])
