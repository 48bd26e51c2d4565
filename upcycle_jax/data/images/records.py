"""Cached images on disk: files, or their pixels, in ArrayRecord, read one by one in any order,
without TensorFlow.

    <cache folder>/<task>/images.json                          what was cached, with counts and
    sha256
                         /<split>-00000-of-00004.array_record  images, one a record: 'image' and
                                                               'label'; of pixels 'shape' too
                         /<split>.labels.npy                   int32 [N]

The manifest is written last and the task's folder renamed into place after it, so a folder with its
name is whole.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import msgpack
import numpy as np

from upcycle_jax import data_folders
from upcycle_jax.data.cache.format import FileEntry, digest, find_folder, sha256_of_file, write_json
from upcycle_jax.data.images.config import ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.data.images.encoded import EncodedImages
from upcycle_jax.data.images.named import cache_command
from upcycle_jax.features.images import IMAGE

FILES, PIXELS = 1, 2
"""Formats: what a record's image is."""
SHAPE = "shape"
"""[height, width, channels] of a record's pixels."""
MANIFEST = "images.json"


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """The images of one split: the ArrayRecord files in order, and the file of labels."""

    files: Sequence[FileEntry]
    labels: FileEntry

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
        """Writes it into the task's folder. That of files reads as it did before there were
        PIXELS.
        """
        fields = dataclasses.asdict(self)
        if self.shorter_side is None:
            del fields["shorter_side"]
        write_json(folder / MANIFEST, fields)

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
                )
                for name, entry in fields["splits"].items()
            }
            found = cls(**{**fields, "splits": splits})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
        for split in splits.values():
            for entry in (*split.files, split.labels):
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


class RecordImages(EncodedImages):
    """Cached images of a split.

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
        path = folder / self._split.labels.name
        try:
            self.labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from None
        count = self._split.count
        if self.labels.dtype != np.int32 or self.labels.shape != (count,):
            raise ValueError(
                f"{path} is {self.labels.dtype} {list(self.labels.shape)}, of {count} images:"
                f" {remedy}"
            )

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
        return {"cache": digest([dataclasses.asdict(self._split), self.manifest.num_classes])}

    @functools.cached_property
    def _records(self) -> Any:
        return grain.sources.ArrayRecordDataSource(
            [str(self.folder / entry.name) for entry in self._split.files]
        )

    def encoded(self, place: int) -> bytes:
        """See `EncodedImages`."""
        with self._told(place):
            found = msgpack.unpackb(self._records[place])[IMAGE]
            if isinstance(found, bytes):
                return found
            raise ValueError("it holds no file")

    @contextlib.contextmanager
    def _told(self, place: int) -> Iterator[None]:
        """Damage of a record raises a ValueError that names it."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RuntimeError, msgpack.UnpackException) as error:
            raise ValueError(
                f"{self.name(place)} cannot be read ({error}): {self._remedy}"
            ) from None

    def name(self, place: int) -> str:
        """See `EncodedImages`."""
        return f"{place} of the cache {self.folder}"

    def verify(self) -> int:
        """See `Source`: the sha256 of every file is compared."""
        for entry in (*self._split.files, self._split.labels):
            if sha256_of_file(self.folder / entry.name) != entry.sha256:
                raise ValueError(
                    f"{self.folder / entry.name} has other content than was written: {self._remedy}"
                )
        return self.num_bytes


class PixelImages(RecordImages):
    """Cached images that are pixels already: see `ImageDatasetConfig.shorter_side`."""

    def image(self, place: int, *, channels: int, at_least: int) -> Any:
        """See `Source`; nothing is left to be decoded."""
        from PIL import Image

        with self._told(place):
            record = msgpack.unpackb(self._records[place])
            pixels, (height, width, has) = record[IMAGE], record[SHAPE]
            if has not in (1, 3) or min(height, width) < 1 or len(pixels) != height * width * has:
                raise ValueError(f"it holds {len(pixels)} bytes, not {height} x {width} x {has}")
            mode = "L" if has == 1 else "RGB"
            found = Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)
        if has > channels:
            # A file's grey values are not always those that its colours would give.
            raise ValueError(
                f"{self.name(place)} has colours, the model takes 1 channel: cache the images"
                " without IMAGE_SHORTER_SIDE, which the run may set all the same"
            )
        return found if has == channels else found.convert("RGB")


def find(config: ImageDatasetConfig) -> RecordImages:
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
    if manifest.format == FILES:
        return RecordImages(folder, manifest, config.split, remedy=remedy)
    if manifest.shorter_side != config.shorter_side:
        raise ValueError(
            f"{folder} holds images whose shorter side was made {manifest.shorter_side} pixels,"
            f" shorter_side (IMAGE_SHORTER_SIDE) is {config.shorter_side}: set it to"
            f" {manifest.shorter_side}, or {remedy}"
        )
    return PixelImages(folder, manifest, config.split, remedy=remedy)
