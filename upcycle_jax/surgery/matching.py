"""From two trees of specs and a recipe to a plan, or to one error that shows what does not fit on
both sides.

Target first: every target leaf gets exactly one origin; every source leaf is used or dropped by
name. What a leaf is, and which dense leaf it comes from, its spec says (`role`, `twin`).
"""

import functools
import os.path

from upcycle_jax.layers.mlp import hidden_axis
from upcycle_jax.models import layer_names
from upcycle_jax.state_tree import PARAM_STATES, STEP, TARGET
from upcycle_jax.surgery.matching_base import (
    PARENT,
    ROUTING,
    Matching,
    Specs,
    has_experts,
    parameter_of,
    refuse_experts,
)
from upcycle_jax.surgery.matching_sparse import Enlarging, Merging
from upcycle_jax.surgery.operations import (
    Copy,
    FirstUnits,
    Mean,
    Operation,
    Tile,
    Zeros,
)
from upcycle_jax.surgery.plan import Plan
from upcycle_jax.surgery.recipe import (
    MergeRecipe,
    MoreExperts,
    ParentExperts,
    Recipe,
    SplitExperts,
)
from upcycle_jax.trees import LeafSpec, Role

FRESH = (*ROUTING, Role.SHARED_GATE)
"""What no dense model has."""


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
      ValueError: the source has experts already and the recipe is not for those, leaves on either
        side are without counterpart, shapes do not fit, or the recipe does not suit the two trees.
        The message names the leaves of both sides and the remedy.
    """
    source, target = dict(source_specs), dict(target_specs)
    recipe = recipe if recipe is not None else Recipe()
    matching: Matching
    if isinstance(recipe, MergeRecipe):
        matching = Merging(source, target, recipe)
    elif isinstance(recipe.expert_init, MoreExperts):
        matching = Enlarging(source, target, recipe, recipe.expert_init)
    elif isinstance(recipe.expert_init, ParentExperts):
        matching = _Parents(source, target, recipe, recipe.expert_init)
    elif (recipe.position_interpolation or recipe.zeroed) and has_experts(source):
        matching = _Carrying(source, target, recipe)
    else:
        matching = _Upcycling(source, target, recipe)
    return matching.plan()


class _Upcycling(Matching):
    """Dense to sparse, or dense to deeper."""

    recipe: Recipe

    def check(self) -> None:
        refuse_experts(self.source)
        if isinstance(self.recipe.expert_init, SplitExperts):
            self.check_split()

    def check_split(self) -> None:
        """Raises ValueError where a target of `SplitExperts` has no shared expert."""
        if not any(spec.role is Role.SHARED_EXPERT for spec in self.target.values()):
            raise ValueError(
                "SplitExperts gives a shared expert the hidden units that routed experts do not"
                " have, and the target has none: set SHARED_EXPERT_MLP_DIM"
            )

    @functools.cached_property
    def experts_by_twin(self) -> dict[str, LeafSpec]:
        """Dense leaf -> spec of the leaf of the target's experts that comes from it."""
        return {spec.twin: spec for spec in self.target.values() if spec.role is Role.EXPERT}

    @functools.cached_property
    def has_gates(self) -> bool:
        """Whether shared experts of the target have gates."""
        return any(spec.role is Role.SHARED_GATE for spec in self.target.values())

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
        return place.in_layer(number)

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
        source, init = self.origin(path, spec), self.recipe.expert_init
        if isinstance(init, SplitExperts):
            experts = self.experts_by_twin[spec.twin]
            operation = init.shared_operation(path, spec, experts=experts, gated=self.has_gates)
            self.add(
                path,
                spec,
                operation,
                () if isinstance(operation, Zeros) else (source,),
                "Remedy: EXPERT_MLP_DIM and SHARED_EXPERT_MLP_DIM must add up to the dense MLP's"
                " hidden size.",
            )
        elif not self.zeros_shared(path, spec):
            self.cut(path, spec, source)

    def zeros_shared(self, path: str, spec: LeafSpec) -> bool:
        """Adds the row of a shared expert's `wo` that starts at zero, where the recipe says so."""
        is_output = path.split("/")[-2] == "wo" and self.recipe.shared_expert == "zeros"
        if is_output:
            self.add(path, spec, Zeros(), ())
        return is_output

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
        self.carry(path, spec, self.origin(path, spec))

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        is_expert = spec.role is Role.EXPERT
        if spec.role in FRESH or (is_expert and self.recipe.optimizer_state == "dense_only"):
            return Zeros(), ()
        if spec.role is Role.SHARED_EXPERT:
            # Factored slots of a part of a matrix are not parts of the factored slots.
            parameter = parameter_of(path)
            dense = self.source.get(self.origin(parameter, self.target[parameter]))
            if dense is not None and dense.shape != self.target[parameter].shape:
                return Zeros(), ()
        return (Tile() if is_expert else Copy()), (self.origin(path, spec),)

    def is_converted(self, slot: str) -> bool:
        parameter = parameter_of(slot)
        return any(parameter in row.sources and row.spec.role is Role.EXPERT for row in self.rows)


class _Carrying(Matching):
    """A model with experts for images of another size, or for other classes: everything else
    stays.
    """

    def check(self) -> None:
        if not has_experts(self.target):
            raise ValueError(
                "the source has experts and the model has none: choose the upcycled model file, or"
                " merge the experts first (MergeRecipe)"
            )

    def parameter(self, path: str, spec: LeafSpec) -> None:
        self.carry(path, spec, path)

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        return Copy(), (path,)

    def is_converted(self, slot: str) -> bool:
        return False


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
        if self.zeros_shared(path, spec):
            return
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
        if name == STEP and self.recipe.step in ("keep", "keep_or_zero"):
            return "the step is another parent's"
        if isinstance(rest, int) and name.startswith(TARGET) and name in self.target:
            return f"taken from parent {rest}"
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
