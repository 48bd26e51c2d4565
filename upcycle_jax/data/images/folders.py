"""Images as files, `<folder>/<split>/<class>/<name>.png` or `.jpg`."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from upcycle_jax.data.images import decoding
from upcycle_jax.data.images.config import ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.data.images.encoded import EncodedImages

TRAIN, VALIDATION = "train", "validation"
_OTHER_NAMES = {VALIDATION: ("val", "valid")}
"""How ImageNet and others call a split."""


@dataclasses.dataclass(frozen=True)
class FolderImages(EncodedImages):
    """Files, which are read when they are asked for.

    Attributes:
      folder: of the split.
      files: paths below it, sorted.
      labels: int32 `[N]`.
      classes: their names, sorted.
      sizes: int64 `[N]`, bytes of each file.
    """

    folder: pathlib.Path
    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    sizes: np.ndarray

    @property
    def num_classes(self) -> int:
        """See `Source`."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.classes

    @property
    def num_bytes(self) -> int:
        """See `Source`."""
        return int(self.sizes.sum())

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """See `Source`: names, sizes and classes; contents are not read."""
        found = hashlib.sha256("\n".join((*self.classes, "", *self.files)).encode())
        found.update(self.sizes.tobytes())
        return {"files_sha256": found.hexdigest()}

    def encoded(self, place: int) -> bytes:
        """See `encoded.EncodedImages`."""
        return decoding.read_file(self.folder / self.files[place])

    def name(self, place: int) -> str:
        """See `encoded.EncodedImages`."""
        return str(self.folder / self.files[place])


def open_folder(config: ImageDatasetConfig) -> FolderImages:
    """The images of a split.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has no such split, a class without images, or a class that the training split
        has not.
    """
    root = pathlib.Path(os.path.expanduser(str(config.folder)))
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder: IMAGE_FOLDER holds <split>/<class>/<image>.png or .jpg"
        )
    folder = _split(root, config.split)
    names = _classes(folder)
    classes = names
    if config.split != "held_out" and (root / TRAIN).is_dir():
        classes = _classes(root / TRAIN)
        new = sorted(set(names) - set(classes))
        if new:
            raise ValueError(
                f"{folder} has the class {new[0]!r}, which {root / TRAIN} has not: take it out, or"
                " add images of it to train on"
            )
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for name in names:
        found = sorted(
            (entry.name, entry.stat().st_size)
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(decoding.SUFFIXES) and entry.is_file()
        )
        if not found:
            raise ValueError(
                f"{folder / name} holds no image: a class is a folder of .png, .jpg or .jpeg files"
            )
        files += [f"{name}/{file}" for file, _ in found]
        sizes += [size for _, size in found]
        labels += [classes.index(name)] * len(found)
    return FolderImages(
        folder, tuple(files), np.asarray(labels, np.int32), tuple(classes), np.asarray(sizes)
    )


def splits(root: pathlib.Path) -> list[str]:
    """The splits of a folder, by the names that a configuration calls them."""
    usual = {other: name for name, others in _OTHER_NAMES.items() for other in others}
    return sorted({usual.get(path.name, path.name) for path in root.iterdir() if path.is_dir()})


def _split(root: pathlib.Path, split: str) -> pathlib.Path:
    if split != pathlib.PurePath(split).name:
        raise ValueError(f"split is {split!r}: it is the name of a folder")
    for name in (split, *_OTHER_NAMES.get(split, ())):
        if (root / name).is_dir():
            return root / name
    raise NoSuchSplitError(
        f"{root} has no split {split!r}, only {', '.join(splits(root)) or 'nothing'}: images lie in"
        " <split>/<class>/"
    )


def _classes(folder: pathlib.Path) -> list[str]:
    """The folders that are classes, by name."""
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise ValueError(
            f"{folder} is empty: it holds a folder of .png, .jpg or .jpeg files for each class"
        )
    return names
