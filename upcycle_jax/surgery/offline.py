"""Performs a plan offline: into a checkpoint on disk, streamed, resumable, finished atomically."""

import dataclasses
import math
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import upcycle_jax
from upcycle_jax.checkpoints import CheckpointWriter, chunk_copy, create_checkpoint, model_settings
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader
from upcycle_jax.checkpoints.repeated_rows import has_rows, repeat_rows
from upcycle_jax.checkpoints.stored_sums import BLOCK_BYTES as STORED_BLOCK_BYTES
from upcycle_jax.checkpoints.verification import NonFiniteParameterError
from upcycle_jax.checkpoints.workers import in_order, threads
from upcycle_jax.progress import Meter, Progress
from upcycle_jax.state_tree import STEP, TARGET
from upcycle_jax.surgery.leaf_sums import BLOCK_BYTES, LeafSum, leaf_sums
from upcycle_jax.surgery.leaf_values import RowValues
from upcycle_jax.surgery.operations import Copy, Region, Tile, Zeros
from upcycle_jax.surgery.parents import Reader, source_paths
from upcycle_jax.surgery.plan import Plan, Row
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.surgery.recorded import sealed, source_leaves
from upcycle_jax.surgery.source_chunks import SourceChunks

DEFAULT_MAX_MEMORY = 2 << 30
_ARRAYS_OF_A_SLAB = 3
"""Draws, their scaled form and the result."""


def result_step(plan: Plan, reader: Reader) -> int:
    """The training step of the result."""
    for row in plan.rows:
        if row.target == STEP:
            return int(RowValues(row, reader, plan.recipe.seed).region(()))
    return (
        0
        if plan.recipe.step == "reset"
        else plan.recipe.step
        if isinstance(plan.recipe.step, int)
        else reader.step
    )


def record(plan: Plan, reader: Reader) -> dict[str, Any]:
    """What a converted checkpoint says about its making: recipe, seed, source and versions. The
    same call gives the same record.
    """
    return {
        "surgery": {
            "recipe": to_json(plan.recipe),
            "seed": plan.recipe.seed,
            "source": str(getattr(reader, "path", "")),
            "sources": source_paths(reader),
            "source_format": str(getattr(reader, "format", "")),
            "source_step": int(reader.step),
            "source_fingerprint": reader.fingerprint(),
            "versions": {
                "upcycle_jax": upcycle_jax.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        },
        **model_settings.record(model_settings.stated_by(reader)),
    }


def used_leaves(plan: Plan) -> set[str]:
    """The distinct source leaves that go into a result."""
    return {name for row in plan.rows for name in row.sources}


def apply_offline(
    plan: Plan,
    reader: Reader,
    output_path: os.PathLike | str,
    *,
    max_memory: int = DEFAULT_MAX_MEMORY,
    materialize: bool = False,
    compress: bool = True,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Writes the plan's result as a checkpoint, leaf by leaf, chunk by chunk.

    Leaves that only move bytes out of an Orbax checkpoint are not decoded: where the file system
    and the library allow it (this is tried, at a small scale), all experts refer to the one stored
    copy of a dense chunk, and otherwise encoded chunks are copied as they are. In the end every
    source leaf is read for its checksums, of its values and of its stored bytes, which the result
    records: damage in chunks that both share would otherwise change both sides alike.

    Nothing stands at `output_path` before everything is written; a call that was killed is finished
    by the same call, and what it had written already is not written again.

    Args:
      plan: what to do.
      reader: the source; it is only read.
      output_path: folder of the new checkpoint, e.g. `MODEL_DIR/checkpoint_1000`.
      max_memory: bytes of arrays to hold at a time. The floor is a few times the largest matrix
        where random numbers are drawn, and a few stored chunks elsewhere.
      materialize: write every byte, so that the result shares no file with the source.
      compress: store chunks with zstd (as Orbax does) or raw.
      metadata: further entries for the checkpoint's record.
      progress: called with a line of text about every second.

    Returns:
      The path of the checkpoint.

    Raises:
      FileExistsError: there is something at `output_path`.
      ValueError: a partial checkpoint of another plan lies there; `max_memory` is too small to work
        with; a source leaf cannot be read.
      NonFiniteParameterError: parameters of the source are NaN or infinite; nothing is kept.
      OSError: the disk is full or cannot be written. What was written is kept for the next call.
    """
    if max_memory < 16 << 20:
        raise ValueError(
            f"max_memory {max_memory} is less than 16 MiB: chunks could not be held; raise it"
        )
    chunk_bytes = min(64 << 20, max_memory // 16)
    shared = shared_chunks(plan, reader, output_path, materialize=materialize)
    if progress is not None:
        progress(shared.reason)
    begun = {**record(plan, reader), **(metadata or {})}
    writer = create_checkpoint(
        output_path,
        plan.specs(),
        step=result_step(plan, reader),
        metadata=begun,
        layouts=(
            chunk_copy.copied_layouts(reader, shared.references, plan.specs())
            if isinstance(reader, OrbaxReader)
            else None
        ),
        chunk_bytes=chunk_bytes,
        pending_bytes=max_memory // 8,
        compress=compress,
    )
    with writer:
        try:
            begun["surgery"]["leaves"] = _checked_source(plan, reader, max_memory, progress)
        except NonFiniteParameterError:
            writer.discard()
            raise
        if shared.references and isinstance(reader, OrbaxReader):
            chunk_copy.copy_leaves(
                writer, reader, shared.references, shared.mode, read_before=True, progress=progress
            )
        made = [
            row for row in plan.rows if row.target != STEP and row.target not in shared.references
        ]  # The writer stores the step itself.
        repeated = {
            row.target: range(row.spec.shape[0])
            for row in made
            if isinstance(row.operation, Tile) and has_rows(writer, row.target)
        }
        meter = Meter(
            sum(row.bytes_written // len(repeated.get(row.target, [0])) for row in made), progress
        )

        def write(row: Row) -> None:
            values = RowValues(row, reader, plan.recipe.seed)
            by_expert = writer.layout(row.target).chunks[:1] == (1,)
            if row.operation.stacked and values.whole_slabs and by_expert:
                _write_slabs(values, writer, meter, limit=max_memory // 4)
            else:
                _write_regions(values, writer, meter, first_expert_only=row.target in repeated)

        # Repeated ones first, so that the files that hold their chunks hold nothing else.
        for row in made:
            if row.target in repeated:
                write(row)
        repeat_rows(writer, repeated, progress)
        for row in made:
            if row.target not in repeated:
                write(row)
        writer.flush()
        meter.finish()
        return str(writer.finalize(sealed(begun)))


def _checked_source(
    plan: Plan, reader: Reader, max_memory: int, progress: Progress | None
) -> dict[str, Any]:
    """Reads every leaf of the source, and gives what the result records of them.

    Raises:
      ValueError: a leaf that the plan uses cannot be read.
      NonFiniteParameterError: parameters that it uses are NaN or infinite.
    """
    if progress is not None:
        progress("reading the source for its checksums")
    block_bytes = min(BLOCK_BYTES, max_memory // (4 * threads()))
    specs = reader.specs()
    stored = SourceChunks(reader).sums(
        specs, block_bytes=min(STORED_BLOCK_BYTES, block_bytes), progress=progress
    )
    sums = leaf_sums(reader, specs, block_bytes=block_bytes, progress=progress)
    for name in used_leaves(plan):
        if sums[name].problem:
            raise ValueError(f"source leaf {name} cannot be read: {sums[name].problem}")
    damaged = not_finite(plan, sums)
    if damaged:
        raise NonFiniteParameterError(
            f"{', '.join(source_paths(reader))}: {damaged}. Nothing was written: convert another"
            " checkpoint"
        )
    return source_leaves(specs, sums, stored)


def not_finite(plan: Plan, sums: Mapping[str, LeafSum]) -> str:
    """Which parameters of the source that go into the result have NaN or infinite values; '' if
    none has.
    """
    used = {name for row in plan.rows if row.target.startswith(TARGET) for name in row.sources}
    bad = sorted(name for name in used if sums[name].nonfinite)
    if not bad:
        return ""
    more = f" ({len(bad) - 1} more have such)" if len(bad) > 1 else ""
    return f"the parameter {bad[0]} has {sums[bad[0]].nonfinite} NaN or infinite values{more}"


@dataclasses.dataclass(frozen=True)
class SharedChunks:
    """The leaves whose stored chunks are taken over without decoding.

    Attributes:
      references: target leaf -> where its chunks come from.
      mode: by reference, or as encoded bytes.
      reason: one line that says why.
    """

    references: dict[str, chunk_copy.Reference]
    mode: chunk_copy.CopyMode
    reason: str


def shared_chunks(
    plan: Plan, reader: Reader, output_path: os.PathLike | str, *, materialize: bool = False
) -> SharedChunks:
    """Finds out which leaves can be taken over chunk by chunk, and how."""
    references = {}
    for row in plan.rows:
        if row.moves_bits and isinstance(row.operation, Copy | Tile) and row.target != STEP:
            experts = tuple(range(row.spec.shape[0])) if row.operation.stacked else None
            references[row.target] = chunk_copy.Reference(row.sources[0], experts)
    encoded = chunk_copy.CopyMode.ENCODED
    if not isinstance(reader, OrbaxReader) or not references:
        return SharedChunks({}, encoded, "every leaf is read and written")
    if materialize:
        try:
            chunk_copy.copied_layouts(reader, references, plan.specs())
        except (ValueError, KeyError) as error:
            return SharedChunks({}, encoded, f"every leaf is read and written: {error.args[0]}")
        return SharedChunks(
            references,
            encoded,
            f"{len(references)} leaves are written as the source's encoded chunks, sharing no file",
        )
    found = chunk_copy.probe(reader, output_path, references, plan.specs())
    if found.possible:
        return SharedChunks(
            references,
            chunk_copy.CopyMode.REFERENCE,
            f"{len(references)} leaves refer to stored chunks: {found.reason}",
        )
    return SharedChunks({}, encoded, f"every leaf is read and written: {found.reason}")


def _write_slabs(values: RowValues, writer: CheckpointWriter, meter: Meter, *, limit: int) -> None:
    """Writes a leaf whose values can only be had an expert at a time, and which is stored so.
    Several experts are made at a time, while those before them are encoded; what an earlier call
    wrote is not made again.

    Args:
      limit: bytes of the experts that are made at a time.
    """
    row = values.row
    lacking: dict[int, list[Region]] = {}
    for region in writer.pieces(row.target):
        if writer.is_written(row.target, region):
            meter.add(_nbytes(row, region), row.target)
        else:
            lacking.setdefault(region[0].start, []).append(region)
    if not lacking:
        return
    values.prepare()
    held = _ARRAYS_OF_A_SLAB * 4 * (row.spec.size // row.spec.shape[0])
    slabs = in_order(values.slab, lacking, nbytes=lambda expert: held, limit=limit)
    for regions, slab in zip(lacking.values(), slabs, strict=True):
        for region in regions:
            writer.write(row.target, region, slab[None, *region[1:]])
            meter.add(_nbytes(row, region), row.target)


def _write_regions(
    values: RowValues, writer: CheckpointWriter, meter: Meter, *, first_expert_only: bool
) -> None:
    """Writes a leaf piece by piece; pieces that an earlier call wrote are skipped."""
    row = values.row
    regions = list(writer.pieces(row.target))
    if first_expert_only:
        regions = [region for region in regions if region[0].start == 0]
    for region in values.order(regions):
        shape = [s.stop - s.start for s in region]
        if not writer.is_written(row.target, region):
            if isinstance(row.operation, Zeros):
                writer.write(row.target, region, np.zeros(shape, row.spec.dtype))
            else:
                writer.write(row.target, region, values.region(region))
        meter.add(_nbytes(row, region), row.target)


def _nbytes(row: Row, region: Region) -> int:
    """Bytes of a part of a leaf."""
    return math.prod(s.stop - s.start for s in region) * row.spec.dtype.itemsize
