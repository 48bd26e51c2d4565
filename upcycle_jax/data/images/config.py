"""What an image run reads, as configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal

from upcycle_jax import checks
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features.images import IMAGE

GLYPHS, FASHION_MNIST = "glyphs", "fashion_mnist"
GLYPH_NAMES = (GLYPHS, "glyphs_sans", "glyphs_serif", "glyphs_mono")
"""All glyphs, and those of one design of the fonts."""
SPLITS = ("train", "validation", "held_out")

Crop = Literal["none", "central", "inception"]
AUTOMATIC: Final = "auto"


class NoSuchSplitError(ValueError):
    """Images are there, and a split of that name is not."""


Share = checks.Positive | tuple[checks.PathText, checks.Positive]
"""Of a set in a mixture: how often it is shown, with the place of its images where they have
one.
"""


@dataclasses.dataclass(frozen=True)
class ImageDatasetConfig(DatasetConfig):
    """Labelled images. What it shares with text is `DatasetConfig`; the other fields of that do
    not apply.

    Attributes:
      mixture_or_task_name: 'glyphs', the characters of the fonts that matplotlib brings (see
        `glyphs`), or those of one of their designs as domains of the same classes, 'glyphs_sans',
        'glyphs_serif' and 'glyphs_mono'; 'fashion_mnist', where its files are installed (see
        `idx`); a cached or registered task of images; or the name under which `arrays` or `folder`
        are reported.
      task_feature_lengths: {'image': side}.
      split: 'train'; 'validation', views of the same images that training never draws; 'held_out',
        views of classes that are not trained on. Folders, caches and tasks have splits of their
        own.
      arrays: a NumPy archive with images [N, S, S] or [N, S, S, c] (8 bits) and labels [N] of each
        split (or [N, L] of images with several, -1 after the last): 'train_images',
        'train_labels', 'validation_images', ...; None for others.
      folder: images as files, `<folder>/<split>/<class>/<name>.png` or `.jpg`: the folders of the
        training split are the classes, in the order of their names; None for others.
      use_cached: read the images that `python -m upcycle_jax.cache_tasks` wrote.
      num_classes: of glyphs: the first so many of the training classes; None for all.
      warp: how strongly views of glyphs and arrays are warped: 0 for the images as they are, 1 for
        rotations of up to 12 degrees, scales of 0.75 to 1.15, shears of up to 0.15, shifts of up to
        a tenth of the side, changed contrast and some noise. Files are never warped.
      crop: which part of an image a view shows: 'none', all of it, which has the model's size
        already (glyphs and arrays are scaled); 'central', the middle of an image whose shorter side
        is scaled to 8/7 of the model's (256 pixels for 224), as big_vision and V-MoE evaluate;
        'inception', a random part of 5 to 100 % of the area and a width of 3/4 to 4/3 of the
        height, as they train. Scaled bilinearly.
      flip: show every second view mirrored, by chance.
      shorter_side: files with more pixels are scaled down until their shorter side has so many,
        before anything is cropped, bilinearly over all pixels; None: views are made of what is in
        the file. With it `cache_tasks` caches the scaled images as plain pixels, which are read
        several times as fast as files are decoded; runs that read them set the same number, and
        see what they would see of the files. 'auto': by the side of the model's images, 5.2 times
        of it where that is no more than 256 pixels, else None (see `scaling`). Scaled images
        of files are kept, which no epoch decodes again: up to 1 GiB in memory (an eighth of the
        machine's at most), others in a temporary file (a quarter of the free disk at most). Glyphs
        and arrays are never scaled so.
      mixture: several sets of images instead of one: how often images of each are shown, by its
        name, {'birds': 3, 'planes': 1}, or where it lies and how often, {'birds': ('/data/birds',
        3), 'planes': ('/data/planes.npz', 1)}: a folder as `folder`, an archive as `arrays`. A name
        alone is 'glyphs', 'fashion_mnist', or a cached or registered task. With `use_cached` the
        images of folders and tasks are read from the cache of that name. All have the same classes.
        `mixture_or_task_name` is what the mixture is called; each set is evaluated by itself. A
        registered mixture of SeqIO is read by its name alone.

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
    folder: checks.PathText | None = None
    crop: Crop = "none"
    flip: bool = False
    mixture: (
        Annotated[Mapping[str, Share], checks.Hint("{'birds': 3, 'planes': ('/data/planes', 1)}")]
        | None
    ) = dataclasses.field(default=None, metadata=checks.ADDED)
    shorter_side: checks.Size | Literal["auto"] | None = dataclasses.field(
        default=None, metadata=checks.ADDED
    )

    has_task_metrics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack or self.text_files is not None:
            raise ValueError("pack and text_files are for text: leave them out of images")
        if self.has_shipped_splits and self.split not in SPLITS:
            raise NoSuchSplitError(f"split is {self.split!r}: images have {', '.join(SPLITS)}")
        named = [
            name
            for name, given in (
                ("arrays (IMAGE_ARRAYS)", self.arrays is not None),
                ("folder (IMAGE_FOLDER)", self.folder is not None),
                ("use_cached (USE_CACHED_TASKS)", self.use_cached),
            )
            if given
        ]
        if len(named) > 1:
            raise ValueError(f"images are read from one place, not from {' and '.join(named)}")
        if self.mixture is not None:
            self._check_mixture()

    def _check_mixture(self) -> None:
        if self.arrays is not None or self.folder is not None:
            raise ValueError(
                "the sets of a mixture have places of their own: write mixture (IMAGE_MIXTURE)"
                " {'name': ('/data/images', 1), ...} and leave out arrays (IMAGE_ARRAYS) and folder"
                " (IMAGE_FOLDER)"
            )
        if not self.mixture:
            raise ValueError("mixture (IMAGE_MIXTURE) is empty: name a set, or leave it out")
        if self.mixture_or_task_name in self.mixture:
            raise ValueError(
                f"mixture_or_task_name is {self.mixture_or_task_name!r}, one of the sets of the"
                " mixture: give the mixture a name of its own (MIXTURE_OR_TASK_NAME)"
            )

    @property
    def has_shipped_splits(self) -> bool:
        """Whether the splits are `SPLITS`."""
        if self.use_cached or self.mixture is not None:
            return False
        return self.arrays is not None or (
            self.folder is None and self.mixture_or_task_name in GLYPH_NAMES
        )
