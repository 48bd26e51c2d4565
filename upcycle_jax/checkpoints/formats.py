"""Finds out what a path holds and opens it."""

import os
import re

from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.gguf.files import SUFFIX
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader, find_item
from upcycle_jax.checkpoints.reader import CheckpointReader, ReaderBase
from upcycle_jax.checkpoints.steps import checkpoint_steps, latest_checkpoint
from upcycle_jax.checkpoints.vit.arrays import TreeArrays
from upcycle_jax.checkpoints.vit.names import prefix_of
from upcycle_jax.checkpoints.vit.npz import NpzArrays
from upcycle_jax.checkpoints.vit.reader import TreeReader
from upcycle_jax.checkpoints.vit.vmoe import INDEX as VMOE_INDEX
from upcycle_jax.checkpoints.vit.vmoe import VMoeFiles
from upcycle_jax.checkpoints.vit.zarr_folder import ZarrFolder, is_zarr_folder, newest
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import TARGET

SUPPORTED = (
    "an Orbax checkpoint (checkpoint_<step>/ with state/_METADATA), a MODEL_DIR that holds such"
    " folders, a T5X folder with a msgpack file named 'checkpoint', a single T5X msgpack file, a"
    " Hugging Face folder (config.json with model.safetensors), a GGUF file or a folder with one,"
    " or a vision transformer in a NumPy archive (.npz), in a folder of big_vision's, or in the"
    " files PREFIX.index and PREFIX.data-* of V-MoE"
)
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
PARTIAL_SUFFIX = ".partial"
_DATA_FILE = re.compile(r"[0-9a-f]{32}")  # as an OCDBT database names its files in the folder d


def is_unfinished(path: epath.Path) -> bool:
    """Whether the name says that a save or a conversion never finished."""
    return ORBAX_TEMPORARY in path.name or path.name.endswith((PARTIAL_SUFFIX, ".partial_save"))


def open_checkpoint(path: os.PathLike | str) -> CheckpointReader:
    """Opens a checkpoint of any supported format for reading. No array is read.

    Args:
      path: `checkpoint_<step>`, a MODEL_DIR (its latest finished step), a T5X legacy folder or
        msgpack file, a Hugging Face folder, a GGUF file or a folder with one, or a vision
        transformer in a NumPy archive, in a folder of big_vision's or in files of V-MoE's, whose
        prefix is named.

    Raises:
      FileNotFoundError: nothing is there; a half-written checkpoint beside it is named.
      ValueError: it is half-written, damaged, not to be trusted or of no supported format: the
        message says what was found and what is supported.
    """
    place = storage.absolute(path)
    try:
        return _open(place)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{printable(error.filename or place)} cannot be read: {error.strerror or error}"
        ) from None


def _open(place: epath.Path) -> CheckpointReader:
    if is_unfinished(place):
        raise ValueError(
            f"{place} is a half-written checkpoint: let the command that writes it finish, or open"
            " another step"
        )
    if not place.exists():
        named = _named_by_prefix(place)
        if named is None:
            raise FileNotFoundError(_nothing_there(place))
        return named
    if place.is_file():
        return _open_file(place)
    names = sorted(child.name for child in place.iterdir())
    if "config.json" in names:
        return _open_huggingface(place, names)
    models = [name for name in names if name.endswith(SUFFIX)]
    if models:
        return _open_gguf_folder(place, models)
    if "checkpoint" in names and (place / "checkpoint").is_file():
        return _open_legacy(place)
    item = find_item(place)
    if item is not None:
        if (
            not storage.is_local(place)
            and item != place
            and not (place / "commit_success.txt").exists()
        ):
            raise ValueError(
                f"{place} has no commit_success.txt: the save never finished. Open another step"
            )
        return _as_vision(OrbaxReader(place, item))
    if is_zarr_folder(names):
        return TreeReader(ZarrFolder(place))
    latest = latest_checkpoint(place)
    if latest is not None:
        return _open(latest)
    raise ValueError(_unknown(place, names))


def _open_file(place: epath.Path) -> CheckpointReader:
    from upcycle_jax.checkpoints.t5x_legacy import T5XLegacyReader

    if place.name.endswith(SUFFIX):
        return _open_gguf(place)
    if place.name.endswith(".npz"):
        return TreeReader(NpzArrays(place))
    if place.name.endswith(VMOE_INDEX):
        return TreeReader(VMoeFiles(place))
    if place.name == "checkpoint" and any(child.is_dir() for child in place.parent.iterdir()):
        # The index of a folder, named directly.
        return _as_vision(T5XLegacyReader(place.parent, place))
    return _as_vision(T5XLegacyReader(place, place))


def _named_by_prefix(place: epath.Path) -> CheckpointReader | None:
    """The checkpoint whose files' names begin with that of a path, which is none itself."""
    if place.with_name(place.name + VMOE_INDEX).exists():
        return TreeReader(VMoeFiles(place))
    last = newest(place)
    return None if last is None else _open(last)


def _as_vision(reader: ReaderBase) -> CheckpointReader:
    """The reader itself; that of a vision transformer where its tree is one under the names of
    other projects.
    """
    names = reader.names()
    if any(name.startswith(TARGET) for name in names) or prefix_of(names) is None:
        return reader
    return TreeReader(TreeArrays(reader))


def _open_legacy(place: epath.Path) -> CheckpointReader:
    from upcycle_jax.checkpoints.t5x_legacy import T5XLegacyReader

    return _as_vision(T5XLegacyReader(place, place / "checkpoint"))


def _open_huggingface(place: epath.Path, names: list[str]) -> CheckpointReader:
    from upcycle_jax.checkpoints.huggingface import HuggingFaceReader

    return HuggingFaceReader(place)


def _open_gguf(place: epath.Path) -> CheckpointReader:
    from upcycle_jax.checkpoints.gguf.reader import GgufReader

    return GgufReader(place)


def _open_gguf_folder(place: epath.Path, models: list[str]) -> CheckpointReader:
    if len(models) > 1:
        raise ValueError(
            f"{place} holds {len(models)} GGUF files ({printable(', '.join(models[:5]))}"
            f"{', ...' if models[5:] else ''}): name the one to read"
        )
    return _open_gguf(place / models[0])


def _nothing_there(place: epath.Path) -> str:
    message = f"{place} does not exist"
    parent = place.parent
    if not parent.is_dir():
        return f"{message}, nor does the folder around it. Expected {SUPPORTED}"
    unfinished = sorted(
        child.name
        for child in parent.iterdir()
        if child.name.startswith(place.name) and is_unfinished(child)
    )
    if unfinished:
        return (
            f"{message}; beside it lies {', '.join(unfinished)}, a save that did not finish. Run"
            " the command that writes it again"
        )
    steps = checkpoint_steps(parent)
    beside = f" The folder around it has the steps {', '.join(map(str, steps))}." if steps else ""
    return f"{message}.{beside} Expected {SUPPORTED}"


def _unknown(place: epath.Path, names: list[str]) -> str:
    half = [
        name
        for name in names
        if name.startswith("ocdbt.process_") or name in ("array_metadatas", "manifest.ocdbt")
    ] or [child for child in (place / "d").glob("*") if _DATA_FILE.fullmatch(child.name)]
    inner = [
        name
        for name in names
        if (place / name).is_dir() and list((place / name).glob("ocdbt.process_*"))
    ]
    if half or inner:
        return (
            f"{place} is a half-written or half-copied Orbax checkpoint (no _METADATA): open"
            " another step, or copy it again"
        )
    unfinished = [name for name in names if is_unfinished(epath.Path(name))]
    if unfinished:
        return (
            f"{place} holds no finished checkpoint, only {', '.join(unfinished)}: let the save"
            " finish or name another folder"
        )
    found = (
        f"found {printable(', '.join(names[:8]))}{' ...' if len(names) > 8 else ''}"
        if names
        else "the folder is empty"
    )
    return f"{place} is no checkpoint that can be read ({found}). Supported: {SUPPORTED}"
