"""What a run does to the parameters at each step, as configuration."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal

import jax

from upcycle_jax import checks
from upcycle_jax.training.optimizers import Optimizer
from upcycle_jax.training.parameter_groups import ParameterGroup
from upcycle_jax.training.run_start import Starts
from upcycle_jax.training.spikes import LossSpikes


class NonFinite(enum.StrEnum):
    """What happens at a step whose loss or gradient norm is NaN or infinite."""

    STOP = "stop"
    SKIP = "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Optimizer, schedule and the way in which gradients are gathered.

    Attributes:
      optimizer: `Adafactor`, `AdamW`, `BigVisionAdafactor` or `Sgd`.
      learning_rate_fn: global step -> learning rate, e.g. from `create_learning_rate_scheduler`.
      num_microbatches: split each batch into this many parts that are differentiated one after the
        other, for less activation memory; None is 1. The loss and the gradients are those of the
        whole batch, up to dropout masks, as long as experts are routed in the same groups: what
        becomes of the others, `microbatch_groups` says.
      microbatch_groups: what happens where the routing groups of a microbatch are not those of the
        batch, as where a microbatch has fewer tokens than GROUP_SIZE. 'of_batch': the run is
        refused, with the GROUP_SIZE that would do. 'of_microbatch': each microbatch is routed on
        its own, so the number of microbatches changes the loss, as in T5X; the log says so. In T5X
        mode (`MoeConfig.t5x_mode`) it is that whatever the setting.
      non_finite: 'stop' ends the run with the batch's fingerprint saved; 'skip' leaves parameters
        and optimizer state as they were and goes on with the next batch.
      loss_spikes: what counts as a loss spike and what happens then, or None: finite losses are not
        looked at.
      parameter_groups: parameters with another weight decay or learning rate, or that are frozen:
        each setting of a parameter is that of the first group of it that states the setting.
      max_gradient_norm: gradients whose norm over all trained parameters is larger are scaled down
        to it before the optimizer sees them; None: never. The metric grad_norm is the norm before.
    """

    optimizer: Optimizer
    learning_rate_fn: Callable[[jax.Array], jax.Array]
    num_microbatches: checks.Size | None = None
    microbatch_groups: Literal["of_batch", "of_microbatch"] = "of_batch"
    non_finite: str = NonFinite.STOP
    loss_spikes: LossSpikes | None = None
    parameter_groups: tuple[ParameterGroup, ...] = ()
    max_gradient_norm: checks.Positive | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameter_groups", tuple(self.parameter_groups))
        checks.check_fields(self)
        if self.num_microbatches is not None and self.num_microbatches < 1:
            raise ValueError(
                f"Trainer.num_microbatches is {self.num_microbatches}: give a positive number, or"
                " None for 1"
            )
        if self.non_finite not in list(NonFinite):
            raise ValueError(f"Trainer.non_finite is {self.non_finite!r}: choose 'stop' or 'skip'")

    @property
    def counts_from_start(self) -> bool:
        """Whether any of its steps count from the start of the run."""
        return any(getattr(part, "step_offset", 0) == "start" for part in self._with_offsets)

    def started_at(self, starts: Starts) -> "Trainer":
        """This trainer in a run: what counts from 'start' counts from there.

        Raises:
          ValueError: the schedule ends before its decay begins.
        """
        schedule: Any = self.learning_rate_fn
        return dataclasses.replace(
            self,
            optimizer=self.optimizer.started_at(starts.state),
            learning_rate_fn=(
                schedule.started_at(starts.run) if hasattr(schedule, "started_at") else schedule
            ),
            parameter_groups=tuple(group.started_at(starts.run) for group in self.parameter_groups),
        )

    @property
    def _with_offsets(self) -> tuple[Any, ...]:
        return (self.optimizer, self.learning_rate_fn, *self.parameter_groups)
