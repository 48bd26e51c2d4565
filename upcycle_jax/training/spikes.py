"""Loss spikes: steps whose loss lies far above what the last steps had, by a measure that spikes
themselves hardly move.
"""

import collections
import dataclasses
import enum
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np

from upcycle_jax import checks

STEPS_BEHIND = 3
"""The limit of a step is made of losses up to this many steps before it: those that the host has
surely seen when it dispatches the step, so that the limit depends on the step alone and not on
timing.
"""

SIGMA_PER_MAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

LEAST_SIGMA = 0.01
"""Share of the median below which the spread is not believed: a window of equal losses would make
any other loss a spike.
"""


class OnSpike(enum.StrEnum):
    """What happens at a step whose loss is a spike."""

    STOP = "stop"
    SKIP = "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpikes:
    """What counts as a loss spike, and what happens then.

    A step's loss is a spike where it is above

        median + factor * max(1.4826 * MAD, 0.01 * |median|)

    of the losses of the `window` steps that end three steps before it; MAD is their median absolute
    deviation. Nothing is a spike before half a window of losses is known. Spikes enter the window
    like other losses: up to half of it may be spikes without moving the limit much, and where the
    loss has risen for good the limit follows after half a window.

    The window is saved with each checkpoint, so that a resumed run judges as the uninterrupted one.

    Attributes:
      policy: 'stop' ends the run with the batch's fingerprint saved; 'skip' leaves parameters and
        optimizer state as they were and goes on with the next batch.
      window: steps that the limit is made of.
      factor: how many (robust) standard deviations above the median a spike lies. Batches of very
        different kinds want a larger one.

    Raises:
      ValueError: a value out of range.
    """

    policy: str = OnSpike.STOP
    window: Annotated[int, checks.Range(at_least=4, at_most=2**20)] = 128
    factor: checks.Positive = 10.0

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.policy not in list(OnSpike):
            raise ValueError(
                f"LossSpikes.policy is {self.policy!r}: choose 'stop' or 'skip', or set"
                " Trainer.loss_spikes to None"
            )


def spike_limit(losses: Sequence[float], *, factor: float) -> float:
    """The highest loss that is no spike after these.

    The median is 2.0, the deviations from it are 0, 0.1, 0.1, 0 and 7, their median is 0.1:

    >>> f"{spike_limit([2.0, 2.1, 1.9, 2.0, 9.0], factor=10.0):.4f}"
    '3.4826'
    """
    median = statistics.median(losses)
    deviation = statistics.median(abs(loss - median) for loss in losses)
    return median + factor * max(SIGMA_PER_MAD * deviation, LEAST_SIGMA * abs(median))


class LossHistory:
    """The losses of the last steps, and the limit that follows from them.

    Args:
      spikes: window and factor.
      known: (step, loss) of earlier steps, from a checkpoint.
    """

    def __init__(self, spikes: LossSpikes, known: Iterable[Sequence[float]] = ()):
        self.spikes = spikes
        self._losses: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=spikes.window + STEPS_BEHIND
        )
        for step, loss in known:
            self.add(int(step), float(loss))

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of the update that led to `step`; one that is not a number is left out."""
        if math.isfinite(loss):
            self._losses.append((step, loss))

    def limit(self, step: int) -> float:
        """The highest loss of the update that leads to `step` that is no spike, a float32 number;
        infinite while too few are known.
        """
        losses = [loss for at, loss in self._losses if at <= step - STEPS_BEHIND][
            -self.spikes.window :
        ]
        return (
            float(np.float32(spike_limit(losses, factor=self.spikes.factor)))
            if 2 * len(losses) >= self.spikes.window
            else math.inf
        )

    def record(self) -> list[list[float]]:
        """(step, loss) pairs for a checkpoint; JSON keeps every digit."""
        return [[step, loss] for step, loss in self._losses]
