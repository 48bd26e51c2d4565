"""Copies a checkpoint of any readable format into the Orbax layout, leaf by leaf, without changing
the model.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints import model_settings, storage
from upcycle_jax.checkpoints.casting import OverflowingCast, cast
from upcycle_jax.checkpoints.chunk_copy import CopyMode, Reference, copied_layouts, copy_leaves
from upcycle_jax.checkpoints.formats import open_checkpoint
from upcycle_jax.checkpoints.huggingface.beside import carry
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader
from upcycle_jax.checkpoints.output import checked_output, tidy_finished
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.writer import (
    DEFAULT_CHUNK_BYTES,
    CheckpointWriter,
    create_checkpoint,
)
from upcycle_jax.state_tree import STATE, STEP, TARGET
from upcycle_jax.step_names import step_name, step_of
from upcycle_jax.trees import LeafSpec


def checkpoint_path(output: os.PathLike | str, step: int) -> Path:
    """The folder of a step: `output` itself where it is named `checkpoint_<step>`, else that folder
    inside it.

    Raises:
      ValueError: `output` is named for another step.
    """
    path = Path(storage.absolute(output))
    named = step_of(path.name)
    if named is None:
        return path / step_name(step)
    if named != step:
        raise ValueError(
            f"{path} is named for step {named}, but the step to record is {step}: rename"
            " it or give the step"
        )
    return path


def convert_to_orbax(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    step: int | None = None,
    dtype: np.dtype | None = None,
    keep_optimizer: bool = True,
    fresh_state: Mapping[str, LeafSpec] | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_memory: int = 1 << 30,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes every leaf of `reader` as an Orbax checkpoint in T5X's layout.

    Args:
      reader: the source.
      output: `checkpoint_<step>`, or a folder to hold it. An interrupted call is resumed by the
        same call.
      step: step to record; None keeps the source's.
      dtype: dtype of the floating-point parameters; None keeps each one's own. Optimizer state
        keeps its dtypes.
      keep_optimizer: copy the optimizer state where the source has one.
      fresh_state: leaves under `state/` to add as zeros.
      metadata: more to record beside the source's path, format and fingerprint.
      max_memory: about how many bytes to hold at a time; a source chunk larger than this is still
        read whole.
      progress: called with the name of each leaf.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: the options contradict each other or the output's name; the output cannot be
        written, or lies in the source; a leaf of the source is missing or damaged; or `dtype`
        cannot hold a value (`OverflowingCast`), in which case nothing is left at the output.
      FileExistsError: the output exists.
      OSError: the output cannot be written.
    """
    checked_output(output)
    step = reader.step if step is None else step
    place = checked_output(checkpoint_path(output, step), [reader.path])
    sources = {
        name: spec
        for name, spec in reader.specs().items()
        if name != STEP and (keep_optimizer or not name.startswith(STATE))
    }
    targets = {
        name: dataclasses.replace(spec, dtype=_dtype_of(name, spec, dtype))
        for name, spec in sources.items()
    }
    clash = sorted(set(fresh_state or {}) & set(targets))
    if clash:
        raise ValueError(
            f"{clash[0]} is in the source already: either keep the optimizer state or start it"
            " afresh"
        )
    record = {
        "source": {
            "path": str(reader.path),
            "format": reader.format,
            "fingerprint": reader.fingerprint(),
        },
        **model_settings.record(reader.model_settings()),
        **model_settings.record_config(reader.model_config()),
        **(metadata or {}),
    }
    raw = _copied_as_stored(reader, sources, targets)
    layouts = (
        copied_layouts(reader, raw, targets) if isinstance(reader, OrbaxReader) and raw else {}
    )
    specs = {**targets, **(fresh_state or {})}
    if place.exists() and tidy_finished(place):
        found = open_checkpoint(place)
        if found.metadata() == record and found.step == step:
            carry(reader, place)
            return place  # This very call was killed between its last rename and its end.
    begun = create_checkpoint(
        place,
        specs,
        step=step,
        metadata=record,
        layouts=layouts,
        chunk_bytes=max(1, min(DEFAULT_CHUNK_BYTES, max_memory // 8)),
        pending_bytes=max_memory // 4,
    )
    with begun as writer, _discarded_on_overflow(writer):
        if isinstance(reader, OrbaxReader):
            copy_leaves(writer, reader, raw, CopyMode.ENCODED)
        for name, spec in specs.items():
            if progress:
                progress(name)
            whole = tuple(slice(0, size) for size in spec.shape)
            for index in [whole] if spec.nbytes <= max_memory // 4 else writer.pieces(name):
                if writer.is_written(name, index):
                    continue
                shape = tuple(part.stop - part.start for part in index)
                value = (
                    cast(name, reader.read(name, index), spec.dtype, index)
                    if name in sources
                    else np.zeros(shape, spec.dtype)
                )
                writer.write(name, index, value)
        result = writer.finalize()
    for line in carry(reader, result):
        if progress:
            progress(line)
    return result


@contextlib.contextmanager
def _discarded_on_overflow(writer: CheckpointWriter) -> Iterator[None]:
    """The same call can never finish what it began: nothing of it is kept."""
    try:
        yield
    except OverflowingCast:
        writer.discard()
        raise


def _dtype_of(name: str, spec: LeafSpec, dtype: np.dtype | None) -> np.dtype:
    # bfloat16 is no subtype of np.floating; its kind is 'V', as for other ml_dtypes.
    is_float = spec.dtype.kind == "f" or spec.dtype.name == "bfloat16"
    return (
        np.dtype(dtype)
        if dtype is not None and name.startswith(TARGET) and is_float
        else spec.dtype
    )


def _copied_as_stored(
    reader: CheckpointReader, sources: Mapping[str, LeafSpec], targets: Mapping[str, LeafSpec]
) -> dict[str, Reference]:
    """The leaves whose stored chunks can be copied without decoding them."""
    if not isinstance(reader, OrbaxReader) or reader.uses_zarr3:
        return {}
    return {
        name: Reference(name) for name, spec in sources.items() if spec.dtype == targets[name].dtype
    }
