"""Images by name: Fashion-MNIST where it is installed, and registered SeqIO tasks that fit into
memory.
"""

import dataclasses
import functools
import hashlib
import shlex
from typing import Any

import numpy as np

from upcycle_jax import data_folders
from upcycle_jax.data import tensorflow_import
from upcycle_jax.data.images import idx, scaling
from upcycle_jax.data.images.config import FASHION_MNIST, GLYPHS, ImageDatasetConfig
from upcycle_jax.data.images.encoded import EncodedImages
from upcycle_jax.data.images.sources import Source

_COMMAND = "python -m upcycle_jax.cache_tasks --gin_file=runs/cache_images.gin"
MOST_IN_MEMORY = 200_000
"""Images of a task that are held; CIFAR has 60,000, ImageNet 1.28 million."""


@dataclasses.dataclass(frozen=True)
class TaskImages(EncodedImages):
    """Images of a SeqIO task, held in memory as files.

    Attributes:
      task: its name.
      files: PNG or JPEG.
      labels: int32 `[N]`.
      classes: labels are below it.
    """

    task: str
    files: tuple[bytes, ...]
    labels: np.ndarray
    classes: int

    @property
    def num_classes(self) -> int:
        """See `Source`."""
        return self.classes

    @property
    def num_bytes(self) -> int:
        """See `Source`."""
        return sum(map(len, self.files))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        found = hashlib.sha256(np.ascontiguousarray(self.labels).data)
        for file in self.files:
            found.update(file)
        return {"sha256": found.hexdigest()}

    def encoded(self, place: int) -> bytes:
        """See `EncodedImages`."""
        return self.files[place]

    def name(self, place: int) -> str:
        """See `EncodedImages`."""
        return f"{place} of {self.task}"


def open_named(config: ImageDatasetConfig) -> Source:
    """The images of that name.

    Raises:
      FileNotFoundError: Fashion-MNIST is not installed.
      ValueError: nothing has that name, it holds no images, or too many for memory; with the
        command that caches them.
    """
    name = config.mixture_or_task_name
    if name == FASHION_MNIST:
        return idx.fashion_mnist(config)
    try:
        tensorflow_import.quietly()
        from upcycle_jax.data.images import seqio_images
    except ModuleNotFoundError as error:
        if error.name not in ("tensorflow", "seqio", "tensorflow_datasets"):
            raise
        raise ValueError(
            f"mixture_or_task_name is {name!r}: images are {GLYPHS!r}, {FASHION_MNIST!r}, your own"
            " arrays (IMAGE_ARRAYS) or files (IMAGE_FOLDER) under any name, or a SeqIO task, and"
            f" SeqIO is not installed ({error})"
        ) from error
    task = seqio_images.find(config)
    count = task.num_input_examples(config.split)
    if count is not None and count > MOST_IN_MEMORY:
        raise ValueError(
            f"{name!r} has {count:,} images in the split {config.split!r}, too many for memory:"
            f" cache them (`{cache_command(config)}`) and set USE_CACHED_TASKS"
        )
    files, labels = [], []
    for file, label in seqio_images.examples(task, config.split):
        files.append(file)
        labels.append(label)
    seqio_images.check_labels(task, labels)
    return TaskImages(
        name, tuple(files), np.asarray(labels, np.int32), seqio_images.num_classes(task)
    )


def cache_command(config: ImageDatasetConfig) -> str:
    """The shell command that caches what the configuration reads."""
    folders, side = data_folders.current().cache_dirs, scaling.shorter_side(config)
    words = [
        *_COMMAND.split(),
        f"--gin.MIXTURE_OR_TASK_NAME={config.mixture_or_task_name!r}",
        *([f"--gin.IMAGE_FOLDER={config.folder!r}"] if config.folder is not None else []),
        *([f"--gin.IMAGE_SHORTER_SIDE={side}"] if side is not None else []),
        f"--output_cache_dir={folders[0] if folders else 'cache'}",
    ]
    return " ".join(map(shlex.quote, words))
