"""Groups of parameters that are trained in their own way: with another weight decay, another
learning rate, or not at all for some steps.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from upcycle_jax import axes, checks, trees
from upcycle_jax.training.run_start import StepOrStart, counted_from
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import PyTree

Kind = Literal["vector", "embedding", "output", "matrix"]
RoleName = Literal["dense", "expert", "shared_expert", "router", "router_bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Which parameters, and what is different for them. A parameter belongs to a group if it is of
    one of its roles, of one of its kinds, and its path fits; a condition that is None always holds.
    It may belong to several groups: each setting is that of the first one that states it.

    Attributes:
      roles: what a parameter is to the MoE: 'dense', 'expert', 'shared_expert', 'router',
        'router_bias'.
      kinds: what it is by its axes: 'vector' (norm scales and biases; those of experts too),
        'embedding' (the token embedding, also where it is the output projection), 'output' (an
        output projection of its own), 'matrix' (all others).
      paths: a regular expression that fits the path from end to end, e.g.
        r'decoder/layers_[0-3]/.*'.
      weight_decay: in place of the optimizer's.
      learning_rate_factor: of the schedule's learning rate.
      frozen: True: from `from_step` on, before `until_step`, neither the parameters nor their
        optimizer state change, in any bit; parameters that are frozen in every step have none.
        False: in those steps they are trained, whatever later
        groups say.
      from_step: first step of `frozen`, counted from `step_offset`.
      until_step: first step after it; None for no end.
      step_offset: the global step that steps of `frozen` count from, or 'start': the step at which
        the run started, also where it was resumed since.

    Raises:
      ValueError: a value out of range, a regular expression that is none, no step between
        `from_step` and `until_step`, or a group without any setting.
    """

    roles: tuple[RoleName, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    paths: str | None = None
    weight_decay: checks.NotNegative | None = None
    learning_rate_factor: checks.NotNegative | None = None
    frozen: bool | None = None
    from_step: checks.CountOrZero = 0
    until_step: checks.Count | None = None
    step_offset: StepOrStart = 0

    def __post_init__(self) -> None:
        for name in ("roles", "kinds"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        checks.check_fields(self)
        if self.paths is not None:
            try:
                re.compile(self.paths)
            except re.error as error:
                raise ValueError(
                    f"ParameterGroup.paths {self.paths!r} is no regular expression: {error}"
                ) from None
        if self.until_step is not None and self.until_step <= self.from_step:
            raise ValueError(
                f"ParameterGroup.until_step is {self.until_step} and from_step {self.from_step}:"
                " there is no step between them"
            )
        if self.weight_decay is None and self.learning_rate_factor is None and self.frozen is None:
            raise ValueError(
                "a ParameterGroup without weight_decay, learning_rate_factor or frozen changes"
                " nothing: set one of them, or leave the group out"
            )

    def holds(self, path: str, spec: LeafSpec) -> bool:
        """Whether a parameter belongs to it."""
        return (
            (self.roles is None or spec.role in self.roles)
            and (self.kinds is None or kind_of(spec) in self.kinds)
            and (self.paths is None or re.fullmatch(self.paths, path) is not None)
        )

    def started_at(self, step: int) -> "ParameterGroup":
        """This group in a run that started at a step."""
        # No step of the run is before its start: what is frozen from there on is frozen always.
        begins_with_run = self.step_offset == "start" and not self.from_step
        offset = 0 if begins_with_run and self.until_step is None else step
        return dataclasses.replace(self, step_offset=counted_from(self.step_offset, offset))


def kind_of(spec: LeafSpec) -> Kind:
    """What a parameter is by its axes; see `ParameterGroup.kinds`."""
    names = [name for name in spec.axes if name != axes.EXPERT]
    if len(names) < 2:
        return "vector"
    if axes.VOCAB not in names:
        return "matrix"
    return "embedding" if names[0] == axes.VOCAB else "output"


@dataclasses.dataclass(frozen=True)
class LeafSettings:
    """What the groups of one parameter say of it.

    Attributes:
      weight_decay: in place of the optimizer's; None: the optimizer's.
      learning_rate_factor: of the learning rate.
      freezing: the groups that say in which steps it is frozen, the first that speaks of a step
        decides.
    """

    weight_decay: float | None = None
    learning_rate_factor: float = 1.0
    freezing: tuple[ParameterGroup, ...] = ()

    @property
    def is_always_frozen(self) -> bool:
        """Whether it is never trained."""
        first = self.freezing[0] if self.freezing else None
        return first is not None and bool(first.frozen) and _spans_all(first)

    def held(self, before: Any, after: Any, step: jax.Array) -> Any:
        """A tree of arrays after the update from `step` on: `before`, bit for bit, where the
        parameter is frozen.
        """
        if self.is_always_frozen:
            return before
        if not any(group.frozen for group in self.freezing):
            return after
        frozen = self.is_frozen(step)
        return jax.tree.map(lambda old, new: jnp.where(frozen, old, new), before, after)

    def is_frozen(self, step: jax.Array) -> jax.Array:
        """Whether it is frozen in the update from `step` on, bool scalar."""
        frozen = jnp.zeros((), bool)
        for group in reversed(self.freezing):
            since = jnp.asarray(step) - counted_from(group.step_offset, None)
            within = since >= group.from_step
            if group.until_step is not None:
                within &= since < group.until_step
            frozen = jnp.where(within, bool(group.frozen), frozen)
        return frozen


def _spans_all(group: ParameterGroup) -> bool:
    return (
        group.from_step == 0
        and group.until_step is None
        and counted_from(group.step_offset, None) == 0
    )


PLAIN = LeafSettings()
"""Of a parameter that no group has."""


def settings_of(path: str, spec: LeafSpec, groups: Sequence[ParameterGroup]) -> LeafSettings:
    """What the groups say of one parameter."""
    mine = [group for group in groups if group.holds(path, spec)]
    if not mine:
        return PLAIN
    decays = [group.weight_decay for group in mine if group.weight_decay is not None]
    factors = [g.learning_rate_factor for g in mine if g.learning_rate_factor is not None]
    return LeafSettings(
        weight_decay=decays[0] if decays else None,
        learning_rate_factor=factors[0] if factors else 1.0,
        freezing=tuple(group for group in mine if group.frozen is not None),
    )


def with_stopped_gradients(
    params: PyTree, specs: Mapping[str, LeafSpec], groups: Sequence[ParameterGroup]
) -> PyTree:
    """The parameters, of which those that are never trained have no gradient: none is computed."""
    if not any(group.frozen for group in groups):
        return params
    flat = {
        path: (
            jax.lax.stop_gradient(leaf)
            if settings_of(path, specs[path], groups).is_always_frozen
            else leaf
        )
        for path, leaf in trees.flatten(params).items()
    }
    return trees.unflatten(flat)


def trained(specs: Mapping[str, LeafSpec], groups: Sequence[ParameterGroup]) -> dict[str, LeafSpec]:
    """Specs of the parameters that are trained in some step."""
    return {
        path: spec
        for path, spec in specs.items()
        if not settings_of(path, spec, groups).is_always_frozen
    }


def check(groups: Sequence[ParameterGroup], specs: Mapping[str, LeafSpec]) -> None:
    """Compares groups with the parameters of a model.

    Raises:
      ValueError: the paths of a group fit no parameter, or nothing would ever be trained.
    """
    for group in groups:
        if group.paths is not None and not any(group.holds(*item) for item in specs.items()):
            others = dataclasses.replace(group, roles=None, kinds=None)
            fits = any(others.holds(*item) for item in specs.items())
            what = " of its roles and kinds" if fits else ""
            raise ValueError(
                f"ParameterGroup.paths {group.paths!r} fits no parameter{what}, such as"
                f" {min(specs)}: it must fit a whole path (python -m upcycle_jax.model_info lists"
                " them)"
            )
    if specs and not trained(specs, groups):
        raise ValueError(
            "every parameter is frozen in every step (ParameterGroup.frozen): nothing would be"
            " trained"
        )
