"""Several sets of images in one stream, each as often as its share says; and which sets a
configuration names. No TensorFlow, but for registered mixtures.
"""

import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from upcycle_jax import data_folders
from upcycle_jax.data import draws, tensorflow_import
from upcycle_jax.data.cache.format import MIXTURE, find_folder
from upcycle_jax.data.dataset import Dataset
from upcycle_jax.data.images.config import (
    FASHION_MNIST,
    GLYPH_NAMES,
    ImageDatasetConfig,
    NoSuchSplitError,
)
from upcycle_jax.data.images.dataset import ImageDataset
from upcycle_jax.data.images.held import HeldImages
from upcycle_jax.data.images.records import MANIFEST
from upcycle_jax.data.images.streams import ImageStream
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.data.stream import describe
from upcycle_jax.features import FeatureConverter, HostBatch

_log = logging.getLogger(__name__)

_ARCHIVE = ".npz"
_MOST_OFF = 2
"""Numbers by which a set's turns may differ from its share."""
IN_MEMORY = (*GLYPH_NAMES, FASHION_MNIST)
"""Sets that are known by name and never cached."""


class Part(NamedTuple):
    """A set of a mixture: what is read, and how often."""

    config: ImageDatasetConfig
    rate: float


def parts(config: ImageDatasetConfig) -> dict[str, Part] | None:
    """The sets of a mixture by name, sorted; None where the configuration names one set.

    Raises:
      ValueError: a mixture's file in the cache folder is damaged.
    """
    shares: Mapping[str, Any] | None = config.mixture
    if shares is None:
        shares = _registered(config)
    if shares is None:
        return None
    return {name: _part(config, name, share) for name, share in sorted(shares.items())}


def _placed(share: Any) -> tuple[str | None, float]:
    """Where the images of a set are, if that is said, and how often they are shown."""
    place, rate = (None, share) if isinstance(share, int | float) else share
    return place, float(rate)


def _is_archive(place: str | None) -> bool:
    return place is not None and place.endswith(_ARCHIVE)


def can_be_cached(name: str, place: str | None) -> bool:
    """Whether a set is read from a cache where one is asked for: what lies in memory is not."""
    return not _is_archive(place) and (place is not None or name not in IN_MEMORY)


def _part(config: ImageDatasetConfig, name: str, share: Any) -> Part:
    place, rate = _placed(share)
    is_archive = _is_archive(place)
    cached = config.use_cached and can_be_cached(name, place)
    part = dataclasses.replace(
        config,
        mixture_or_task_name=name,
        mixture=None,
        use_cached=cached,
        arrays=place if is_archive else None,
        folder=None if is_archive or cached else place,
    )
    return Part(part, rate)


def _registered(config: ImageDatasetConfig) -> Mapping[str, float] | None:
    """The rates of a mixture of SeqIO, from its cache or from the registry."""
    name = config.mixture_or_task_name
    if config.use_cached:
        folders = data_folders.current().cache_dirs
        folder = find_folder(folders, name, MIXTURE)
        if folder is None or find_folder(folders, name, MANIFEST) is not None:
            return None
        return _cached_rates(folder / MIXTURE)
    if config.arrays or config.folder or name in IN_MEMORY:
        return None
    try:
        tensorflow_import.quietly()
        from upcycle_jax.data.images import seqio_images
    except ModuleNotFoundError:
        return None  # Opening the set says what is missing.
    return seqio_images.mixture_of(config)


def _cached_rates(path: pathlib.Path) -> dict[str, float]:
    try:
        rates = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {str(name): float(rate) for name, rate in rates.items() if float(rate) > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): cache the mixture again with --overwrite"
        ) from error


class MixedImages:
    """See `data.dataset.Dataset`: sets of images that have the same classes.

    Args:
      config: what to read.
      features: the model's converter.
      found: the sets. Those that lack the split are not evaluated; none may lack it in training.

    Raises:
      NoSuchSplitError: no set has the split.
      ValueError: as `ImageDataset`, or classes differ.
    """

    def __init__(
        self, config: ImageDatasetConfig, features: FeatureConverter, found: Mapping[str, Part]
    ):
        self.config, self.features = config, features
        self._rates = {name: part.rate for name, part in found.items()}
        self._parts: dict[str, ImageDataset] = {}
        self._lacking: dict[str, NoSuchSplitError] = {}
        held = HeldImages()
        for name, part in found.items():
            try:
                self._parts[name] = ImageDataset(part.config, features, held)
            except NoSuchSplitError as error:
                self._lacking[name] = error
        if not self._parts:
            raise NoSuchSplitError("; ".join(map(str, self._lacking.values())))
        self._check_classes()

    def _check_classes(self) -> None:
        """Raises a ValueError where the sets do not have the same classes."""
        what = f"the sets of the mixture {self.config.mixture_or_task_name!r}"
        counts = {name: part.images.num_classes for name, part in self._parts.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"{what} have different numbers of classes ({listed}): a label means the same in"
                " all of them, so number the classes alike, or train on one set"
            )
        named = {
            name: list(names)
            for name, part in self._parts.items()
            if (names := part.images.class_names) is not None
        }
        first = next(iter(named), None)
        for name, names in named.items():
            for label, (one, other) in enumerate(zip(named[first or name], names, strict=True)):
                if one != other:
                    raise ValueError(
                        f"{what} have different classes: {label} is {one!r} in {first} and"
                        f" {other!r} in {name}. Give the folders of classes the same names"
                    )

    @property
    def sets(self) -> tuple[ImageDataset, ...]:
        """Those that have the split, by name."""
        return tuple(self._parts.values())

    def numbered(self, numbers: np.ndarray, seed: int) -> HostBatch:
        """Views of these numbers, int `[n]`, of the mixture's stream."""
        turns = np.array(
            [self._order[int(number)] for number in numbers]
        )  # [n, 2]: set, and which of it
        out: HostBatch = {}
        for place, (name, part) in enumerate(self._parts.items()):
            rows = np.flatnonzero(turns[:, 0] == place)
            if not len(rows):
                continue
            values_of = part.numbered(turns[rows, 1], _seed_of(name, seed))
            for feature, values in values_of.items():
                if feature not in out:
                    out[feature] = np.zeros((len(numbers), *values.shape[1:]), values.dtype)
                out[feature][rows] = values
        return out

    def hold_images(self, first: int, last: int, seed: int) -> None:
        """See `ImageDataset.hold_images`."""
        total = sum(self._rates[name] for name in self._parts)
        for name, part in self._parts.items():
            share = self._rates[name] / total  # of any run of numbers, to one or two
            part.hold_images(
                max(math.floor(share * first) - _MOST_OFF, 0),
                math.ceil(share * last) + _MOST_OFF,
                _seed_of(name, seed),
            )

    @functools.cached_property
    def _order(self) -> Any:
        """Which set each number is of, and its number in that."""
        orders = [
            grain.MapDataset.range(1).repeat().map_with_index(_Turn(place))
            for place in range(len(self._parts))
        ]
        return grain.MapDataset.mix(orders, weights=[self._rates[name] for name in self._parts])

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> ImageStream:
        """See `Dataset`.

        Raises:
          NoSuchSplitError: a set lacks the split.
        """
        if self._lacking:
            raise NoSuchSplitError("; ".join(map(str, self._lacking.values())))
        return ImageStream(self, process_index=process_index, process_count=process_count)

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """See `Dataset`."""
        for name, error in self._lacking.items():
            _log.warning("%s is not evaluated: %s", name, error)
        out: dict[str, Callable[[], Iterator[HostBatch]]] = {}
        for part in self._parts.values():
            out |= part.eval_batches(num_batches, process_index, process_count)
        return out

    def task_names(self) -> tuple[str, ...]:
        """See `Dataset`."""
        return tuple(self._rates)

    def vocabulary_size(self) -> int:
        """See `Dataset`: the number of classes."""
        return next(iter(self._parts.values())).images.num_classes

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset`."""
        tasks = {
            name: {"rate": self._rates[name], **part.fingerprint()["tasks"][name]}
            for name, part in self._parts.items()
        }
        return describe(self.config, tasks=tasks, vocabularies={}, packages=("numpy", "grain"))

    def verify(self) -> int:
        """See `Dataset`."""
        return sum(part.verify() for part in self._parts.values())


def _seed_of(name: str, seed: int) -> int:
    """The seed of a set's own stream."""
    return int(draws.bits(seed, draws.name_number(name)) >> np.uint64(33))


class _Turn(grain.transforms.MapWithIndex):
    """Numbers of a set's examples, with the set's place."""

    def __init__(self, place: int):
        self._place = place

    def map_with_index(self, index: int, element: int) -> tuple[int, int]:
        return self._place, index


@open_dataset.register
def open_images(config: ImageDatasetConfig, features: FeatureConverter) -> Dataset:
    """`opening.open_dataset` of images."""
    found = parts(config)
    return ImageDataset(config, features) if found is None else MixedImages(config, features, found)
