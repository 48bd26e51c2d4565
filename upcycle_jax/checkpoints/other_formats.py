"""Checkpoints in the formats of other projects: what each takes, and its writer."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.vit.naming import Dialect
from upcycle_jax.checkpoints.vit.writing import write_npz, write_vmoe

NAMES = {"huggingface": "a Hugging Face folder", "npz": "a NumPy archive", "vmoe": "V-MoE's tree"}
"""Formats, in words."""

FLAGS = {
    "huggingface": (
        *("model_type", "reader", "tokenizer", "max_position_embeddings", "dry_run"),
        *("gin_file", "gin_bindings"),
    ),
    "npz": ("model_type", "gin_file", "gin_bindings"),
    "vmoe": ("gin_file", "gin_bindings"),
    "orbax": (),
}
"""Flags that say something, by format; those of Hugging Face folders are all there are."""


def check_flags(to: str, given: Iterable[str]) -> None:
    """Checks that flags say something about the format that is written.

    Args:
      to: the format.
      given: the flags of `FLAGS` that are given, and 'step' and 'optimizer_state'.

    Raises:
      ValueError: one does not.
    """
    flags = set(given)
    if to != "orbax" and flags & {"step", "optimizer_state"}:
        raise ValueError(
            f"{NAMES[to]} holds neither a step nor optimizer state: leave out --step and"
            " --optimizer_state"
        )
    idle = sorted(flags.intersection(FLAGS["huggingface"]).difference(FLAGS[to]))
    if not idle:
        return
    if to == "orbax":
        raise ValueError(
            f"{', '.join(f'--{name}' for name in FLAGS['huggingface'])} say how a Hugging Face"
            " folder is written: leave them out, or add --to huggingface"
        )
    raise ValueError(f"--{idle[0]} says nothing about {NAMES[to]}: leave it out")


def write(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    to: str,
    options: WritingOptions,
    file_bytes: int,
    dry_run: bool,
    progress: Callable[[str], None],
) -> Path:
    """Writes the parameters of a checkpoint in another format.

    Args:
      reader: the checkpoint.
      output: see the writer of the format.
      to: one of `NAMES`.
      options: what is written; archives and V-MoE's files take dtype, model and, as the names that
        arrays have, model_type.
      file_bytes: about how much is held at a time, and written to one file.
      dry_run: of Hugging Face folders alone.
      progress: called with what is said, and with names of files or arrays.

    Raises:
      ValueError: the checkpoint cannot be written so; see the writer of the format.
      FileExistsError: there is something at `output`.
    """
    if to == "huggingface":
        return write_huggingface(
            reader,
            output,
            options=options,
            shard_bytes=file_bytes,
            dry_run=dry_run,
            progress=progress,
        )
    if to == "vmoe":
        return write_vmoe(
            reader,
            output,
            dtype=options.dtype,
            model=options.model,
            shard_bytes=file_bytes,
            progress=progress,
        )
    name = options.model_type or Dialect.BIG_VISION
    if name not in list(Dialect):
        raise ValueError(f"--model_type {name!r} is not among {', '.join(Dialect)}")
    return write_npz(
        reader,
        output,
        dialect=Dialect(name),
        dtype=options.dtype,
        model=options.model,
        progress=progress,
    )
