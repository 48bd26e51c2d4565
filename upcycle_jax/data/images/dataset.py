"""Labelled images of one set as a `Dataset`: an endless stream of warped views to train on, the
same views every time to evaluate on. No TensorFlow.
"""

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from upcycle_jax.data.images import crops, decoding, scaling, views
from upcycle_jax.data.images.config import AUTOMATIC, ImageDatasetConfig
from upcycle_jax.data.images.held import HeldImages
from upcycle_jax.data.images.opening import open_source
from upcycle_jax.data.images.records import PixelImages
from upcycle_jax.data.images.sources import Images, Source
from upcycle_jax.data.images.streams import ImageStream
from upcycle_jax.data.stream import describe, eval_rows
from upcycle_jax.features import FeatureConverter, HostBatch, check_lengths
from upcycle_jax.features.images import IMAGE, ImageFeatures
from upcycle_jax.progress import Meter

_log = logging.getLogger(__name__)

_EVALUATION_SEED = 0x5EED
_THREADS = min(4, os.cpu_count() or 1)
_HELD_AT_ONCE = 256
"""Images that are decoded between two looks at the room that is left."""
_FEW_PIXELS = 200 * 200
"""Threads that make views of so few pixels wait for Python's lock longer than they work: one makes
them faster.
"""


class ImageDataset:
    """See `data.dataset.Dataset`.

    Args:
      config: what to read.
      features: the model's converter.
      held: keeps images that were scaled, those of other sets too; None for one of its own.

    Raises:
      ValueError: the model takes no images, or of another size, or has too few classes; or the
        arrays are not what `ImageDatasetConfig.arrays` describes.
    """

    def __init__(
        self,
        config: ImageDatasetConfig,
        features: FeatureConverter,
        held: HeldImages | None = None,
    ):
        if config.mixture is not None:
            raise ValueError(
                f"{config.mixture_or_task_name!r} is a mixture of {', '.join(config.mixture)}: one"
                " set of images is read here, so name one of them and leave out mixture"
                " (IMAGE_MIXTURE)"
            )
        if not isinstance(features, ImageFeatures):
            raise ValueError(f"{config.mixture_or_task_name} are images, the model takes none")
        check_lengths(features, config.task_feature_lengths)
        features.check_size(config.task_feature_lengths[IMAGE])
        self.config, self.features = config, features
        shorter_side = scaling.shorter_side(config)
        if shorter_side is not None and shorter_side < features.size:
            raise ValueError(
                f"shorter_side (IMAGE_SHORTER_SIDE) is {shorter_side}, the model takes"
                f" {features.size} x {features.size} pixels: give at least {features.size}, or"
                " None to keep images as they are"
            )
        self.images: Source = open_source(config)
        self._shorter_side = None if isinstance(self.images, Images) else shorter_side
        if self._shorter_side is not None and config.shorter_side == AUTOMATIC:
            _log.info(
                "images of %r, split %s, are scaled to a shorter side of %d pixels before they are"
                " cropped, where they have more (IMAGE_SHORTER_SIDE = 'auto')",
                config.mixture_or_task_name,
                config.split,
                self._shorter_side,
            )
        is_scaled = self._shorter_side is not None and not isinstance(self.images, PixelImages)
        self._held = None
        if is_scaled:
            self._held = HeldImages() if held is None else held
        if features.num_classes and self.images.num_classes > features.num_classes:
            raise ValueError(
                f"{config.mixture_or_task_name} has {self.images.num_classes} classes, the model"
                f" {features.num_classes}: set NUM_CLASSES to at least that many"
            )

    def numbered(self, numbers: np.ndarray, seed: int) -> HostBatch:
        """Views of these numbers of the training stream: every image once in each epoch, in an
        order of its own.

        Args:
          numbers: int `[n]`, from 0.
          seed: of the stream.
        """
        return self.batch(self._shown(numbers, seed), numbers, seed, len(numbers))

    def _shown(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Int `[n]`, the images that these numbers of the stream show."""
        count = len(self.images.labels)
        epochs, places = np.divmod(numbers, count)
        which = places
        if self.config.shuffle:
            which = np.empty(len(numbers), np.int64)
            for epoch in np.unique(epochs):
                mine = epochs == epoch
                which[mine] = _permutation(seed, int(epoch), count)[places[mine]]
        return which

    @property
    def holds_all_images(self) -> bool:
        """Whether all are kept, scaled."""
        held, name = self._held, self.config.mixture_or_task_name
        return held is not None and all(
            (name, place) in held for place in range(len(self.images.labels))
        )

    def hold_images(self, first: int, last: int, seed: int) -> None:
        """Decodes and scales images that are kept, by all cores, as many as find room: the first
        epoch then takes no longer than later ones. Nothing, where none is kept.

        Args:
          first: number of the training stream from which on images are shown.
          last: one more than the last.
          seed: of the stream.

        Raises:
          ValueError: an image cannot be read.
        """
        held, count, channels = self._held, len(self.images.labels), self.features.channels
        if held is None or held.is_full:
            return
        name, wanted = self.config.mixture_or_task_name, np.arange(count)
        if last - first < count:
            wanted = np.unique(self._shown(np.arange(first, last), seed))
        places = [place for place in wanted.tolist() if (name, place) not in held]
        meter = Meter(len(places), _log.info, verb="scaled", unit="images", period=10)
        pool = _pool(os.cpu_count() or 1)
        for start in range(0, len(places), _HELD_AT_ONCE):
            these = places[start : start + _HELD_AT_ONCE]
            for _ in pool.map(lambda place: self._image(place, channels), these):
                pass
            meter.add(len(these), repr(name))
            if held.is_full:
                break
        whose = f"all of {name!r}" if len(wanted) == count else f"those of {name!r} that are shown"
        outcome = f"{whose} are kept"
        if held.is_full:
            outcome = f"no more of {name!r} find room, and the others are decoded in each epoch"
        meter.finish(f": {outcome} ({held})")

    def batch(self, which: np.ndarray, numbers: np.ndarray, seed: int, rows: int) -> HostBatch:
        """Views of images.

        Args:
          which: int `[n]`, the images.
          numbers: int `[n]`, the number of each view.
          seed: of the views.
          rows: of the batch, n at least; the others are zeros without weight.
        """
        seen = self._views(which, numbers, seed)
        return self.features.batch(seen, self.images.labels[which], rows)

    def _views(self, which: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Float32 `[n, T, T, c]` in [-1, 1]."""
        config, side, source = self.config, self.features.size, self.images
        if isinstance(source, Images):
            pixels = source.images[which]
            if config.crop != "none" or config.flip:
                pixels = self._cropped(which, numbers, seed)
            seen = views.views(pixels, side, seed=seed, numbers=numbers, warp=config.warp)
            if seen.shape[-1] != self.features.channels:
                seen = np.repeat(seen, self.features.channels, axis=-1)
            return seen
        out = self._cropped(which, numbers, seed, np.float32)
        out /= 127.5
        out -= 1
        return out

    def _cropped(
        self, which: np.ndarray, numbers: np.ndarray, seed: int, dtype: type[np.number] = np.uint8
    ) -> np.ndarray:
        """`[n, T, T, c]` from 0 to 255, by several threads: decoding and scaling leave Python's
        lock.
        """
        config, features, source = self.config, self.features, self.images
        side, crop = features.size, config.crop
        channels = features.channels
        if isinstance(source, Images):
            channels = source.images.shape[-1]
            side = source.images.shape[1] if crop == "none" else side

        def one(place: int, draws: np.ndarray) -> np.ndarray:
            image = self._image(place, channels)
            if crop == "none" and image.size != (side, side):
                raise ValueError(
                    f"image {place} of {config.mixture_or_task_name!r} is {image.size[0]} x"
                    f" {image.size[1]} pixels, the model takes {side} x {side}: set IMAGE_CROP to"
                    " 'central' or, to train, 'inception'"
                )
            return crops.view(image, side, crop, config.flip, draws)

        draws = crops.drawn(seed, numbers)
        out = np.empty((len(which), side, side, channels), dtype)

        def some(first: int, last: int) -> None:
            for row in range(first, last):
                out[row] = one(int(which[row]), draws[row])

        # Each thread takes a run of rows: a call for each image would cost as much as a small one.
        threads = self._threads(which)
        bounds = [len(which) * part // threads for part in range(threads + 1)]
        for _ in _pool(threads).map(some, bounds, bounds[1:]):
            pass
        return out

    def _image(self, place: int, channels: int) -> Any:
        """A whole image, Pillow's, scaled where that is asked for."""
        held = self._held
        if held is None:
            return self._read(place, channels)
        key = self.config.mixture_or_task_name, place
        return held.get(key, lambda: self._read(place, channels))

    def _read(self, place: int, channels: int) -> Any:
        shorter_side, source = self._shorter_side, self.images
        if shorter_side is None:
            at_least = crops.least_side(self.features.size, self.config.crop)
            return source.image(place, channels=channels, at_least=at_least)
        image = source.image(place, channels=channels, at_least=shorter_side)
        return decoding.shrunk(image, shorter_side)

    def _threads(self, which: np.ndarray) -> int:
        """How many threads make views of images, int `[n]`."""
        name, held, source = self.config.mixture_or_task_name, self._held, self.images
        side = max(self.features.size, self._shorter_side or 0)
        if isinstance(source, Images):
            side = max(side, source.images.shape[1])
        elif not isinstance(source, PixelImages) and not (
            held is not None and all((name, int(place)) in held for place in which)
        ):
            return _THREADS  # They decode.
        return 1 if side * side < _FEW_PIXELS else _THREADS

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> "ImageStream":
        """See `Dataset`."""
        return ImageStream(self, process_index=process_index, process_count=process_count)

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """See `Dataset`: one view of each image, in an order that mixes classes."""
        mine = eval_rows(
            self.config,
            num_batches=num_batches,
            process_index=process_index,
            process_count=process_count,
        )
        size, count = self.config.batch_size, len(self.images.labels)
        batches = -(-count // size)
        batches = batches if num_batches is None else min(batches, num_batches)
        order = _permutation(_EVALUATION_SEED, 0, count)

        def one_pass() -> Iterator[HostBatch]:
            for batch in range(batches):
                which = order[batch * size : (batch + 1) * size][mine]
                yield self.batch(which, which, _EVALUATION_SEED, mine.stop - mine.start)

        return {self.config.mixture_or_task_name: one_pass}

    def task_names(self) -> tuple[str, ...]:
        """See `Dataset`."""
        return (self.config.mixture_or_task_name,)

    def vocabulary_size(self) -> int:
        """See `Dataset`: the number of classes."""
        return self.images.num_classes

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset`."""
        config = self.config
        task = {
            "images": len(self.images.labels),
            "classes": self.images.num_classes,
            **self.images.identity,
            "warp": config.warp,
        }
        if config.crop != "none" or config.flip:
            task |= {"crop": config.crop, "flip": config.flip}
        if self._shorter_side is not None:
            task["shorter_side"] = self._shorter_side
        return describe(
            config,
            tasks={config.mixture_or_task_name: task},
            vocabularies={},
            packages=("numpy",),
        )

    def verify(self) -> int:
        """See `Dataset`."""
        return self.images.verify()


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="images")


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Int64 `[count]`, the order of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
