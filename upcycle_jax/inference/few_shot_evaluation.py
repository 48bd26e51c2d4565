"""Few-shot evaluation of checkpoints on images of classes that were not trained on."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath

from upcycle_jax import checks, distributed
from upcycle_jax.checkpoints import CheckpointReader, loading
from upcycle_jax.data.images import ImageDataset, ImageDatasetConfig
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.files import write_whole
from upcycle_jax.inference import few_shot, running
from upcycle_jax.inference.json_lines import json_line
from upcycle_jax.models.base import FeatureModel, Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import batches, full_disk, holding
from upcycle_jax.types import PyTree

_log = logging.getLogger(__name__)

FOLDER = "few_shot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFewShot:
    """Classifies images by a few examples of each class: least squares on the features below the
    model's head (`inference.few_shot`), whose own classes do not matter.

    Writes `<output_dir>/few_shot/<task>-<split>-<shots>_shots-<step>.json`.

    Attributes:
      model: a model of images with features below its head.
      dataset_cfg: `ImageDatasetConfig` of what to evaluate on; its batch size is that of features,
        its seed that of views.
      checkpoint_path: a checkpoint, or a MODEL_DIR.
      output_dir: usually the MODEL_DIR; made if need be.
      steps: which checkpoints of a MODEL_DIR: 'latest', 'all', a step or several.
      shots: images of each class to learn from; all others are classified.
      shots_split: where those are drawn from, e.g. 'train': then all images of the split of
        `dataset_cfg` are classified, as V-MoE and big_vision do with ImageNet. None: from the split
        of `dataset_cfg` itself.
      num_seeds: draws of those, of the seeds 0, 1, ..., to average over.
      l2: strength of regularisation.
      views: of each image, all warped differently; a class has that many times its images. The
        views of an image may be on both sides of a draw.
      partitioner: the mesh.
      verify: compare the parameters with the checksums that were saved with them.
      files: small text files to leave beside the results (name -> content), e.g. 'config.gin'.

    Raises:
      ValueError: the model has no images or no features, or the data are no images.
    """

    model: Model
    dataset_cfg: checks.Dataset
    checkpoint_path: checks.PathText | os.PathLike
    output_dir: checks.PathText | os.PathLike
    steps: str | checks.CountOrZero | tuple[checks.CountOrZero, ...] = "latest"
    shots: checks.Count = 10
    num_seeds: checks.Count = 5
    l2: Annotated[float, checks.Range(above=0)] = few_shot.L2
    views: checks.Count = 1
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    verify: bool = True
    files: Mapping[str, str] | None = None
    shots_split: str | None = None

    def __post_init__(self) -> None:
        checks.check_fields(self)
        self._features()
        if not isinstance(self.dataset_cfg, ImageDatasetConfig):
            raise ValueError(
                f"few-shot evaluation reads images, not {type(self.dataset_cfg).__name__}: give"
                " @ImageDatasetConfig()"
            )
        if self.shots_split == self.dataset_cfg.split:
            raise ValueError(
                f"shots_split (SHOTS_SPLIT) is {self.shots_split!r}, the split that is classified:"
                " leave it out to draw from that split and classify the others"
            )

    def run(self, *, dry_run: bool = False) -> dict[int, dict[str, Any]]:
        """Returns results by step: `accuracy`, the mean over seeds, `accuracies`, of each seed, and
        what they were measured on.

        Args:
          dry_run: say what would be done and return; nothing is written.

        Raises:
          FileNotFoundError: no checkpoint is there.
          ValueError: settings that cannot run, fewer images of a class than shots, a checkpoint of
            another model, a damaged one, a full disk, or another evaluation that is at work in
            output_dir.
        """
        data = self.dataset_cfg
        batches.data_layout(self.partitioner, data.batch_size)  # Says what does not divide.
        readers = running.checkpoints(self.checkpoint_path, self.steps)
        for reader in readers:
            loading.check_params(reader, self.model)
        images = self._open(data)
        labels = self._labels(images)
        drawn = self._drawn(images, labels)
        if dry_run:
            print(self._plan(readers, drawn))
            return {}
        folder = epath.Path(self.output_dir) / FOLDER
        with (
            full_disk.explained(str(folder), kept="Finished steps are kept"),
            holding.hold_results(folder, self._name, setting="EVAL_OUTPUT_DIR"),
        ):
            if distributed.is_first():
                for name, text in (self.files or {}).items():
                    write_whole(folder / name, text)
            evaluate = self._evaluation(images, labels, drawn)
            results = {}
            for reader in readers:
                params = loading.load_params(
                    reader, self.model, self.partitioner, verify=self.verify
                )
                result = self._result(reader, evaluate(params), drawn)
                results[reader.step] = result
                if distributed.is_first():
                    path = folder / f"{self._name}-{reader.step}.json"
                    write_whole(path, json_line(result) + "\n")
        return results

    @property
    def _name(self) -> str:
        data = self.dataset_cfg
        return f"{data.mixture_or_task_name}-{data.split}-{self.shots}_shots"

    def _features(self) -> ImageFeatures:
        features = self.model.features
        if not isinstance(features, ImageFeatures) or not isinstance(self.model, FeatureModel):
            raise ValueError(
                f"{type(self.model).__name__} has no features of images: few-shot evaluation is for"
                " vision transformers. Give one of models/vit_*.gin"
            )
        return features

    def _open(self, data: ImageDatasetConfig) -> ImageDataset:
        # The classes are not those of the model's head.
        images = ImageDataset(data, dataclasses.replace(self._features(), num_classes=0))
        if images.images.labels.ndim > 1:
            raise ValueError("few-shot evaluation is of images that have one label each")
        return images

    def _labels(self, images: ImageDataset) -> np.ndarray:
        """Int32 `[views * N]`, view by view."""
        return np.tile(images.images.labels, self.views)

    def _drawn(self, images: ImageDataset, labels: np.ndarray) -> "_Drawn":
        """What is learnt from with each seed. Says what is missing before features are computed."""
        if self.shots_split is None:
            of, learnt, others = images, labels, None
        else:
            of = self._open(dataclasses.replace(self.dataset_cfg, split=self.shots_split))
            learnt, others = self._labels(of), labels
        places = [
            np.flatnonzero(few_shot.draw(learnt, self.shots, seed, others=others))
            for seed in range(self.num_seeds)
        ]
        classes = len(np.unique(learnt))
        count = len(labels) - (0 if self.shots_split else self.shots * classes)
        return _Drawn(of, learnt, places, classes, count)

    def _evaluation(
        self, images: ImageDataset, labels: np.ndarray, drawn: "_Drawn"
    ) -> Callable[[PyTree], list[float]]:
        """A function of parameters: the accuracy of each seed."""
        compute = feature_function(self.model, self.partitioner, images, views=self.views)
        if self.shots_split is None:

            def within(params: PyTree) -> list[float]:
                features = compute(params)
                return [
                    few_shot.accuracy(features, labels, shots=self.shots, seed=seed, l2=self.l2)
                    for seed in range(self.num_seeds)
                ]

            return within
        # A training split is large, and few images of it are drawn.
        needed = np.unique(np.concatenate(drawn.places))
        learn = feature_function(
            self.model, self.partitioner, drawn.images, views=self.views, numbers=needed
        )

        def across(params: PyTree) -> list[float]:
            shown, features = learn(params), compute(params)
            return [
                few_shot.share_right(
                    shown[np.searchsorted(needed, places)],
                    drawn.labels[places],
                    features,
                    labels,
                    l2=self.l2,
                )
                for places in drawn.places
            ]

        return across

    def _result(
        self, reader: CheckpointReader, accuracies: list[float], drawn: "_Drawn"
    ) -> dict[str, Any]:
        data = self.dataset_cfg
        return {
            "step": reader.step,
            "task": data.mixture_or_task_name,
            "split": data.split,
            "shots": self.shots,
            **({} if self.shots_split is None else {"shots_split": self.shots_split}),
            "accuracy": float(np.mean(accuracies)),
            "accuracies": accuracies,
            "classes": drawn.classes,
            "evaluated_images": drawn.classified,
            "views": self.views,
            "l2": self.l2,
        }

    def _plan(self, readers: list[CheckpointReader], drawn: "_Drawn") -> str:
        """What would be done, in words."""
        data = self.dataset_cfg
        what = readers[0].path.parent if len(readers) > 1 else readers[0].path
        source = "" if self.shots_split is None else f", drawn from the split {self.shots_split!r}"
        return (
            f"evaluate {what} (steps {', '.join(str(reader.step) for reader in readers)}) on"
            f" {data.mixture_or_task_name!r}, split {data.split!r}: {self.shots} shots of each of"
            f" {drawn.classes} classes{source}, {drawn.classified} other images,"
            f" {self.num_seeds} draws, to {self.output_dir}/{FOLDER}"
        )


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What is learnt from.

    Attributes:
      images: they are drawn from these.
      labels: int32 `[views * N]` of those, view by view.
      places: which of them, int64 `[shots * classes]` for each seed.
      classes: how many.
      classified: how many images are classified.
    """

    images: ImageDataset
    labels: np.ndarray
    places: list[np.ndarray]
    classes: int
    classified: int


def feature_function(
    model: Model,
    partitioner: Partitioner,
    images: ImageDataset,
    *,
    views: int,
    numbers: np.ndarray | None = None,
) -> Callable[[PyTree], np.ndarray]:
    """A function of parameters: float32 features `[views * N, d]` of all images, view by view, or
    of some of those views, on every process; compiled once.

    Args:
      model: a `FeatureModel`.
      partitioner: the mesh.
      images: N of them; the batch size is that of features, the seed that of views.
      views: of each image.
      numbers: of the views, int `[n]` below `views * N`; None: all.
    """
    assert isinstance(model, FeatureModel)
    forward = jax.jit(model.pre_logits, out_shardings=partitioner.replicated)
    config = images.config
    count, size, seed = len(images.images.labels), config.batch_size, config.seed or 0
    layout = batches.data_layout(partitioner, size)
    # Routing groups hold several images: an order that mixes classes.
    numbers = np.arange(count * views) if numbers is None else numbers
    order = np.random.default_rng(0).permutation(len(numbers))
    local = size // layout.num_shards
    mine = slice(layout.shard * local, (layout.shard + 1) * local)

    def compute(params: PyTree) -> np.ndarray:
        found: np.ndarray | None = None
        for first in range(0, len(order), size):
            places = order[first : first + size]
            rows = numbers[places[mine]]
            batch = images.batch(rows % count, rows, seed, local)
            placed = batches.to_global(batch, partitioner, layout.num_shards)
            with partitioner.activate():
                features = np.asarray(forward(params, placed))
            if found is None:
                found = np.empty((len(order), features.shape[-1]), np.float32)
            found[places] = features[: len(places)]
        assert found is not None
        return found

    return compute
