"""Cached images on disk: files in ArrayRecord, or their pixels in plain files, read one by one in
any order, without TensorFlow.

    <cache folder>/<task>/images.json                          what was cached, with counts and
    sha256
                         /<split>-00000-of-00004.array_record  files, one a record; or
                         /<split>-00000-of-00004.pixels        uint8 [H, W, c], one after another
                         /<split>.labels.npy                   int32 [N]
                         /<split>.shapes.npy                   of pixels: int32 [N, 3], H, W and c

The manifest is written last and the task's folder renamed into place after it, so a folder with its
name is whole.
"""

import bisect
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import msgpack
import numpy as np

from upcycle_jax import data_folders
from upcycle_jax.data.cache.format import FileEntry, digest, find_folder, sha256_of_file, write_json
from upcycle_jax.data.images import scaling
from upcycle_jax.data.images.config import AUTOMATIC, ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.data.images.encoded import EncodedImages
from upcycle_jax.data.images.named import cache_command
from upcycle_jax.features.images import IMAGE

FILES, PIXELS = 1, 2
"""Formats."""
MANIFEST = "images.json"
_LONGEST_SIDE = 1 << 27
_OF_PIXELS = ("shorter_side", "shapes")
"""Fields of a manifest that only PIXELS have: that of FILES reads as before there were any."""


def _fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name not in _OF_PIXELS or value is not None}


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """The images of one split: their files in order, the file of labels and, of PIXELS, that of
    shapes.
    """

    files: Sequence[FileEntry]
    labels: FileEntry
    shapes: FileEntry | None = None

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        """All files."""
        return (*self.files, self.labels, *(() if self.shapes is None else (self.shapes,)))

    @property
    def count(self) -> int:
        """N."""
        return sum(file.records for file in self.files)


@dataclasses.dataclass(frozen=True)
class ImageManifest:
    """What a cache of images is.

    Attributes:
      task: its name.
      identity: what the images were read from.
      num_classes: labels are below it.
      classes: their names, where they have any.
      splits: by name.
      format: FILES or PIXELS.
      shorter_side: of PIXELS: see `ImageDatasetConfig`; None of FILES.
    """

    task: str
    identity: Mapping[str, Any]
    num_classes: int
    classes: Sequence[str] | None
    splits: Mapping[str, ImageSplit]
    format: int = FILES
    shorter_side: int | None = None

    def write(self, folder: pathlib.Path) -> None:
        """Writes it into the task's folder."""
        write_json(folder / MANIFEST, dataclasses.asdict(self, dict_factory=_fields))

    @classmethod
    def read(cls, folder: pathlib.Path, *, remedy: str) -> "ImageManifest":
        """Reads a manifest and checks that every file is there and as long as it was written.

        Raises:
          ValueError: the manifest or a file is damaged, missing, or of another version.
        """
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.get("format") not in (FILES, PIXELS):
                raise ValueError(
                    f"it has format {fields.get('format')!r}, this version reads {FILES} and"
                    f" {PIXELS}"
                )
            has_pixels, side = fields["format"] == PIXELS, fields.get("shorter_side")
            if has_pixels != (isinstance(side, int) and side > 0):
                raise ValueError(f"its shorter_side is {side!r}")
            splits = {
                name: ImageSplit(
                    tuple(FileEntry(**file) for file in entry["files"]),
                    FileEntry(**entry["labels"]),
                    FileEntry(**entry["shapes"]) if has_pixels else None,
                )
                for name, entry in fields["splits"].items()
            }
            found = cls(**{**fields, "splits": splits})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
        for split in splits.values():
            for entry in split.entries:
                if pathlib.PurePath(entry.name).name != entry.name:
                    raise ValueError(
                        f"{path} names the file {entry.name!r}, which is no file beside it:"
                        f" {remedy}"
                    )
                file = folder / entry.name
                size = file.stat().st_size if file.is_file() else None
                if size != entry.bytes:
                    how = "is missing" if size is None else f"has {size:,} bytes"
                    raise ValueError(f"{file} {how}, {entry.bytes:,} were written: {remedy}")
        return found


class _CachedImages:
    """Cached images of a split: a `Source`, but for the images.

    Args:
      folder: the task's.
      manifest: of the cache.
      split: its name.
      remedy: what to do about damage, for the user.

    Raises:
      ValueError: there is no such split, or its labels are damaged.
    """

    def __init__(self, folder: pathlib.Path, manifest: ImageManifest, split: str, *, remedy: str):
        if split not in manifest.splits:
            raise NoSuchSplitError(
                f"the cache of {manifest.task!r} has no split {split!r}: it has"
                f" {sorted(manifest.splits)}"
            )
        self.folder, self.manifest, self._remedy = folder, manifest, remedy
        self._split = manifest.splits[split]
        self.labels = self._array(self._split.labels, ())

    def _array(self, entry: FileEntry, shape: tuple[int, ...]) -> np.ndarray:
        """Int32 `[N, *shape]` of a file.

        Raises:
          ValueError: it is none.
        """
        path, count = self.folder / entry.name, self._split.count
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {self._remedy}") from None
        if found.dtype != np.int32 or found.shape != (count, *shape):
            raise ValueError(
                f"{path} is {found.dtype} {list(found.shape)}, of {count} images: {self._remedy}"
            )
        return found

    @property
    def num_classes(self) -> int:
        """See `Source`."""
        return self.manifest.num_classes

    @property
    def class_names(self) -> Sequence[str] | None:
        """See `Source`."""
        return self.manifest.classes

    @property
    def num_bytes(self) -> int:
        """See `Source`."""
        return sum(entry.bytes for entry in self._split.files)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        split = dataclasses.asdict(self._split, dict_factory=_fields)
        return {"cache": digest([split, self.manifest.num_classes])}

    def name(self, place: int) -> str:
        """See `EncodedImages`."""
        return f"{place} of the cache {self.folder}"

    def verify(self) -> int:
        """See `Source`: the sha256 of every file is compared."""
        for entry in self._split.entries:
            if sha256_of_file(self.folder / entry.name) != entry.sha256:
                raise ValueError(
                    f"{self.folder / entry.name} has other content than was written: {self._remedy}"
                )
        return self.num_bytes


class RecordImages(_CachedImages, EncodedImages):
    """Files in ArrayRecord."""

    @functools.cached_property
    def _records(self) -> Any:
        return grain.sources.ArrayRecordDataSource(
            [str(self.folder / entry.name) for entry in self._split.files]
        )

    def encoded(self, place: int) -> bytes:
        """See `EncodedImages`."""
        try:
            found = msgpack.unpackb(self._records[place])[IMAGE]
            if isinstance(found, bytes):
                return found
            raise ValueError("it holds no file")
        except (ValueError, KeyError, TypeError, RuntimeError, msgpack.UnpackException) as error:
            raise ValueError(
                f"{self.name(place)} cannot be read ({error}): {self._remedy}"
            ) from None


class PixelImages(_CachedImages):
    """Pixels of images: see `ImageDatasetConfig.shorter_side`. Files are mapped into memory, and
    nothing is left to be decoded.

    Raises:
      ValueError: see `RecordImages`; or shapes that do not fit the files.
    """

    def __init__(self, folder: pathlib.Path, manifest: ImageManifest, split: str, *, remedy: str):
        super().__init__(folder, manifest, split, remedy=remedy)
        entry = self._split.shapes
        assert entry is not None  # `ImageManifest.read` asks for it
        self._shapes = self._array(entry, (3,))
        sides, channels = self._shapes[:, :2], self._shapes[:, 2]
        fits = (sides >= 1).all() and (sides <= _LONGEST_SIDE).all()
        if not (len(sides) and fits and np.isin(channels, (1, 3)).all()):
            raise self._misfit(entry)
        sizes = self._shapes.prod(1, dtype=np.int64)
        self._ends = np.cumsum(sizes)  # bytes up to the end of each image, over all files
        self._files: list[np.ndarray] = []
        self._firsts: list[int] = []  # image of each file
        self._starts: list[int] = []  # byte at which each file begins
        image = byte = 0
        for file in self._split.files:
            self._firsts.append(image)
            self._starts.append(byte)
            image, byte = image + file.records, byte + file.bytes
            if not image or self._ends[image - 1] != byte:
                raise self._misfit(entry)
            self._files.append(np.asarray(np.memmap(folder / file.name, np.uint8, "r")))
        if sizes.max() > byte:
            raise self._misfit(entry)

    def _misfit(self, shapes: FileEntry) -> ValueError:
        return ValueError(
            f"{self.folder / shapes.name} does not fit the files beside it: {self._remedy}"
        )

    def image(self, place: int, *, channels: int, at_least: int) -> Any:
        """See `Source`."""
        from PIL import Image

        height, width, has = self._shapes[place].tolist()
        file = bisect.bisect_right(self._firsts, place) - 1
        end = int(self._ends[place]) - self._starts[file]
        pixels = self._files[file][end - height * width * has : end]
        mode = "L" if has == 1 else "RGB"
        found = Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)
        if has > channels:
            # A file's grey values are not always those that its colours would give.
            raise ValueError(
                f"{self.name(place)} has colours, the model takes 1 channel: cache the images"
                " with IMAGE_SHORTER_SIDE = None, that is, as files; the run need not set it so"
            )
        return found if has == channels else found.convert("RGB")


def open_split(
    folder: pathlib.Path, manifest: ImageManifest, split: str, *, remedy: str
) -> RecordImages | PixelImages:
    """Cached images of a split; arguments and errors as `_CachedImages`."""
    kind = RecordImages if manifest.format == FILES else PixelImages
    return kind(folder, manifest, split, remedy=remedy)


def find(config: ImageDatasetConfig) -> RecordImages | PixelImages:
    """The cache that a configuration with `use_cached` names.

    Raises:
      FileNotFoundError: there is none; with the command that makes it.
      ValueError: it is damaged, or has no such split.
    """
    folders, name = data_folders.current().cache_dirs, config.mixture_or_task_name
    folder = find_folder(folders, name, MANIFEST)
    if folder is None:
        where = ", ".join(folders) or "no folder: name it with --seqio_additional_cache_dirs"
        raise FileNotFoundError(
            f"use_cached (USE_CACHED_TASKS) is set, but images of {name!r} are not cached (looked"
            f" in {where}). Prepare them with `{cache_command(config)}` (IMAGE_FOLDER for your own"
            " files) and start with --seqio_additional_cache_dirs of the same folder"
        )
    remedy = f"cache them again: `{cache_command(config)} --overwrite`"
    manifest = ImageManifest.read(folder, remedy=remedy)
    side = scaling.shorter_side(config)
    if manifest.format == PIXELS and manifest.shorter_side != side:
        whence = " by 'auto'" if config.shorter_side == AUTOMATIC else ""
        raise ValueError(
            f"{folder} holds images whose shorter side was made {manifest.shorter_side} pixels,"
            f" shorter_side (IMAGE_SHORTER_SIDE) is {side}{whence}: set it to"
            f" {manifest.shorter_side}, or {remedy}"
        )
    return open_split(folder, manifest, config.split, remedy=remedy)
