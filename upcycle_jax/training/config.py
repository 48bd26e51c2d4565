"""What to restore from and what to save, with T5X's field names."""

import dataclasses
import enum
import os
from collections.abc import Sequence
from typing import Any

from upcycle_jax import checks
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe


class RestoreMode(enum.StrEnum):
    """How `RestoreCheckpointConfig.path` is read."""

    SPECIFIC = "specific"
    LATEST = "latest"


class DataPosition(enum.StrEnum):
    """Where the training data starts after restoring from `RestoreCheckpointConfig.path`."""

    STEP = "step"
    START = "start"
    CHECKPOINT = "checkpoint"


class OptimizerState(enum.StrEnum):
    """What becomes of the optimizer state of a checkpoint that is restored without a recipe."""

    KEEP = "keep"
    RESET = "reset"


class StepPolicy(enum.StrEnum):
    """What becomes of the step of a checkpoint that is restored without a recipe."""

    KEEP = "keep"
    RESET = "reset"


PathOrPaths = checks.PathText | os.PathLike[str] | Sequence[checks.PathText | os.PathLike[str]]


def _choice(owner: str, field: str, kind: type[enum.StrEnum], value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{owner}.{field} is {value!r}: choose one of"
            f" {', '.join(repr(str(choice)) for choice in kind)}"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreCheckpointConfig:
    """The checkpoint that a run starts from. A run that has saved checkpoints of its own resumes
    from those instead.

    Attributes:
      path: a checkpoint of any readable format, or a MODEL_DIR (its latest finished step). A recipe
        that combines several dense parents takes a list of them.
      recipe: how a dense checkpoint becomes this model (`surgery.Recipe`), or None where the trees
        must be equal. It is applied once: never again when the run resumes.
      mode: 'specific' (path must be one checkpoint) or 'latest' (it may also be a MODEL_DIR).
      step: without a recipe, 'keep' the step (schedules go on) or 'reset' it to 0. A recipe says
        this itself.
      optimizer_state: without a recipe, 'keep' (it must match the optimizer's) or 'reset'. Where
        the checkpoint has none (Hugging Face) the optimizer starts afresh. A recipe says this
        itself.
      data_position: 'step' starts the data at the batch of the restored step, so a dense and an
        upcycled continuation of one checkpoint see the same batches; 'start' begins with the first
        batch; 'checkpoint' takes the position saved with the checkpoint.
      restore_dataset: T5X's name for data_position='checkpoint'.
    """

    path: PathOrPaths
    recipe: Recipe | MergeRecipe | None = None
    mode: str = RestoreMode.LATEST
    step: str = StepPolicy.KEEP
    optimizer_state: str = OptimizerState.KEEP
    data_position: str = DataPosition.STEP
    restore_dataset: bool = False

    def __post_init__(self) -> None:
        checks.check_fields(self)
        owner = "RestoreCheckpointConfig"
        if not self.paths or not all(
            isinstance(path, str | os.PathLike) and str(path) for path in self.paths
        ):
            raise ValueError(
                f"{owner}.path is {self.path!r}: name a checkpoint or a MODEL_DIR"
                " (INITIAL_CHECKPOINT_PATH)"
            )
        if len(self.paths) > 1 and self.recipe is None:
            raise ValueError(
                f"{owner}.path names {len(self.paths)} checkpoints: only a recipe can combine"
                " several"
            )
        object.__setattr__(self, "mode", _choice(owner, "mode", RestoreMode, self.mode))
        object.__setattr__(self, "step", _choice(owner, "step", StepPolicy, self.step))
        object.__setattr__(
            self,
            "optimizer_state",
            _choice(owner, "optimizer_state", OptimizerState, self.optimizer_state),
        )
        position = DataPosition.CHECKPOINT if self.restore_dataset else self.data_position
        object.__setattr__(
            self, "data_position", _choice(owner, "data_position", DataPosition, position)
        )
        if self.recipe is not None and (self.step, self.optimizer_state) != (
            StepPolicy.KEEP,
            OptimizerState.KEEP,
        ):
            raise ValueError(
                f"{owner}.step and .optimizer_state apply without a recipe; set Recipe.step and"
                " Recipe.optimizer_state instead"
            )

    @property
    def paths(self) -> tuple[str | os.PathLike[str], ...]:
        """`path` as a tuple of one or several."""
        return (self.path,) if isinstance(self.path, str | os.PathLike) else tuple(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveCheckpointConfig:
    """When checkpoints are written to MODEL_DIR and which of them stay.

    Attributes:
      period: steps between checkpoints; one more is written at the end and when the run is
        interrupted.
      keep: how many of the latest to keep, or None for all.
      keep_period: steps at multiples of this are kept whatever `keep` says.
      save_dataset: save the data position with each checkpoint.
      dtype: of the parameters on disk, 'float32' or 'bfloat16'. A run resumes bit for bit from
        float32 only.
      checksums: save the checksums of all leaves, by which damage is noticed when they are
        restored; the run waits for one pass over the arrays on the devices. A state whose
        parameters are not finite is not saved then.
    """

    period: checks.Count = 1000
    keep: checks.Count | None = None
    keep_period: checks.Count | None = None
    save_dataset: bool = True
    dtype: str = "float32"
    checksums: bool = True

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"SaveCheckpointConfig.dtype is {self.dtype!r}: choose 'float32' or 'bfloat16'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Restoring and saving; either may be None: start from scratch, save nothing.

    Attributes:
      restore: what a run starts from that has no checkpoint of its own.
      save: when checkpoints are written.
      verify: compare restored leaves with the checksums that were saved with them, also where the
        run resumes. False trusts a checkpoint whatever its checksums say. Parameters that are not
        finite are refused in either case.
    """

    restore: RestoreCheckpointConfig | None = None
    save: SaveCheckpointConfig | None = SaveCheckpointConfig()
    verify: bool = True

    def __post_init__(self) -> None:
        checks.check_fields(self)
