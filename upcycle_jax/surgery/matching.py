"""From two trees of specs and a recipe to a plan, or to one error that shows what does not fit on
both sides.

Target first: every target leaf gets exactly one origin; every source leaf is used or dropped by
name. What a leaf is, and which dense leaf it comes from, its spec says (`role`, `twin`).
"""

import abc
import functools
import os.path
import re
from collections.abc import Mapping, Sequence

from upcycle_jax.layers.mlp import hidden_axis
from upcycle_jax.models import layer_names
from upcycle_jax.state_tree import PARAM_STATES, STATE, STEP, TARGET
from upcycle_jax.surgery.operations import (
    Constant,
    Copy,
    FirstUnits,
    Mean,
    MergeExperts,
    Operation,
    PickExpert,
    Tile,
    Zeros,
)
from upcycle_jax.surgery.plan import Dropped, Plan, Row
from upcycle_jax.surgery.recipe import MergeRecipe, ParentExperts, Recipe
from upcycle_jax.text import shorten
from upcycle_jax.trees import LeafSpec, Role

PLACEHOLDER = (1,)
PARENT = re.compile(r"parent_(\d+)/(.+)")
ROUTING = (Role.ROUTER, Role.ROUTER_BIAS)
FRESH = (*ROUTING, Role.SHARED_GATE)
"""What no dense model has."""

Specs = Mapping[str, LeafSpec]


def make_plan(
    source_specs: Specs, target_specs: Specs, recipe: Recipe | MergeRecipe | None = None
) -> Plan:
    """Plans the conversion of a checkpoint into a target model.

    Args:
      source_specs: full path -> spec of the source; of several dense parents, as `parents.join`
        names them ('parent_0/target/...').
      target_specs: full path -> spec of the target (`state_tree.specs`): which layers are sparse,
        how wide experts are and which slots exist follows from it.
      recipe: the choices; None: `Recipe()`, the paper's for language.

    Raises:
      ValueError: the source has experts already, leaves on either side are without counterpart,
        shapes do not fit, or the recipe does not suit the two trees. The message names the leaves
        of both sides and the remedy.
    """
    source, target = dict(source_specs), dict(target_specs)
    recipe = recipe if recipe is not None else Recipe()
    matching: _Matching
    if isinstance(recipe, MergeRecipe):
        matching = _Merging(source, target, recipe)
    elif isinstance(recipe.expert_init, ParentExperts):
        matching = _Parents(source, target, recipe, recipe.expert_init)
    else:
        matching = _Upcycling(source, target, recipe)
    return matching.plan()


def _parameter_of(slot: str) -> str:
    """Full path of the parameter that an optimizer slot belongs to."""
    return TARGET + slot.removeprefix(PARAM_STATES).rpartition("/")[0]


class _Matching(abc.ABC):
    """What every kind of conversion shares: collecting rows, uses, drops and faults."""

    def __init__(self, source: Specs, target: Specs, recipe: Recipe | MergeRecipe):
        self.source, self.target, self.recipe = source, target, recipe
        self.rows: list[Row] = []
        self.faults: list[str] = []
        self.remedies: list[str] = []
        self.drops: dict[str, str] = {}

    def plan(self) -> Plan:
        """The plan.

        Raises:
          ValueError: see `make_plan`.
        """
        self.check()
        for path, spec in sorted(
            self.target.items(), key=lambda item: (item[0].startswith(STATE), item[0])
        ):
            if path == STEP:
                self.step(spec)
            elif path.startswith(PARAM_STATES):
                if not self.faults:  # Slots of parameters that do not fit would only repeat it.
                    self.slot(path, spec)
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
        if self.recipe.optimizer_state == "reset":
            self.add(path, spec, Zeros(), ())
            return
        if not any(name.startswith(PARAM_STATES) for name in self.source):
            self.faults.append(
                f"- {path} {spec} (in the target, the source has no optimizer state)"
            )
            self.remedies.append("Remedy: set Recipe.optimizer_state = 'reset'.")
            return
        operation, sources = self.slot_origin(path, spec)
        # A slot of shape (1,) is Adafactor's mark for "unused": it is carried as it is, never
        # tiled.
        if (
            sources
            and sources[0] in self.source
            and self.source[sources[0]].shape == PLACEHOLDER
            and spec.shape == PLACEHOLDER
        ):
            operation = Copy()
        self.add(
            path,
            spec,
            operation,
            sources,
            "Remedy: the optimizers differ; set Recipe.optimizer_state = 'reset'.",
        )

    def step(self, spec: LeafSpec) -> None:
        """Adds the row of the training step."""
        if self.recipe.step == "reset":
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
                if len(unequal) < 2
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
            reason = self.drop_reason(bare.group(2) if bare else name, spec)
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
            if self.recipe.optimizer_state == "dense_only" and self.is_converted(name):
                return "slots of converted MLPs start afresh"
        return None


class _Upcycling(_Matching):
    """Dense to sparse, or dense to deeper."""

    recipe: Recipe

    def check(self) -> None:
        experts = sorted(
            (name for name, spec in self.source.items() if spec.role in (Role.EXPERT, *ROUTING)),
            key=lambda name: (PARAM_STATES in name, name),
        )
        if experts:
            raise ValueError(
                f"the source is a Mixture-of-Experts already ({len(experts)} leaves, e.g."
                f" {experts[0]}): upcycling happens once. Restore it without a recipe to continue"
                " it, or merge it into a dense checkpoint first (MergeRecipe)."
            )

    @functools.cached_property
    def depths(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of layers of each stack, of the source and of the target."""
        return _depths(self.source), _depths(self.target)

    def origin(self, path: str, spec: LeafSpec) -> str:
        """The source path of a target leaf: its twin's, in the layer that depth tiling names.

        Raises:
          ValueError: the recipe's layer list does not fit.
        """
        path = spec.twin or path
        place = layer_names.split(path)
        if self.recipe.depth is None or place is None:
            return path
        stack = place.stack.removeprefix(PARAM_STATES).removeprefix(TARGET)
        num_source, num_target = (depths.get(stack, 0) for depths in self.depths)
        if not num_source:
            return path
        number = self.recipe.depth.source_layer(place.number, num_source, num_target)
        return f"{layer_names.layer(place.stack, number)}/{place.rest}"

    def parameter(self, path: str, spec: LeafSpec) -> None:
        match spec.role:
            # No expert is preferred before any load was seen; a gate of a half for every token.
            case Role.ROUTER_BIAS | Role.SHARED_GATE:
                self.add(path, spec, Zeros(), ())
            case Role.ROUTER:
                operation = self.recipe.router_init.operation(path)
                self.add(path, spec, operation, (), "Remedy: give routers of the model's shape.")
            case Role.EXPERT:
                operation = self.recipe.expert_init.operation(path, spec)
                layer = os.path.commonpath([path, spec.twin])
                self.add(path, spec, operation, self.expert_sources(path, spec), layer=layer)
            case Role.SHARED_EXPERT:
                self.shared(path, spec)
            case Role.DENSE:
                self.dense(path, spec)

    def shared(self, path: str, spec: LeafSpec) -> None:
        """Adds the row of a shared expert's matrix."""
        self.cut(path, spec, self.origin(path, spec))

    def cut(self, path: str, spec: LeafSpec, source: str) -> None:
        """A shared expert's matrix from a dense one: as it is, or its first hidden units."""
        found = self.source.get(source)
        if found is None or found.shape == spec.shape:
            self.add(path, spec, Copy(), (source,))
            return
        axis = hidden_axis(path, spec.axes, len(spec.shape))
        self.add(path, spec, FirstUnits(axis, spec.shape[axis]), (source,))

    def expert_sources(self, path: str, spec: LeafSpec) -> tuple[str, ...]:
        """The source leaves of an expert's matrix."""
        return (self.origin(path, spec),)

    def dense(self, path: str, spec: LeafSpec) -> None:
        """Adds the row of a parameter that stays dense."""
        self.add(path, spec, Copy(), (self.origin(path, spec),))

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        is_expert = spec.role is Role.EXPERT
        if spec.role in FRESH or (is_expert and self.recipe.optimizer_state == "dense_only"):
            return Zeros(), ()
        if spec.role is Role.SHARED_EXPERT:
            # Factored slots of a part of a matrix are not parts of the factored slots.
            parameter = _parameter_of(path)
            dense = self.source.get(self.origin(parameter, self.target[parameter]))
            if dense is not None and dense.shape != self.target[parameter].shape:
                return Zeros(), ()
        return (Tile() if is_expert else Copy()), (self.origin(path, spec),)

    def is_converted(self, slot: str) -> bool:
        parameter = _parameter_of(slot)
        return any(parameter in row.sources and row.spec.role is Role.EXPERT for row in self.rows)


class _Parents(_Upcycling):
    """Several dense parents to one sparse model (Branch-Train-MiX)."""

    def __init__(self, source: Specs, target: Specs, recipe: Recipe, init: ParentExperts):
        super().__init__(source, target, recipe)
        self.init = init
        self.parents = sorted(
            {int(match.group(1)) for name in source if (match := PARENT.fullmatch(name))}
        )

    def check(self) -> None:
        super().check()
        if not self.parents:
            raise ValueError(
                "ParentExperts needs several source checkpoints: give a list of them as"
                " INITIAL_CHECKPOINT_PATH"
            )
        named = set(self.init.parents) | {
            parent for parent in (self.init.rest, self.init.shared) if isinstance(parent, int)
        }
        if not named <= set(self.parents):
            raise ValueError(
                f"ParentExperts names parents {sorted(named)}, there are {len(self.parents)}:"
                f" {self.parents}"
            )
        if self.recipe.optimizer_state != "reset":
            raise ValueError(
                "optimizer states of several parents do not combine: set Recipe.optimizer_state ="
                " 'reset'"
            )

    def expert_sources(self, path: str, spec: LeafSpec) -> tuple[str, ...]:
        return tuple(f"parent_{n}/{self.origin(path, spec)}" for n in self.parents)

    def dense(self, path: str, spec: LeafSpec) -> None:
        if self.init.rest == "mean":
            self.add(path, spec, Mean(), self.expert_sources(path, spec))
        else:
            source = f"parent_{self.init.rest}/{self.origin(path, spec)}"
            self.add(path, spec, Copy(), (source,))

    def shared(self, path: str, spec: LeafSpec) -> None:
        parent = self.init.shared if self.init.shared is not None else self.init.rest
        if parent != "mean":
            self.cut(path, spec, f"parent_{parent}/{self.origin(path, spec)}")
            return
        self.add(
            path,
            spec,
            Mean(),
            self.expert_sources(path, spec),
            "Remedy: a narrower shared expert is cut from one parent; set ParentExperts.shared.",
        )

    def step_source(self) -> str:
        rest = self.init.rest
        return f"parent_{rest if isinstance(rest, int) else self.parents[0]}/{STEP}"

    def drop_reason(self, name: str, spec: LeafSpec) -> str | None:
        rest = self.init.rest
        if name == STEP and self.recipe.step == "keep":
            return "the step is another parent's"
        if isinstance(rest, int) and name.startswith(TARGET) and name in self.target:
            return f"taken from parent {rest}"
        return super().drop_reason(name, spec)


class _Merging(_Matching):
    """Sparse to dense."""

    recipe: MergeRecipe

    def check(self) -> None:
        if not self.experts:
            raise ValueError("the source has no experts to merge: it is dense already")
        shared = [name for name, spec in self.source.items() if spec.role is Role.SHARED_EXPERT]
        if shared:
            raise ValueError(
                f"the source has shared experts (e.g. {shared[0]}), whose sum with the routed ones"
                " is no MLP of the dense size: only models without them can be merged"
            )
        experts = [name for name, spec in self.target.items() if spec.role is Role.EXPERT]
        if experts:
            raise ValueError(
                f"merging gives a dense model, the target has experts (e.g. {experts[0]}): choose"
                " the dense model file"
            )

    @functools.cached_property
    def experts(self) -> dict[str, str]:
        """Dense leaf -> leaf of the experts that come from it."""
        return {spec.twin: name for name, spec in self.source.items() if spec.role is Role.EXPERT}

    def parameter(self, path: str, spec: LeafSpec) -> None:
        if path not in self.experts:
            self.add(path, spec, Copy(), (path,))
            return
        place = layer_names.split(path.removeprefix(TARGET))
        layer = place.layer if place is not None else ""
        if self.recipe.how == "expert":
            operation: Operation = PickExpert(self.recipe.expert)
        elif self.recipe.how == "mean":
            operation = MergeExperts()
        elif layer in self.recipe.weights:
            operation = MergeExperts(tuple(float(w) for w in self.recipe.weights[layer]))
        else:
            self.faults.append(
                f"! {path}: MergeRecipe.weights has no entry for layer {layer!r}; it has"
                f" {sorted(self.recipe.weights)}"
            )
            return
        self.add(path, spec, operation, (self.experts[path],))

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        return (Zeros(), ()) if path in self.experts else (Copy(), (path,))

    def is_converted(self, slot: str) -> bool:
        return self.source[slot].role in (Role.EXPERT, *ROUTING)

    def drop_reason(self, name: str, spec: LeafSpec) -> str | None:
        if name.startswith(TARGET) and spec.role in ROUTING:
            return "routers have no place in a dense model"
        return super().drop_reason(name, spec)


def _depths(tree: Specs) -> dict[str, int]:
    """Number of layers of each stack ('encoder' -> 12)."""
    depths: dict[str, int] = {}
    for path in tree:
        bare = PARENT.fullmatch(path)
        name = bare.group(2) if bare else path
        place = layer_names.split(name.removeprefix(TARGET)) if name.startswith(TARGET) else None
        if place is not None:
            depths[place.stack] = max(depths.get(place.stack, 0), place.number + 1)
    return depths
