"""Learning-rate schedules written as products of named factors, as in T5X."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from upcycle_jax import checks

DEFAULT_FACTORS = "constant * linear_warmup * rsqrt_decay"


@dataclasses.dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate as a function of the global step; built by
    `create_learning_rate_scheduler`.

    Attributes are the arguments of that function.
    """

    factors: tuple[str, ...]
    base_learning_rate: checks.NotNegative
    warmup_steps: checks.CountOrZero
    decay_factor: checks.NotNegative
    steps_per_decay: checks.Count
    steps_per_cycle: checks.Count
    step_offset: checks.CountOrZero
    min_learning_rate: checks.NotNegative

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of the update that follows `step` updates, float32 scalar."""
        since = jnp.maximum(0, jnp.asarray(step) - self.step_offset).astype(jnp.float32)
        rate = jnp.ones((), jnp.float32)
        for name in self.factors:
            rate = rate * _FACTORS[name](self, since)
        return jnp.maximum(rate, self.min_learning_rate).astype(jnp.float32)


def _linear_warmup(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return jnp.minimum(1.0, step / schedule.warmup_steps)


def _linear_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    past_warmup = 1.0 + schedule.decay_factor * (schedule.warmup_steps - step)
    warmup = step / schedule.warmup_steps
    return schedule.base_learning_rate * jnp.minimum(warmup, past_warmup)


def _rsqrt_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return 1.0 / jnp.sqrt(jnp.maximum(step, schedule.warmup_steps))


def _cosine_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    cycles = jnp.maximum(0.0, (step - schedule.warmup_steps) / schedule.steps_per_cycle)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))


_FACTORS: dict[str, Callable[[LearningRateSchedule, jax.Array], jax.Array]] = {
    "constant": lambda schedule, step: jnp.asarray(schedule.base_learning_rate, jnp.float32),
    "linear_warmup": _linear_warmup,
    "linear_decay": _linear_decay,
    "rsqrt_decay": _rsqrt_decay,
    "rsqrt_normalized_decay": (
        lambda schedule, step: _rsqrt_decay(schedule, step) * schedule.warmup_steps**0.5
    ),
    "decay_every": (
        lambda schedule, step: schedule.decay_factor ** (step // schedule.steps_per_decay)
    ),
    "cosine_decay": _cosine_decay,
}


_DIVIDE_BY_WARMUP = (
    "linear_warmup",
    "linear_decay",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
)


def create_learning_rate_scheduler(
    factors: str = DEFAULT_FACTORS,
    *,
    base_learning_rate: checks.NotNegative = 0.5,
    warmup_steps: checks.CountOrZero = 1000,
    decay_factor: checks.NotNegative = 0.5,
    steps_per_decay: checks.Count = 20000,
    steps_per_cycle: checks.Count = 100000,
    step_offset: checks.CountOrZero = 0,
    min_learning_rate: checks.NotNegative = 1e-8,
) -> LearningRateSchedule:
    """A schedule from factors joined by `*` (T5X's names and formulas).

    With s = max(0, step - step_offset):
      constant: base_learning_rate.
      linear_warmup: min(1, s / warmup_steps).
      linear_decay: base_learning_rate * min(s / warmup_steps, 1 + decay_factor * (warmup_steps -
        s)); contains the two above.
      rsqrt_decay: 1 / sqrt(max(s, warmup_steps)).
      rsqrt_normalized_decay: the same times sqrt(warmup_steps), so 1 until the end of the warm-up.
      decay_every: decay_factor ** (s // steps_per_decay).
      cosine_decay: half a cosine from 1 to 0 in every steps_per_cycle steps after the warm-up.

    Continuing from a dense checkpoint keeps the global step, so the schedule goes on where the
    dense run left it.

    Args:
      factors: names joined by `*`.
      base_learning_rate: value of `constant`.
      warmup_steps: length of the warm-up in steps.
      decay_factor: factor of `decay_every`; slope per step of `linear_decay`.
      steps_per_decay: period of `decay_every`.
      steps_per_cycle: period of `cosine_decay`; to end at zero, the number of steps after the
        warm-up.
      step_offset: the global step that is step 0 of the schedule (the restored step when
        fine-tuning).
      min_learning_rate: lower bound.

    Raises:
      ValueError: an unknown factor (the message lists the known ones), a value out of range, or no
        warm-up where a factor divides by it.
    """
    names = tuple(name.strip() for name in factors.split("*"))
    for name in names:
        if name not in _FACTORS:
            raise ValueError(
                f"unknown learning-rate factor {name!r} in {factors!r}; known factors:"
                f" {', '.join(sorted(_FACTORS))}"
            )
    divided = [name for name in names if name in _DIVIDE_BY_WARMUP]
    if warmup_steps < 1 and divided:
        raise ValueError(
            f"warmup_steps (WARMUP_STEPS) is {warmup_steps}, by which {' and '.join(divided)} would"
            " divide: give at least 1, or leave those factors out"
        )
    return LearningRateSchedule(
        names,
        base_learning_rate,
        warmup_steps,
        decay_factor,
        steps_per_decay,
        steps_per_cycle,
        step_offset,
        min_learning_rate,
    )
