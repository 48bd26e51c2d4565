"""Fashion-MNIST's files, where the system has installed them: `apt install dataset-fashion-mnist`
(Debian, 31 MB, MIT licence). The format is that of MNIST: big-endian sizes, then bytes.
"""

import gzip
import os
import pathlib
import struct

import numpy as np

from upcycle_jax.data.images.config import FASHION_MNIST, ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.data.images.sources import Images

FOLDERS = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset/fashion-mnist")
VARIABLE = "FASHION_MNIST_DIR"
"""Names another folder with the four files."""
CLASSES = 10
_STEMS = {"train": "train", "validation": "t10k"}
_UNSIGNED_BYTES = 0x08
_LARGEST = 1 << 28
"""Values of a file at most; Fashion-MNIST has 47 million."""


def folder() -> pathlib.Path | None:
    """Where the files are, or None."""
    named = os.environ.get(VARIABLE)
    places = [pathlib.Path(place) for place in ([named] if named else FOLDERS)]
    return next((place for place in places if _file(place, "train-labels-idx1-ubyte")), None)


def fashion_mnist(config: ImageDatasetConfig) -> Images:
    """60,000 images to train on and 10,000 for validation, of 28 x 28 pixels and 10 classes.

    Raises:
      FileNotFoundError: the files are not installed.
      ValueError: another split is asked for, or a file is damaged.
    """
    if config.split not in _STEMS:
        raise NoSuchSplitError(
            f"split is {config.split!r}: {FASHION_MNIST} has {', '.join(_STEMS)}"
        )
    place = folder()
    if place is None:
        raise FileNotFoundError(
            f"the files of {FASHION_MNIST} are not installed: apt install dataset-fashion-mnist, or"
            f" set {VARIABLE} to the folder of train-images-idx3-ubyte.gz and the other three"
        )
    stem = _STEMS[config.split]
    found = []
    for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = _file(place, f"{stem}-{name}-ubyte")
        if path is None:
            raise FileNotFoundError(f"{place} lacks {stem}-{name}-ubyte (or .gz)")
        found.append(read(path, dimensions))
    images, labels = found
    if len(images) != len(labels) or labels.max(initial=0) >= CLASSES:
        raise ValueError(
            f"{place}: {len(images)} images and {len(labels)} labels up to"
            f" {labels.max(initial=0)}: the files do not belong together"
        )
    if images.shape[1] != images.shape[2] or not len(images):
        raise ValueError(f"{place}: images have the shape {list(images.shape)}")
    return Images(images[..., None], labels.astype(np.int32), CLASSES)


def read(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Uint8 array of an idx file, compressed or not.

    Args:
      path: of the file.
      dimensions: that it must have.

    Raises:
      ValueError: it is none, of other values or dimensions, or not as long as it says.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:2] != b"\0\0":
                raise ValueError("it is no idx file")
            if header[2] != _UNSIGNED_BYTES or header[3] != dimensions:
                raise ValueError(
                    f"it holds {header[3]} dimensions of type {header[2]:#04x}: {dimensions} of"
                    " 8-bit values are read"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            count = int(np.prod(shape, dtype=object))
            if count > _LARGEST:
                raise ValueError(f"it claims {count:,} values")
            values = stream.read(count + 1)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(values) != count:
        more = "more" if len(values) > count else f"only {len(values):,}"
        raise ValueError(f"{path}: its header claims {count:,} values, it has {more}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _file(place: pathlib.Path, name: str) -> pathlib.Path | None:
    return next((path for end in ("", ".gz") if (path := place / f"{name}{end}").is_file()), None)
