"""Learning-rate schedules written as products of named factors, as in T5X."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from upcycle_jax import checks
from upcycle_jax.training.run_start import StepOrStart, counted_from

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
    step_offset: StepOrStart
    min_learning_rate: checks.NotNegative
    total_steps: checks.Count | None = None
    cooldown_steps: checks.CountOrZero = 0
    final_factor: checks.Share = 0.0
    timescale: checks.Count = 10_000

    def __post_init__(self) -> None:
        checks.check_fields(self)
        self._check_end()

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of the update that follows `step` updates, float32 scalar."""
        offset = counted_from(self.step_offset, None)
        since = jnp.maximum(0, jnp.asarray(step) - offset).astype(jnp.float32)
        held = since
        if _STRAIGHT in self.factors:
            held = jnp.minimum(since, self.num_steps - self.cooldown_steps)
        rate = jnp.ones((), jnp.float32)
        for name in self.factors:
            rate = rate * _FACTORS[name](self, since if name == _STRAIGHT else held)
        return jnp.maximum(rate, self.min_learning_rate).astype(jnp.float32)

    def started_at(self, step: int) -> "LearningRateSchedule":
        """This schedule in a run that started at a step, which an offset of 'start' then is.

        Raises:
          ValueError: the schedule ends before its decay begins.
        """
        return dataclasses.replace(self, step_offset=counted_from(self.step_offset, step))

    @property
    def num_steps(self) -> int:
        """Steps from the offset to the end, for factors that have one."""
        assert self.total_steps is not None
        return self.total_steps - counted_from(self.step_offset, None)

    def _check_end(self) -> None:
        ending = [name for name in self.factors if name in _END]
        if not ending:
            return
        if self.total_steps is None:
            raise ValueError(
                f"the factor {ending[0]} ends at total_steps, which is not set: bind"
                " create_learning_rate_scheduler.total_steps = %TRAIN_STEPS"
            )
        cooling = [name for name in ending if name != "cosine_anneal"]
        if cooling and not self.cooldown_steps:
            raise ValueError(
                f"the factor {cooling[0]} lasts cooldown_steps, which is 0: give the number of"
                " steps in which the learning rate falls"
            )
        warmed = {*_DIVIDE_BY_WARMUP, "cosine_anneal"} & set(self.factors)
        warmup = self.warmup_steps if warmed else 0
        if self.num_steps < warmup + (self.cooldown_steps if cooling else 1):
            last = f" and its cool-down {self.cooldown_steps}" if cooling else ""
            raise ValueError(
                f"the schedule has {self.num_steps} steps (from step"
                f" {counted_from(self.step_offset, None)} to total_steps {self.total_steps}), but"
                f" its warm-up takes {warmup}{last}: raise TRAIN_STEPS, or shorten them"
            )


def _linear_warmup(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return jnp.minimum(1.0, step / schedule.warmup_steps)


def _linear_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    past_warmup = 1.0 + schedule.decay_factor * (schedule.warmup_steps - step)
    warmup = step / schedule.warmup_steps
    return schedule.base_learning_rate * jnp.minimum(warmup, past_warmup)


def _rsqrt_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return 1.0 / jnp.sqrt(jnp.maximum(step, schedule.warmup_steps))


def _rsqrt_timescale(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    after = jnp.maximum(0.0, step - schedule.warmup_steps)
    return 1.0 / jnp.sqrt(1.0 + after / schedule.timescale)


def _cosine_decay(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    cycles = jnp.maximum(0.0, (step - schedule.warmup_steps) / schedule.steps_per_cycle)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))


def _cosine_anneal(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    decay = optax.cosine_decay_schedule(
        1.0, schedule.num_steps - schedule.warmup_steps, alpha=schedule.final_factor
    )
    return decay(jnp.maximum(0.0, step - schedule.warmup_steps))


def _cooled(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    """The share of the cool-down that is behind, 0 to 1."""
    first = schedule.num_steps - schedule.cooldown_steps
    return jnp.clip((step - first) / schedule.cooldown_steps, 0.0, 1.0)


def _linear_cooldown(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return 1.0 - (1.0 - schedule.final_factor) * _cooled(schedule, step)


def _sqrt_cooldown(schedule: LearningRateSchedule, step: jax.Array) -> jax.Array:
    return 1.0 - (1.0 - schedule.final_factor) * jnp.sqrt(_cooled(schedule, step))


_STRAIGHT = "straight_cooldown"
"""The factor during which the others stay as they are."""

_FACTORS: dict[str, Callable[[LearningRateSchedule, jax.Array], jax.Array]] = {
    "constant": lambda schedule, step: jnp.asarray(schedule.base_learning_rate, jnp.float32),
    "linear_warmup": _linear_warmup,
    "linear_decay": _linear_decay,
    "rsqrt_decay": _rsqrt_decay,
    "rsqrt_normalized_decay": (
        lambda schedule, step: _rsqrt_decay(schedule, step) * schedule.warmup_steps**0.5
    ),
    "rsqrt_timescale": _rsqrt_timescale,
    "decay_every": (
        lambda schedule, step: schedule.decay_factor ** (step // schedule.steps_per_decay)
    ),
    "cosine_decay": _cosine_decay,
    "cosine_anneal": _cosine_anneal,
    "linear_cooldown": _linear_cooldown,
    "sqrt_cooldown": _sqrt_cooldown,
    _STRAIGHT: _linear_cooldown,
}

_END = ("cosine_anneal", "linear_cooldown", "sqrt_cooldown", _STRAIGHT)
"""Factors that end at `total_steps`."""

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
    step_offset: StepOrStart = 0,
    min_learning_rate: checks.NotNegative = 1e-8,
    total_steps: checks.Count | None = None,
    cooldown_steps: checks.CountOrZero = 0,
    final_factor: checks.Share = 0.0,
    timescale: checks.Count = 10_000,
) -> LearningRateSchedule:
    """A schedule from factors joined by `*` (T5X's names and formulas).

    With s = max(0, step - step_offset):
      constant: base_learning_rate.
      linear_warmup: min(1, s / warmup_steps).
      linear_decay: base_learning_rate * min(s / warmup_steps, 1 + decay_factor * (warmup_steps -
        s)); contains the two above.
      rsqrt_decay: 1 / sqrt(max(s, warmup_steps)).
      rsqrt_normalized_decay: the same times sqrt(warmup_steps), so 1 until the end of the warm-up.
      rsqrt_timescale: 1 / sqrt(1 + max(0, s - warmup_steps) / timescale), big_vision's for vision
        transformers; with `constant * linear_warmup` it falls from the peak without a jump.
      decay_every: decay_factor ** (s // steps_per_decay).
      cosine_decay: half a cosine from 1 to 0 in every steps_per_cycle steps after the warm-up.

    Four more end at total_steps, and stay there; T = total_steps - step_offset:
      cosine_anneal: half a cosine from 1 at the end of the warm-up to final_factor at T; with
        `constant * linear_warmup` the usual schedule of language models.
      linear_cooldown: 1 until T - cooldown_steps, then a line to final_factor at T; with `constant
        * linear_warmup` it is warm-up, stable, decay (WSD).
      sqrt_cooldown: the same with 1 - (1 - final_factor) * sqrt(x), x the share of the cool-down
        that is done ("1-sqrt", Hägele et al. 2024, arXiv 2405.18392).
      straight_cooldown: as linear_cooldown, and all other factors stay as they are where it begins:
        whatever they are, the learning rate itself falls in a straight line (V-MoE's tail;
        `linear_cooldown`, with which they go on falling, is big_vision's).

    Continuing from a dense checkpoint keeps the global step, so the schedule goes on where the
    dense run left it; with step_offset 'start' it begins anew.

    Args:
      factors: names joined by `*`.
      base_learning_rate: value of `constant`.
      warmup_steps: length of the warm-up in steps.
      decay_factor: factor of `decay_every`; slope per step of `linear_decay`.
      steps_per_decay: period of `decay_every`.
      steps_per_cycle: period of `cosine_decay`; to end at zero, the number of steps after the
        warm-up.
      step_offset: the global step that is step 0 of the schedule (the restored step when
        fine-tuning), or 'start': the step at which the run started, also where it was resumed
        since.
      min_learning_rate: lower bound.
      total_steps: the global step at which the schedule ends, usually TRAIN_STEPS.
      cooldown_steps: length of the cool-down, the last steps before total_steps.
      final_factor: what the last four factors are at the end, 0.1 for a tenth of the peak.
      timescale: steps in which `rsqrt_timescale` falls to 1 / sqrt(2).

    Raises:
      ValueError: an unknown factor (the message lists the known ones), a value out of range, no
        warm-up where a factor divides by it, or no end where a factor needs one.
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
        total_steps,
        cooldown_steps,
        final_factor,
        timescale,
    )
