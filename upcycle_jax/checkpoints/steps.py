"""The checkpoints of a MODEL_DIR by their steps."""

import logging
import os

from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.orbax_reader import find_item
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.state_tree import STEP
from upcycle_jax.step_names import step_name, step_of

_log = logging.getLogger(__name__)


def step_folders(model_dir: epath.Path) -> dict[int, epath.Path]:
    """Whatever is named `checkpoint_<step>` in a MODEL_DIR, by rising step, damaged or not; saves
    that never finished have other names. Steps padded with zeros count, too.

    Raises:
      ValueError: two names of the same step.
    """
    steps: dict[int, epath.Path] = {}
    for child in sorted(model_dir.iterdir()) if model_dir.is_dir() else ():
        step = step_of(child.name)
        if step is not None:
            if step in steps:
                raise ValueError(
                    f"{model_dir} has {steps[step].name} and {child.name}, which name the same"
                    " step: remove one of them"
                )
            steps[step] = child
    return {step: steps[step] for step in sorted(steps)}


def checkpoint_steps(model_dir: epath.Path) -> dict[int, epath.Path]:
    """Those of `step_folders` that look finished: an array tree is in them."""
    folders = step_folders(model_dir)
    return {step: path for step, path in folders.items() if _looks_finished(path)}


def _looks_finished(path: epath.Path) -> bool:
    if not path.is_dir():
        return path.is_file()
    if (path / "checkpoint").exists():
        return True
    # Buckets have no atomic rename: Orbax's marker file tells.
    whole = storage.is_local(path) or (path / "commit_success.txt").exists()
    return whole and find_item(path) is not None


def latest_checkpoint(model_dir: os.PathLike | str) -> epath.Path | None:
    """The finished checkpoint of the highest step in MODEL_DIR, or None."""
    folder = storage.absolute(model_dir)
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    latest = max(steps)
    for step, path in step_folders(folder).items():
        if step > latest and storage.is_local(path):  # in a bucket it may be a save under way
            _log.warning("%s holds no array tree: it is damaged, and is passed over", path)
    return steps[latest]


def check_name(reader: CheckpointReader) -> None:
    """Raises a ValueError where a checkpoint is named for another step than the one it holds: it
    was renamed, and a run would count from one of them and take its schedules from the other.
    """
    named = step_of(reader.path.name)
    if named is not None and STEP in reader.specs() and named != reader.step:
        raise ValueError(
            f"{reader.path} is named for step {named}, but it holds step {reader.step}:"
            f" rename it to {step_name(reader.step)}"
        )
