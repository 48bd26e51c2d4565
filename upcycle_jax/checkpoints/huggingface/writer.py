"""Writes parameters as a Hugging Face folder that transformers and serving engines load."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from upcycle_jax import leases
from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.huggingface.assembly import Tensor, tensors_of
from upcycle_jax.checkpoints.huggingface.base import Export, WritingOptions
from upcycle_jax.checkpoints.huggingface.beside import FILES
from upcycle_jax.checkpoints.huggingface.families import exported
from upcycle_jax.checkpoints.huggingface.files import CONFIG
from upcycle_jax.checkpoints.huggingface.shards import (
    DEFAULT_SHARD_BYTES,
    write_json,
    write_tensors,
)
from upcycle_jax.checkpoints.output import check_unfinished, checked_output
from upcycle_jax.checkpoints.reader import CheckpointReader

_DTYPES = ("float32", "bfloat16", "float16", "float64")
VERDICTS = "verdicts.json"
"""What each reader makes of the folder, as it was predicted."""

_COPIED = "|".join(name.replace(".", r"\.") for name in FILES)
HUGGINGFACE_FILES = rf"config\.json|verdicts\.json|model.*\.(safetensors|json)|{_COPIED}"
"""Names of the files that are written, as a pattern."""


def write_huggingface(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dtype: np.dtype | None = None,
    options: WritingOptions = WritingOptions(),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    dry_run: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes the parameters of a checkpoint as config.json and safetensors. Optimizer state and
    step are left behind.

    Args:
      reader: a model of one of `families`.
      output: a folder that does not exist; it appears when complete.
      dtype: of the tensors; None: that of `options`.
      options: what is written.
      shard_bytes: at most so many bytes are held in memory and written to one file, or one tensor
        if that is larger.
      dry_run: say what would be written and stop.
      progress: called with each line that is to be said before anything is written, and with the
        name of each file written.

    Raises:
      ValueError: the model is of no family that is written, or not as the options want it; a leaf
        is damaged, or the dtype cannot hold a value of it; `output` cannot be written to or lies in
        the source. Nothing is left at `output`.
      FileExistsError: there is something at `output`.
    """
    if dtype is not None:
        options = dataclasses.replace(options, dtype=dtype)
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
    folder = exported(reader, options)
    if options.dtype is None:
        for name, leaf in folder.leaves.items():
            if leaf.spec.dtype.name not in _DTYPES:
                raise ValueError(
                    f"{name} is stored as {leaf.spec}: Hugging Face has {', '.join(_DTYPES)};"
                    " choose one with --dtype"
                )
    tensors = tensors_of(folder, options.dtype)
    if progress:
        for line in folder.said:
            progress(line)
    if dry_run:
        return final
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
            _write(folder, tensors, partial, shard_bytes, progress)
        except ValueError:  # damage in the source, or a value that the dtype cannot hold
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.rename(partial, final)
    return final


def _write(
    folder: Export,
    tensors: Sequence[Tensor],
    place: Path,
    shard_bytes: int,
    progress: Callable[[str], None] | None,
) -> None:
    if folder.verdicts is not None:
        write_json(place / VERDICTS, folder.verdicts)
    for name, source in folder.copied.items():
        if isinstance(source, Path):
            shutil.copyfile(source, place / name)
        else:
            (place / name).write_text(source, encoding="utf-8")
    write_tensors(tensors, place, shard_bytes, progress)
    write_json(place / CONFIG, folder.config)
