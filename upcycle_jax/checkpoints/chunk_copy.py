"""Copies leaves between Orbax checkpoints without decoding them: by reference where that is
possible, else as encoded chunks, of which further experts get copies of the files
(`repeated_rows`).

An OCDBT database maps keys to (file, offset, length). A chunk of a dense `[d, f]` array has the
same bytes as the chunk `[1, d, f]` of an `[E, d, f]` array with the same codec, so all E experts
can point at the one stored copy: the dense data files are hard-linked into the output and the keys
are copied with the call that Orbax uses to merge the databases of its processes. The source is
never written to.
"""

import dataclasses
import enum
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorstore as ts

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.ocdbt import DATA_FOLDERS, MANIFEST
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader
from upcycle_jax.checkpoints.output import REFERENCED, probe_folder
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.repeated_rows import bring_copy, copy_keys, refer, repeat_rows
from upcycle_jax.checkpoints.writer import CheckpointWriter
from upcycle_jax.progress import Progress
from upcycle_jax.trees import LeafSpec


class CopyMode(enum.Enum):
    """How the bytes of a copied leaf get into the output.

    REFERENCE: the output points at the source's chunks, whose files it shares by hard links (or
    holds one copy of). ENCODED: every chunk is written, without being decoded.
    """

    REFERENCE = "reference"
    ENCODED = "encoded"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the values of a target leaf come from.

    Attributes:
      source: the leaf of the source checkpoint.
      experts: positions along the target's leading axis that hold the source array; None where the
        target is the source array itself.
    """

    source: str
    experts: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """Whether copying by reference works here.

    Attributes:
      possible: whether `copy_leaves` with `CopyMode.REFERENCE` will work.
      reason: why not; or what it takes.
      linked: whether the dense data files are shared by hard links rather than copied once.
    """

    possible: bool
    reason: str
    linked: bool = False


def copied_layouts(
    source: OrbaxReader, references: Mapping[str, Reference], specs: Mapping[str, LeafSpec]
) -> dict[str, storage.ZarrLayout]:
    """The layouts that target leaves must have so that the source's chunks fit: for
    `create_checkpoint(layouts=...)`.

    Raises:
      ValueError: a target leaf differs from its source in shape or dtype, or the source is stored
        as zarr 3.
    """
    layouts = {}
    for name, reference in references.items():
        layout, spec = source.zarr_layout(reference.source), specs[name]
        if reference.experts is not None:
            if not layout.shape:
                raise ValueError(
                    f"{name}: the scalar {reference.source} has no stored chunk that could become"
                    " an expert's"
                )
            count = spec.shape[0] if spec.shape else 0
            if not set(reference.experts) <= set(range(count)):
                raise ValueError(
                    f"{name}: experts {reference.experts} do not exist in a leaf of shape"
                    f" {spec.shape}"
                )
            layout = dataclasses.replace(
                layout, shape=(count, *layout.shape), chunks=(1, *layout.chunks)
            )
        if (layout.shape, layout.numpy_dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{name}: {spec} cannot be copied from {source.specs()[reference.source]}"
                f" ({reference.source})"
            )
        layouts[name] = layout
    return layouts


def probe(
    source: CheckpointReader,
    output: os.PathLike | str,
    references: Mapping[str, Reference],
    specs: Mapping[str, LeafSpec],
) -> Probe:
    """Finds out, by trying at a small scale, whether `references` can be made from `source` at
    `output`.

    Nothing is left behind, also not by earlier calls that were killed, and the source is only read.
    """
    if not isinstance(source, OrbaxReader) or not source.uses_ocdbt or source.uses_zarr3:
        stored = (
            "zarr 3" if isinstance(source, OrbaxReader) and source.uses_zarr3 else source.format
        )
        return Probe(
            False,
            "only Orbax checkpoints in OCDBT with zarr 2 arrays have chunks that can be shared;"
            f" this one is {stored}",
        )
    if not storage.is_local(source.item) or not storage.is_local(output):
        return Probe(False, "files can be shared on a local file system only, not in a bucket")
    try:
        copied_layouts(source, references, specs)
    except (ValueError, KeyError) as error:
        return Probe(False, str(error.args[0]))
    parent = Path(storage.absolute(output)).parent
    while not parent.exists():
        parent = parent.parent
    try:
        with probe_folder(parent) as folder:
            problem = _try_copy(folder / "databases")
            linked = _can_link(Path(source.item) / MANIFEST, folder / "link")
    except OSError as error:
        return Probe(False, f"{parent} cannot be written to: {error.strerror}")
    if problem:
        return Probe(
            False,
            "the installed tensorstore does not copy keys between databases by reference:"
            f" {problem}",
        )
    if not linked:
        return Probe(
            True,
            "the output is on another file system, or files cannot be linked: the dense data files"
            " are copied once",
        )
    return Probe(True, "the dense data files are shared by hard links", linked=True)


def _try_copy(folder: Path) -> str:
    """What goes wrong when a key is copied between two tiny databases; empty when it works."""
    context = storage.new_context()
    value = os.urandom(4096)  # Above the inline limit, so that the copy must be a reference.
    try:
        outer = ts.KvStore.open(storage.ocdbt_spec(folder, create=True), context=context).result()
        inner = ts.KvStore.open(
            storage.ocdbt_spec(folder / REFERENCED, create=True), context=context
        ).result()
        inner.write("a/0", value).result()
        copy_keys(inner / "a/", outer / "b/3.").result()
        copied = outer.read("b/3.0").result().value
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        return str(error)
    size = sum(path.stat().st_size for path in (folder / "d").glob("*"))
    if copied != value:
        return "the copy reads back different bytes"
    return "the bytes were written again instead of referenced" if size >= len(value) else ""


def _can_link(existing: Path, link: Path) -> bool:
    try:
        os.link(os.path.realpath(existing), link)  # Of a link, the file: the result holds no links.
    except OSError:
        return False
    return True


def copy_leaves(
    writer: CheckpointWriter,
    source: OrbaxReader,
    references: Mapping[str, Reference],
    mode: CopyMode,
    *,
    read_before: bool = False,
    progress: Progress | None = None,
) -> None:
    """Puts the chunks of `references` into the output. Whatever an interrupted call did already is
    skipped.

    Args:
      writer: begun with the layouts of `copied_layouts`.
      source: the checkpoint to copy from.
      references: target leaf -> where it comes from.
      mode: see `CopyMode`; `probe` says whether REFERENCE works.
      read_before: the caller has read every leaf. Otherwise ENCODED decodes each chunk as well:
        encoded bytes say nothing of damage.
      progress: called with a line of text about every second.

    Raises:
      ValueError: the writer was begun with other layouts; or a chunk is missing in the source, or
        damaged.
      OSError: the disk is full or cannot be written.
    """
    for name, layout in copied_layouts(source, references, writer.specs).items():
        if writer.layout(name) != layout:
            raise ValueError(
                f"{name}: the output was begun with chunks or a codec other than the source's; pass"
                " `copied_layouts` to it"
            )
    todo = {
        name: reference
        for name, reference in references.items()
        if not all(
            writer.is_written(name, index) for index in _parts(reference, writer.specs[name])
        )
    }
    if not todo:
        return
    if mode is CopyMode.REFERENCE:
        _copy_by_reference(writer, source, todo)
    else:
        _copy_encoded(writer, source, todo, read_before, progress)


def _parts(reference: Reference, spec: LeafSpec) -> Iterator[tuple[slice, ...]]:
    if reference.experts is None:
        yield tuple(slice(0, size) for size in spec.shape)
    else:
        yield from ((slice(expert, expert + 1),) for expert in reference.experts)


def _copy_by_reference(
    writer: CheckpointWriter, source: OrbaxReader, references: Mapping[str, Reference]
) -> None:
    folder = writer.state / f"{REFERENCED}.{source.fingerprint().rpartition(':')[2][:12]}"
    with writer.explained():
        _bring_files(Path(source.item), folder)
    links = []
    for name, reference in references.items():
        key = writer.key(name)
        prefixes = (
            [""]
            if reference.experts is None
            else [f"{expert}{writer.layout(name).separator}" for expert in reference.experts]
        )
        origin = f"{source.key(reference.source)}/"
        links += [(folder, origin, f"{key}/{prefix}") for prefix in prefixes]
    refer(writer, links)
    _require_complete(writer, source, references)


def _require_complete(
    writer: CheckpointWriter, source: OrbaxReader, references: Mapping[str, Reference]
) -> None:
    for name, reference in references.items():
        if not all(
            writer.is_written(name, index) for index in _parts(reference, writer.specs[name])
        ):
            raise ValueError(
                f"{source.item}: chunks of {reference.source} are missing, so the source is"
                f" damaged; {name} could not be made"
            )


def _bring_files(source: Path, folder: Path) -> None:
    """Links (or copies) the data files of the database `source` into `folder`, and copies its
    manifest.
    """
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        place = folder / relative
        if not path.is_file() or not (
            path.parent.name in DATA_FOLDERS or relative == Path(MANIFEST)
        ):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        # Data files never change once written, so a link to them is safe; the manifest may be
        # replaced.
        if relative == Path(MANIFEST) or place.exists() or not _can_link(path, place):
            bring_copy(path, place)


def _copy_encoded(
    writer: CheckpointWriter,
    source: OrbaxReader,
    references: Mapping[str, Reference],
    read_before: bool,
    progress: Progress | None,
) -> None:
    """Experts first, so that the files that hold their chunks hold nothing else: all but one are
    copies of those.
    """
    stacked = {name: found.experts for name, found in references.items() if found.experts}
    for name, experts in stacked.items():
        prefix = f"{experts[0]}{writer.layout(name).separator}"
        _write_encoded(writer, source, name, references[name].source, prefix, read_before)
    repeat_rows(writer, stacked, progress)
    for name, reference in references.items():
        if name not in stacked:
            _write_encoded(writer, source, name, reference.source, "", read_before)
    writer.flush()


def _write_encoded(
    writer: CheckpointWriter,
    source: OrbaxReader,
    name: str,
    origin: str,
    prefix: str,
    read_before: bool,
) -> None:
    """Puts the chunks of the source's leaf `origin` below those keys of `name` that begin with
    `prefix`; not those that are there.
    """
    layout = source.zarr_layout(origin)
    for position in storage.positions(layout.grid):
        chunk = layout.key(position)
        if writer.is_stored(name, prefix + chunk):
            continue
        if not read_before:
            source.read(origin, layout.region(position))
        result = source.store.read(f"{source.key(origin)}/{chunk}").result()
        if result.state != "value":
            raise ValueError(
                f"{source.item}: chunk {chunk} of {origin} is missing, so the source is damaged"
            )
        writer.write_encoded(name, {prefix + chunk: result.value})
