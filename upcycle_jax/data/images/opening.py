"""From an `ImageDatasetConfig` to the labelled images that it names."""

import zipfile

import numpy as np

from upcycle_jax.data.images import folders, glyphs, named, records
from upcycle_jax.data.images.config import ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.data.images.sources import Images, Source

_LARGEST = 1 << 34
"""Bytes of one array of the user's: more does not fit into memory here."""


def open_source(config: ImageDatasetConfig) -> Source:
    """The images that a configuration names.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: what is there is not what the configuration describes, or damaged.
    """
    if config.folder is not None:
        return folders.open_folder(config)
    if config.use_cached:
        return records.find(config)
    if config.arrays is not None:
        return _arrays(config)
    if config.mixture_or_task_name in glyphs.DOMAINS:
        return _glyphs(config)
    return named.open_named(config)


def _glyphs(config: ImageDatasetConfig) -> Images:
    """Glyphs of a split. Classes are numbered anew: those trained on, or those held out."""
    found = glyphs.load()
    held_out = config.split == "held_out"
    numbers = np.arange(len(found.code_points))
    kept = numbers[glyphs.is_held_out(numbers) == held_out]
    if config.num_classes is not None:
        if config.num_classes > len(kept):
            raise ValueError(
                f"num_classes is {config.num_classes}: glyphs have {len(kept)} classes in the split"
                f" {config.split!r}"
            )
        kept = kept[: config.num_classes]
    wanted = np.isin(found.classes, kept)
    wanted &= np.isin(found.faces, glyphs.DOMAINS[config.mixture_or_task_name])
    labels = np.searchsorted(kept, found.classes[wanted]).astype(np.int32)
    return Images(found.images[wanted][..., None], labels, len(kept))


def _arrays(config: ImageDatasetConfig) -> Images:
    """The user's own images of a split."""
    path = config.arrays
    try:
        with np.load(str(path), allow_pickle=False) as archive:
            names = [f"{config.split}_{kind}" for kind in ("images", "labels")]
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise NoSuchSplitError(
                    f"has no array {missing[0]}, only {', '.join(archive.files[:8])}"
                )
            sizes = archive.zip.infolist()
            if max(info.file_size for info in sizes) > _LARGEST:
                raise ValueError("holds an array that is too large for this way of reading")
            images, labels = (archive[name] for name in names)
            everywhere = [archive[n] for n in archive.files if n.endswith("_labels")]
    except FileNotFoundError:
        raise
    except NoSuchSplitError as error:
        raise NoSuchSplitError(f"{path}: {error}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    images = images[..., None] if images.ndim == 3 else images
    problem = _problem(images, labels)
    if problem:
        raise ValueError(f"{path}: {problem}")
    count = 1 + max(int(found.max(initial=0)) for found in everywhere)
    return Images(images, labels.astype(np.int32), count)


def _problem(images: np.ndarray, labels: np.ndarray) -> str | None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2]:
        return f"images are {images.dtype} {list(images.shape)}: uint8 [N, S, S, c] are read"
    if (
        labels.shape[:1] != images.shape[:1]
        or labels.ndim not in (1, 2)
        or labels.dtype.kind not in "iu"
        or not labels.size
    ):
        return f"labels are {labels.dtype} {list(labels.shape)}, of {len(images)} images"
    if labels.ndim == 2 and int(labels[:, 0].min()) < 0:
        return "an image has no label: the first is below 0"
    if labels.ndim == 1 and int(labels.min()) < 0:
        return f"a label is {int(labels.min())}: classes are counted from 0"
    return None
