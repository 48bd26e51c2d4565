"""When and what a run saves."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointManager
from upcycle_jax.checkpoints.checksums import device_summaries
from upcycle_jax.checkpoints.verification import NonFiniteParameterError, not_finite
from upcycle_jax.data import BatchIterator
from upcycle_jax.state_tree import TARGET
from upcycle_jax.text import duration
from upcycle_jax.training.config import SaveCheckpointConfig
from upcycle_jax.training.holding import Hold
from upcycle_jax.training.train_state import TrainState

_log = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints in MODEL_DIR, or does nothing where saving is off.

    Args:
      model_dir: the run's folder.
      config: when to save and what to keep.
      hold: the right to write there, looked at before each save.
    """

    def __init__(self, model_dir: epath.Path, config: SaveCheckpointConfig | None, hold: Hold):
        self._model_dir, self._config, self._hold = model_dir, config, hold
        self.manager: CheckpointManager
        self.last_step: int | None = None

    def __enter__(self) -> "Saver":
        self.reopen()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.manager.close()
        except Exception:
            # What stopped the run is the error to show: a new holder may have removed the save.
            if exception[0] is None:
                raise
            _log.warning("the save under way did not end well", exc_info=self._hold.is_lost)

    def check(self) -> None:
        """Raises what a save in the background has failed with."""
        self.manager.check()

    def reopen(self) -> None:
        """Opens the manager, anew where checkpoints were moved behind its back."""
        if hasattr(self, "manager"):
            self.manager.close()
        config = self._config or SaveCheckpointConfig()
        self.manager = CheckpointManager(
            self._model_dir, keep=config.keep, keep_period=config.keep_period
        )

    def due(self, step: int) -> bool:
        """Whether the period asks for a save after `step`."""
        return self._config is not None and step % self._config.period == 0

    def save(
        self, state: TrainState, step: int, iterator: BatchIterator, metadata: Mapping[str, Any]
    ) -> None:
        """Starts a save; the state may be donated when this returns.

        Raises:
          NonFiniteParameterError: parameters hold NaN or infinite values, which a save would keep
            in the place of a good checkpoint.
        """
        if self._config is None or self.last_step == step:
            return
        self._hold.require(look=True)
        dataset = iterator if self._config.save_dataset else None
        started = time.monotonic()
        arrays = _arrays(state, self._config.dtype)
        checksums, summed = None, ""
        if self._config.checksums:
            checksums = _checksums(arrays, step)
            summed = f", {time.monotonic() - started:.2f} s of it for {len(checksums)} checksums"
        self.manager.save(step, arrays, dataset=dataset, metadata=metadata, checksums=checksums)
        self.last_step = step
        _log.info(
            "saving checkpoint_%d (held up the run for %s%s)",
            step,
            duration(time.monotonic() - started),
            summed,
        )


def _checksums(arrays: dict[str, Any], step: int) -> dict[str, str]:
    """The checksums of all leaves of the tree to save, by full path.

    Raises:
      NonFiniteParameterError: parameters hold NaN or infinite values.
    """
    flat, summaries = trees.flatten(arrays), device_summaries(arrays)
    for path, summary in summaries.items():
        if summary.nonfinite:
            what = not_finite(path, flat[path], summary.nonfinite)
            if path.startswith(TARGET):
                raise NonFiniteParameterError(
                    f"step {step}: {what}, so the step is not saved; the last checkpoint is from"
                    " before it. Lower the learning rate"
                )
            _log.warning("step %d: %s", step, what)
    return {path: summary.checksum for path, summary in summaries.items()}


def _arrays(state: TrainState, dtype: str) -> dict[str, Any]:
    """The tree to save; parameters in `dtype`, optimizer state as it is."""
    tree = state.state_dict()
    if dtype != "float32":
        tree["target"] = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), tree["target"])
    return tree
