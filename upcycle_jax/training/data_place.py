"""Where in its data a run starts."""

import json
import logging

from etils import epath

from upcycle_jax.checkpoints.manager import CheckpointManager, saved_process_folder
from upcycle_jax.checkpoints.verification import DamagedCheckpointError, check_digests
from upcycle_jax.data import BatchIterator
from upcycle_jax.data.position import DamagedPositionError
from upcycle_jax.training.config import DataPosition
from upcycle_jax.training.restore import Source, Start

_log = logging.getLogger(__name__)


def place(
    source: Source,
    iterator: BatchIterator,
    manager: CheckpointManager | None = None,
    *,
    first_batch: int = 0,
) -> None:
    """Moves the training data to where the run starts: batch first_batch + k feeds the update from
    step k to k + 1.

    A checkpoint without a data position (saved elsewhere) falls back to the batch of its step.

    Raises:
      DamagedCheckpointError: the position was saved and is damaged.
      ValueError: it belongs to other data.
    """
    if source.data_position == DataPosition.CHECKPOINT:
        try:
            if source.start == Start.RESUME:
                assert manager is not None
                _restore_own(source, iterator, manager)
            else:
                _restore_foreign(source, iterator)
            return
        except FileNotFoundError as error:
            if source.start != Start.RESUME:
                raise
            _log.warning(
                "%s; the data starts at batch %d instead", error, first_batch + source.step
            )
    position = expected_batch(source, first_batch=first_batch)
    if position:
        iterator.seek(position)


def expected_batch(source: Source, *, first_batch: int) -> int:
    """The batch that a run begins with, where no checkpoint says another."""
    return first_batch + (0 if source.data_position == DataPosition.START else source.step)


def _restore_own(source: Source, iterator: BatchIterator, manager: CheckpointManager) -> None:
    try:
        manager.restore_dataset(source.step, iterator, verify=source.verify)
    except (DamagedCheckpointError, FileNotFoundError):
        raise
    except (DamagedPositionError, json.JSONDecodeError, TypeError, LookupError) as error:
        raise DamagedCheckpointError(f"{source.path}: the data position: {error}") from error


def _restore_foreign(source: Source, iterator: BatchIterator) -> None:
    assert source.path is not None
    try:
        folder = saved_process_folder(epath.Path(source.path) / "dataset")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Set RestoreCheckpointConfig.data_position to 'step' or 'start'"
        ) from error
    if source.verify:
        check_digests(folder, epath.Path(source.path))
    iterator.restore(folder)
