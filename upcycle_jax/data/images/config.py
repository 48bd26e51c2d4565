"""What an image run reads, as configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from upcycle_jax import checks
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features.images import IMAGE

GLYPHS = "glyphs"
SPLITS = ("train", "validation", "held_out")


@dataclasses.dataclass(frozen=True)
class ImageDatasetConfig(DatasetConfig):
    """Labelled images. What it shares with text is `DatasetConfig`; the other fields of that do
    not apply.

    Attributes:
      mixture_or_task_name: 'glyphs', the characters of the fonts that matplotlib brings (see
        `glyphs`), or the name under which `arrays` are reported.
      task_feature_lengths: {'image': side}.
      split: 'train'; 'validation', views of the same images that training never draws; 'held_out',
        views of classes that are not trained on.
      arrays: a NumPy archive with images [N, S, S] or [N, S, S, c] (8 bits) and labels [N] of each
        split: 'train_images', 'train_labels', 'validation_images', ...; None for glyphs.
      num_classes: of glyphs: the first so many of the training classes; None for all.
      warp: how strongly views are warped: 0 for the images as they are, 1 for rotations of up to
        12 degrees, scales of 0.75 to 1.15, shears of up to 0.15, shifts of up to a tenth of the
        side, changed contrast and some noise.

    Raises:
      ValueError: an unknown split, or settings that are text's.
    """

    mixture_or_task_name: str = GLYPHS
    task_feature_lengths: Annotated[Mapping[str, checks.Size], checks.Hint("{'image': 32}")] = (
        dataclasses.field(default_factory=lambda: {IMAGE: 32})
    )
    arrays: checks.PathText | None = None
    num_classes: checks.Count | None = None
    warp: checks.Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack or self.text_files is not None:
            raise ValueError("pack and text_files are for text: leave them out of images")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}: images have {', '.join(SPLITS)}")
        if self.arrays is None and self.mixture_or_task_name != GLYPHS:
            raise ValueError(
                f"mixture_or_task_name is {self.mixture_or_task_name!r}: images are {GLYPHS!r}, or"
                " your own arrays (IMAGE_ARRAYS) under any name"
            )
