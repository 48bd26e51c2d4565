"""What every kind of conversion shares while it is planned: rows, uses, drops and faults."""

import abc
import functools
import re
from collections.abc import Mapping, Sequence

from upcycle_jax import axes
from upcycle_jax.layers import position_grids
from upcycle_jax.state_tree import (
    PARAM_STATES,
    STATE,
    STEP,
    TARGET,
    UNUSED_SHAPE,
    without_slots,
)
from upcycle_jax.surgery.operations import (
    Constant,
    Copy,
    InterpolatePositions,
    Operation,
    Zeros,
)
from upcycle_jax.surgery.plan import Dropped, Plan, Row
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.text import shorten
from upcycle_jax.trees import LeafSpec, Role

PARENT = re.compile(r"parent_(\d+)/(.+)")
ROUTING = (Role.ROUTER, Role.ROUTER_BIAS)

Specs = Mapping[str, LeafSpec]


def has_experts(tree: Specs) -> bool:
    """Whether a tree has leaves of experts."""
    return any(spec.role is Role.EXPERT for spec in tree.values())


def refuse_experts(source: Specs) -> None:
    """Raises ValueError where a source that should be dense has experts."""
    experts = sorted(
        (name for name, spec in source.items() if spec.role in (Role.EXPERT, *ROUTING)),
        key=lambda name: (PARAM_STATES in name, name),
    )
    if experts:
        raise ValueError(
            f"the source is a Mixture-of-Experts already ({len(experts)} leaves, e.g."
            f" {experts[0]}): upcycling happens once. Restore it without a recipe to continue it,"
            " give it more experts (MoreExperts), or merge it into a dense checkpoint first"
            " (MergeRecipe)."
        )


def parameter_of(slot: str) -> str:
    """Full path of the parameter that an optimizer slot belongs to."""
    return TARGET + slot.removeprefix(PARAM_STATES).rpartition("/")[0]


def _of_parameter(name: str) -> str:
    """Full path of the parameter that a leaf is, or belongs to."""
    return parameter_of(name) if name.startswith(PARAM_STATES) else name


class Matching(abc.ABC):
    """What every kind of conversion shares: collecting rows, uses, drops and faults."""

    def __init__(self, source: Specs, target: Specs, recipe: Recipe | MergeRecipe):
        self.source, self.target, self.recipe = source, target, recipe
        self.rows: list[Row] = []
        self.faults: list[str] = []
        self.remedies: list[str] = []
        self.drops: dict[str, str] = {}
        self.not_carried: set[str] = set()
        self.zeroed = tuple(re.compile(pattern) for pattern in getattr(recipe, "zeroed", ()))

    def plan(self) -> Plan:
        """The plan.

        Raises:
          ValueError: see `make_plan`.
        """
        self.check()
        self.check_zeroed()
        for path, spec in sorted(
            self.target.items(), key=lambda item: (item[0].startswith(STATE), item[0])
        ):
            if path == STEP:
                self.step(spec)
            elif path.startswith(PARAM_STATES):
                if not self.faults:  # Slots of parameters that do not fit would only repeat it.
                    self.slot(path, spec)
            elif self.is_zeroed(path):
                self.add(path, spec, Zeros(), ())
            else:
                self.parameter(path, spec)
        self.account()
        if self.faults:
            shown = shorten(self.faults, 40)
            remedy = "".join(f"\n{line}" for line in dict.fromkeys(self.remedies))
            raise ValueError(
                "the source checkpoint does not fit the target model:\n" + "\n".join(shown) + remedy
            )
        dropped = tuple(
            Dropped(name, self.source[name], reason) for name, reason in sorted(self.drops.items())
        )
        return Plan(tuple(self.rows), dropped, self.recipe)

    @abc.abstractmethod
    def check(self) -> None:
        """Raises a ValueError where the two trees are not of this kind of conversion."""

    def check_zeroed(self) -> None:
        """Raises ValueError where the recipe starts nothing of the target at zero that it names."""
        parameters = [path.removeprefix(TARGET) for path in self.target if path.startswith(TARGET)]
        for pattern in self.zeroed:
            if not any(pattern.fullmatch(path) for path in parameters):
                raise ValueError(
                    f"Recipe.zeroed: {pattern.pattern!r} fits no parameter of the model, such as"
                    f" {min(parameters, default='none')}: it must fit a whole path (python -m"
                    " upcycle_jax.model_info lists them)"
                )

    def is_zeroed(self, path: str) -> bool:
        """Whether the recipe starts a parameter, by full path, at zero."""
        bare = path.removeprefix(TARGET)
        return any(pattern.fullmatch(bare) for pattern in self.zeroed)

    @abc.abstractmethod
    def parameter(self, path: str, spec: LeafSpec) -> None:
        """Adds the row of a parameter of the target."""

    @abc.abstractmethod
    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        """How an optimizer slot of the target is made that does not start afresh, and of what."""

    @abc.abstractmethod
    def is_converted(self, slot: str) -> bool:
        """Whether a source slot belongs to a parameter that does not stay as it is."""

    def slot(self, path: str, spec: LeafSpec) -> None:
        """Adds the row of an optimizer slot of the target."""
        if self.recipe.optimizer_state == "reset" or self.is_zeroed(parameter_of(path)):
            self.add(path, spec, Zeros(), ())
            return
        if not any(name.startswith(PARAM_STATES) for name in self.source):
            self.faults.append(
                f"- {path} {spec} (in the target, the source has no optimizer state)"
            )
            self.remedies.append("Remedy: set Recipe.optimizer_state = 'reset'.")
            return
        operation, sources = self.slot_origin(path, spec)
        if sources and parameter_of(sources[0]) in self.regridded:
            operation, sources = Zeros(), ()
        if sources and self.is_frozen_on_one_side(path, sources[0]):
            self.not_carried.update(sources)
            operation, sources = Zeros(), ()
        # A slot of shape (1,) is Adafactor's mark for "unused": it is carried as it is, never
        # tiled.
        if (
            sources
            and sources[0] in self.source
            and self.source[sources[0]].shape == UNUSED_SHAPE
            and spec.shape == UNUSED_SHAPE
        ):
            operation = Copy()
        self.add(
            path,
            spec,
            operation,
            sources,
            "Remedy: the optimizers differ; set OPTIMIZER to the source's, or"
            " Recipe.optimizer_state = 'reset'.",
        )

    def is_frozen_on_one_side(self, slot: str, source: str) -> bool:
        """Whether either a slot's parameter or that of its source, not both, is frozen for good,
        so that it has no optimizer state.
        """
        return (parameter_of(slot) in self._target_without_slots) != (
            parameter_of(source) in self._source_without_slots
        )

    @functools.cached_property
    def _target_without_slots(self) -> frozenset[str]:
        return frozenset(f"{TARGET}{path}" for path in without_slots(self.target))

    @functools.cached_property
    def _source_without_slots(self) -> frozenset[str]:
        return frozenset(f"{TARGET}{path}" for path in without_slots(self.source))

    def carry(self, path: str, spec: LeafSpec, source: str) -> None:
        """Adds the row of a parameter that stays: as it is or, of positions of patches, on the grid
        of the target's images.
        """
        found = self.source.get(source)
        if found is None or not self.is_regridded(spec, found):
            self.add(path, spec, Copy(), (source,), _remedy_of_classes(path, spec, found))
            return
        method = getattr(self.recipe, "position_interpolation", None)
        if method is None:
            remedy = (
                "Remedy: images of the model have another size than the source's: set IMAGE_SIZE to"
                " the source's, or Recipe.position_interpolation = 'bilinear' (as big_vision and"
                " V-MoE), 'bicubic' (Hugging Face) or 'bicubic_antialiased' (timm)."
            )
            self.add(path, spec, Copy(), (source,), remedy)
            return
        try:
            before, after = (position_grids.side(one.shape[1]) for one in (found, spec))
        except ValueError as error:
            self.faults.append(f"! {path}: {error}")
            return
        self.add(path, spec, InterpolatePositions(method, before, after), (source,))

    def is_regridded(self, spec: LeafSpec, source: LeafSpec) -> bool:
        """Whether a parameter holds positions, and of another number of patches than its source."""
        return axes.POSITIONS in spec.axes and spec.shape != source.shape

    @property
    def regridded(self) -> frozenset[str]:
        """Source leaves of positions that are interpolated."""
        return frozenset(
            name
            for row in self.rows
            if isinstance(row.operation, InterpolatePositions)
            for name in row.sources
        )

    def step(self, spec: LeafSpec) -> None:
        """Adds the row of the training step."""
        unknown = self.recipe.step == "keep_or_zero" and self.step_source() not in self.source
        if self.recipe.step == "reset" or unknown:
            self.add(STEP, spec, Zeros(), ())
        elif isinstance(self.recipe.step, int):
            self.add(STEP, spec, Constant(self.recipe.step), ())
        else:
            self.add(
                STEP,
                spec,
                Copy(),
                (self.step_source(),),
                "Remedy: a source without a step needs Recipe.step = 'reset' or a number.",
            )

    def step_source(self) -> str:
        """The source leaf that holds the step."""
        return STEP

    def add(
        self,
        path: str,
        spec: LeafSpec,
        operation: Operation,
        sources: Sequence[str],
        remedy: str = "",
        layer: str = "",
    ) -> None:
        """Adds a row, or the fault that stands in its way with `remedy`."""
        absent = [name for name in sources if name not in self.source]
        if absent:
            self.faults.append(
                f"- {path} {spec} (in the target, the source has no {' or '.join(absent)})"
            )
            self.remedies.append(
                remedy
                or "Remedy: choose the model file that belongs to the source; a deeper target needs"
                " Recipe.depth."
            )
            return
        specs = tuple(self.source[name] for name in sources)
        unequal = sorted({str(list(s.shape)) for s in specs})
        try:
            result = (
                operation.result_shape([s.shape for s in specs], spec.shape)
                if len(unequal) < 2 or operation.joins_shapes
                else None
            )
        except ValueError as error:
            self.faults.append(f"! {path}: {error}")
            return
        if result is None:
            self.faults.append(f"! {path}: the sources differ in shape: {', '.join(unequal)}")
        elif tuple(result) != spec.shape:
            given = ", ".join(map(str, specs)) or "no source"
            self.faults.append(
                f"! {path}: {operation.name} of {given} gives shape {list(result)}, the target has"
                f" {list(spec.shape)}"
            )
            self.remedies.append(
                remedy
                or "Remedy: choose the model file of the source's size, or the source of the"
                " model's."
            )
        self.rows.append(Row(path, spec, operation, tuple(sources), specs, layer))

    def account(self) -> None:
        """Every source leaf is used, dropped for a reason, or a fault."""
        used = {name for row in self.rows for name in row.sources}
        parameters_fit = not self.faults
        drop = [re.compile(pattern) for pattern in getattr(self.recipe, "drop", ())]
        for name, spec in self.source.items():
            if name in used or (not parameters_fit and PARAM_STATES in name):
                continue
            bare = PARENT.fullmatch(name)
            bare_name = bare.group(2) if bare else name
            reason = self.drop_reason(bare_name, spec)
            if reason is None and self.is_zeroed(_of_parameter(bare_name)):
                reason = "the recipe starts it at zero"
            if reason is None and any(pattern.fullmatch(name) for pattern in drop):
                reason = "named in Recipe.drop"
            if reason is not None:
                self.drops[name] = reason
            else:
                self.faults.append(f"+ {name} {spec} (in the source, no use in the target)")
                self.remedies.append(
                    "Remedy for leaves of the source only: name them in Recipe.drop if they may be"
                    " lost."
                )

    def drop_reason(self, name: str, spec: LeafSpec) -> str | None:
        """Why a source leaf that no row uses may be dropped; None where it may not."""
        if name == STEP:
            return (
                "the step is set by the recipe"
                if STEP in self.target
                else "the target keeps no step"
            )
        if name.startswith(PARAM_STATES):
            if not any(path.startswith(PARAM_STATES) for path in self.target):
                return "the target keeps no optimizer state"
            if self.recipe.optimizer_state == "reset":
                return "optimizer state starts afresh"
            if parameter_of(name) in self.regridded:
                return "slots of interpolated positions start afresh"
            if name in self.not_carried:
                return "slots of frozen parameters are not kept"
            if self.recipe.optimizer_state == "dense_only" and self.is_converted(name):
                return "slots of converted MLPs start afresh"
        return None


def _remedy_of_classes(path: str, spec: LeafSpec, source: LeafSpec | None) -> str:
    """What to do where a head has other classes than the source's; '' for other parameters."""
    if spec.axes[-1:] != (axes.CLASSES,) or (source is not None and source.shape == spec.shape):
        return ""
    pattern = f"{path.removeprefix(TARGET).rpartition('/')[0]}/.*"
    head = f"Recipe.zeroed = '{pattern}' for a new head"
    if source is None:
        return f"Remedy: the source has no head: set NUM_CLASSES = 0, or {head}."
    return (
        f"Remedy: the source's head has {source.shape[-1]} classes, the model's {spec.shape[-1]}:"
        f" set NUM_CLASSES = {source.shape[-1]}, or {head}."
    )
