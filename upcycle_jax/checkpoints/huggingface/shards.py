"""Tensors written as safetensors: one file, or shards with their index."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.numpy import save_file

from upcycle_jax.checkpoints.huggingface.assembly import Tensor
from upcycle_jax.checkpoints.huggingface.files import WEIGHTS, WEIGHTS_INDEX

DEFAULT_SHARD_BYTES = 1 << 30


def write_tensors(
    tensors: Sequence[Tensor],
    place: Path,
    shard_bytes: int,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes tensors into a folder.

    Args:
      tensors: in order.
      place: the folder.
      shard_bytes: at most so many bytes are held in memory and written to one file, or one tensor
        if that is larger.
      progress: called with the name of each file.

    Raises:
      ValueError: a leaf is damaged, or the dtype cannot hold a value of it.
    """
    shards = list(_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        values = {tensor.name: tensor.read() for tensor in shard}
        # transformers 4 refuses other formats than 'pt'.
        save_file(values, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
        if progress:
            progress(file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(place / WEIGHTS_INDEX, index)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object for people."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += tensor.nbytes
    yield shard
