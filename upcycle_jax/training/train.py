"""Training from the first check to the last checkpoint, as gin files configure it: `train`."""

import dataclasses
import logging

from upcycle_jax.printing import show
from upcycle_jax.training import description, full_disk, garbage, holding, loop, prepare
from upcycle_jax.training.interrupts import StopRequest
from upcycle_jax.training.loop import TrainResult
from upcycle_jax.training.prepare import PreparedRun
from upcycle_jax.training.train_settings import TrainSettings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(TrainSettings):
    """Trains a model, going on where an earlier run in the same MODEL_DIR stopped. `TrainSettings`
    has the attributes.

    On one mesh a run that was killed and resumed gives the same losses, bit for bit, as one that
    was not: the data position, the step (from which dropout keys follow), parameters and optimizer
    state are all in the checkpoint.
    """

    def run(self, *, dry_run: bool = False) -> TrainResult:
        """Checks the run, then trains.

        Args:
          dry_run: print the plan of the run and return; nothing is written.

        Raises:
          FileNotFoundError: the checkpoint to start from does not exist.
          ValueError: the configuration cannot run; nothing was written. `InUseError`: another
            training is at work in MODEL_DIR; `LeaseLostError`: another one has taken it over.
            `DiskFullError`: a checkpoint, metrics or the manifest did not fit; the same run goes on
            where there is room. `NonFiniteLossError`: the loss became NaN. `LossSpikeError`: it
            rose far above those before it, and the trainer says to stop then.
        """
        garbage.pause()  # Until the loop begins.
        try:
            return self._run(dry_run=dry_run)
        finally:
            garbage.resume()

    def _run(self, *, dry_run: bool) -> TrainResult:
        """See `run`."""
        prepared = prepare.prepare(self)
        if dry_run:
            show(description.describe(prepared, description.costs(prepared)))
            return _as_it_stands(prepared)
        if prepared.source.step >= self.total_steps:
            return _nothing_to_do(prepared)
        kept = "Finished checkpoints are whole"
        with (
            full_disk.explained(f"MODEL_DIR {self.model_dir}", kept=kept),
            holding.hold_model_dir(self.folder) as hold,
        ):
            prepared = prepare.looked_at_again(prepared)  # Another run may have gone on until now.
            if prepared.source.step >= self.total_steps:
                return _nothing_to_do(prepared)
            cost = description.costs(prepared)
            _log.info("%s", description.describe(prepared, cost, whole_plan=False))
            with StopRequest() as stop:
                return loop.train_prepared(prepared, cost, stop, hold)


def _as_it_stands(prepared: PreparedRun) -> TrainResult:
    return TrainResult(step=prepared.source.step, start=str(prepared.source.start))


def _nothing_to_do(prepared: PreparedRun) -> TrainResult:
    _log.info(
        "%s is at step %d of %d already: nothing to do",
        prepared.settings.folder,
        prepared.source.step,
        prepared.settings.total_steps,
    )
    return _as_it_stands(prepared)
