"""Writes dense parameters as a Hugging Face folder that transformers loads."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from upcycle_jax import leases
from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.huggingface.base import Source, Sources
from upcycle_jax.checkpoints.huggingface.families import exported
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WEIGHTS, WEIGHTS_INDEX
from upcycle_jax.checkpoints.output import check_unfinished, checked_output
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHARD_BYTES = 1 << 30
HUGGINGFACE_FILES = r"config\.json|model.*\.(safetensors|json)"
"""Names of the files that are written, as a pattern."""


def write_huggingface(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dtype: np.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes the dense parameters of a checkpoint as config.json and safetensors. Optimizer state
    and step are left behind.

    Args:
      reader: a dense model of one of `families`.
      output: a folder that does not exist; it appears when complete. The tokenizer is the user's to
        copy.
      dtype: dtype to write; None keeps each parameter's own.
      shard_bytes: at most so many bytes are held in memory and written to one file.
      progress: called with the name of each file written.

    Raises:
      ValueError: the checkpoint is sparse, or no encoder-decoder T5; a leaf is damaged, or `dtype`
        cannot hold a value of it; `output` cannot be written to or lies in the source. Nothing is
        left at `output`.
      FileExistsError: there is something at `output`.
    """
    if not storage.is_local(output):
        raise ValueError(
            f"{output}: a Hugging Face folder is written to a local disk; write it there and"
            " upload it"
        )
    final = checked_output(output, [reader.path])
    if final.exists():
        raise FileExistsError(
            f"{final} exists already: nothing was changed. Choose another output path or remove it"
            " first"
        )
    specs = {name: spec for name, spec in reader.specs().items() if name.startswith(TARGET)}
    folder = exported(specs, dtype, reader.model_settings())
    for name, spec in specs.items():
        if dtype is None and spec.dtype.name not in _DTYPES:
            raise ValueError(
                f"{name} is stored as {spec}: Hugging Face's T5 has {', '.join(_DTYPES)}; choose"
                " one with --dtype"
            )
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    with leases.hold(
        final.with_name(f".{final.name}.lease.json"),
        what=str(final),
        remedy="choose another output path",
    ):
        check_unfinished(partial, HUGGINGFACE_FILES)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_weights(reader, folder.tensors, specs, partial, dtype, shard_bytes, progress)
        except ValueError:  # damage in the source, or a value that the dtype cannot hold
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / CONFIG).write_text(json.dumps(folder.config, indent=2) + "\n")
        os.rename(partial, final)
    return final


def _write_weights(
    reader: CheckpointReader,
    tensors_of: Mapping[str, Sources],
    specs: dict[str, LeafSpec],
    folder: Path,
    dtype: np.dtype | None,
    shard_bytes: int,
    progress: Callable[[str], None] | None,
) -> None:
    shards = list(_shards(tensors_of, specs, dtype, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            source = tensors_of[name]
            assert isinstance(source, Source) and source.rows is None, "a leaf that is a tensor"
            value = reader.read(name)
            value = value if dtype is None else cast(name, value, np.dtype(dtype))
            tensors[source.tensor] = np.ascontiguousarray(value.T if source.transposed else value)
            total += tensors[source.tensor].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        if progress:
            progress(file)
    if len(shards) > 1:
        (folder / WEIGHTS_INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n"
        )


def _shards(
    tensors_of: Mapping[str, Sources],
    specs: dict[str, LeafSpec],
    dtype: np.dtype | None,
    shard_bytes: int,
) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name in tensors_of:
        nbytes = specs[name].size * np.dtype(dtype or specs[name].dtype).itemsize
        if names and held + nbytes > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names
