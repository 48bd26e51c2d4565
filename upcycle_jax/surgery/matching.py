"""From two trees of specs and a recipe to a plan, or to one error that shows what does not fit on
both sides.

Target first: every target leaf gets exactly one origin; every source leaf is used or dropped by
name. Experts are found by `mlp/expert/` in a path, shared experts by `mlp/shared_expert/`, routers
by `mlp/router/`, optimizer slots by `state/param_states/`; nothing else of an architecture is known
here.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_jax.state_tree import STEP
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
from upcycle_jax.surgery.operations.hidden_units import shape_of_mlp_axis
from upcycle_jax.surgery.plan import Dropped, Plan, Row
from upcycle_jax.surgery.recipe import MergeRecipe, ParentExperts, Recipe
from upcycle_jax.text import shorten
from upcycle_jax.trees import LeafSpec

EXPERT, ROUTER, SHARED = "mlp/expert/", "mlp/router/", "mlp/shared_expert/"
SLOTS = "state/param_states/"
PLACEHOLDER = (1,)
PARENT = re.compile(r"parent_(\d+)/(.+)")
LAYER = re.compile(r"(?P<stack>.*?/)layers_(?P<number>\d+)/")

Specs = Mapping[str, LeafSpec]


def is_expert(path: str) -> bool:
    """Whether a path is of an expert's matrix or of one of its optimizer slots."""
    return EXPERT in path


def is_shared(path: str) -> bool:
    """Whether a path is of a shared expert's matrix or of one of its optimizer slots."""
    return SHARED in path


def is_router(path: str) -> bool:
    """Whether a path is of a router's kernel or of one of its optimizer slots."""
    return ROUTER in path


def is_router_bias(path: str) -> bool:
    """Whether a path is of the bias that balances a router, or of one of its optimizer slots."""
    return f"{ROUTER}bias" in path


def make_plan(
    source_specs: Specs, target_specs: Specs, recipe: Recipe | MergeRecipe | None = None
) -> Plan:
    """Plans the conversion of a checkpoint into a target model.

    Args:
      source_specs: full path -> spec of the source; of several dense parents, as `parents.join`
        names them ('parent_0/target/...').
      target_specs: full path -> spec of the target: which layers are sparse, how wide experts are
        and which slots exist follows from it.
      recipe: the choices; None: `Recipe()`, the paper's for language.

    Raises:
      ValueError: the source has experts already, leaves on either side are without counterpart,
        shapes do not fit, or the recipe does not suit the two trees. The message names the leaves
        of both sides and the remedy.
    """
    recipe = recipe if recipe is not None else Recipe()
    matcher = (
        _Merging
        if isinstance(recipe, MergeRecipe)
        else _Parents
        if isinstance(recipe.expert_init, ParentExperts)
        else _Upcycling
    )
    return matcher(dict(source_specs), dict(target_specs), recipe).plan()


class _Matching:
    """What every kind of conversion shares: collecting rows, uses, drops and faults."""

    def __init__(self, source: dict[str, LeafSpec], target: dict[str, LeafSpec], recipe: Any):
        self.source, self.target, self.recipe = source, target, recipe
        self.rows: list[Row] = []
        self.faults: list[str] = []
        self.remedies: list[str] = []
        self.drops: dict[str, str] = {}

    def plan(self) -> Plan:
        self.check()
        for path, spec in sorted(
            self.target.items(), key=lambda item: (item[0].startswith("state/"), item[0])
        ):
            if path == STEP:
                self.step(spec)
            elif path.startswith(SLOTS):
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

    def check(self) -> None:
        raise TypeError(type(self).__name__)

    def parameter(self, path: str, spec: LeafSpec) -> None:
        raise TypeError(type(self).__name__)

    def slot_origin(self, path: str) -> tuple[Operation, tuple[str, ...]]:
        raise TypeError(type(self).__name__)

    def slot(self, path: str, spec: LeafSpec) -> None:
        if self.recipe.optimizer_state == "reset":
            self.add(path, spec, Zeros(), ())
            return
        if not any(name.startswith(SLOTS) for name in self.source):
            self.faults.append(
                f"- {path} {spec} (in the target, the source has no optimizer state)"
            )
            self.remedies.append("Remedy: set Recipe.optimizer_state = 'reset'.")
            return
        operation, sources = self.slot_origin(path)
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
        absent = [name for name in sources if name not in self.source]
        if absent:
            self.faults.append(
                f"- {path} {spec} (in the target, the source has no {' or '.join(absent)})"
            )
            self.remedies.append(
                remedy
                or "Remedy: choose the model file that belongs to the source; a deeper target needs Recipe.depth."
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
                or "Remedy: choose the model file of the source's size, or the source of the model's."
            )
        self.rows.append(Row(path, spec, operation, tuple(sources), specs, layer))

    def account(self) -> None:
        """Every source leaf is used, dropped for a reason, or a fault."""
        used = {name for row in self.rows for name in row.sources}
        parameters_fit = not self.faults
        drop = [re.compile(pattern) for pattern in getattr(self.recipe, "drop", ())]
        for name, spec in self.source.items():
            if name in used or (not parameters_fit and SLOTS in name):
                continue
            bare = PARENT.fullmatch(name)
            reason = self.drop_reason(bare.group(2) if bare else name)
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

    def drop_reason(self, name: str) -> str | None:
        if name == STEP:
            return (
                "the step is set by the recipe"
                if STEP in self.target
                else "the target keeps no step"
            )
        if name.startswith(SLOTS):
            if not any(path.startswith(SLOTS) for path in self.target):
                return "the target keeps no optimizer state"
            if self.recipe.optimizer_state == "reset":
                return "optimizer state starts afresh"
            if self.recipe.optimizer_state == "dense_only" and self.is_converted(name):
                return "slots of converted MLPs start afresh"
        return None

    def is_converted(self, slot: str) -> bool:
        """Whether a source slot belongs to a parameter that does not stay as it is."""
        raise TypeError(type(self).__name__)


class _Upcycling(_Matching):
    """Dense to sparse, or dense to deeper."""

    def check(self) -> None:
        experts = sorted(
            (name for name in self.source if is_expert(name) or is_router(name)),
            key=lambda name: (SLOTS in name, name),
        )
        if experts:
            raise ValueError(
                f"the source is a Mixture-of-Experts already ({len(experts)} leaves, e.g."
                f" {experts[0]}): upcycling happens once. Restore it without a recipe to continue"
                " it, or merge it into a dense checkpoint first (MergeRecipe)."
            )
        self.layers = {
            side: _count_layers(tree)
            for side, tree in (("source", self.source), ("target", self.target))
        }

    def origin(self, path: str) -> str:
        """The source path of a target path: without the expert folder, and from the layer that
        depth tiling names.

        Raises:
          ValueError: the recipe's layer list does not fit.
        """
        path = path.replace(EXPERT, "mlp/").replace(SHARED, "mlp/")
        match = LAYER.match(path)
        if self.recipe.depth is None or match is None:
            return path
        stack, number = match["stack"], int(match["number"])
        counts = [
            self.layers[side].get(stack.removeprefix(SLOTS).removeprefix("target/"), 0)
            for side in ("source", "target")
        ]
        return (
            f"{stack}layers_{self.recipe.depth.source_layer(number, *counts)}/{path[match.end() :]}"
            if counts[0]
            else path
        )

    def parameter(self, path: str, spec: LeafSpec) -> None:
        if is_router_bias(path):
            self.add(path, spec, Zeros(), ())  # No expert is preferred before any load was seen.
        elif is_router(path):
            self.add(
                path,
                spec,
                self.recipe.router_init.operation(path),
                (),
                "Remedy: give routers of the model's shape.",
            )
        elif is_expert(path):
            operation = self.recipe.expert_init.operation(path, spec)
            self.add(
                path,
                spec,
                operation,
                self.expert_sources(path),
                layer=path.split(EXPERT)[0] + "mlp",
            )
        elif is_shared(path):
            self.shared(path, spec)
        else:
            self.dense(path, spec)

    def shared(self, path: str, spec: LeafSpec) -> None:
        self.cut(path, spec, self.origin(path))

    def cut(self, path: str, spec: LeafSpec, source: str) -> None:
        """A shared expert's matrix from a dense one: as it is, or its first hidden units."""
        found = self.source.get(source)
        if found is None or found.shape == spec.shape:
            self.add(path, spec, Copy(), (source,))
            return
        axis = shape_of_mlp_axis(path, spec.axes, spec.shape)
        self.add(path, spec, FirstUnits(axis, spec.shape[axis]), (source,))

    def expert_sources(self, path: str) -> tuple[str, ...]:
        return (self.origin(path),)

    def dense(self, path: str, spec: LeafSpec) -> None:
        self.add(path, spec, Copy(), (self.origin(path),))

    def slot_origin(self, path: str) -> tuple[Operation, tuple[str, ...]]:
        if is_router(path) or (is_expert(path) and self.recipe.optimizer_state == "dense_only"):
            return Zeros(), ()
        if is_shared(path):
            # Factored slots of a part of a matrix are not parts of the factored slots.
            parameter = "target/" + path.removeprefix(SLOTS).rsplit("/", 1)[0]
            dense = self.source.get(self.origin(parameter))
            if dense is not None and dense.shape != self.target[parameter].shape:
                return Zeros(), ()
        return (Tile() if is_expert(path) else Copy()), (self.origin(path),)

    def is_converted(self, slot: str) -> bool:
        parameter = "target/" + slot.removeprefix(SLOTS).rsplit("/", 1)[0]
        return any(parameter in row.sources and is_expert(row.target) for row in self.rows)


class _Parents(_Upcycling):
    """Several dense parents to one sparse model (Branch-Train-MiX)."""

    def check(self) -> None:
        super().check()
        init = self.recipe.expert_init
        self.parents = sorted(
            {int(match.group(1)) for name in self.source if (match := PARENT.fullmatch(name))}
        )
        if not self.parents:
            raise ValueError(
                "ParentExperts needs several source checkpoints: give a list of them as"
                " INITIAL_CHECKPOINT_PATH"
            )
        named = set(init.parents) | {
            parent for parent in (init.rest, init.shared) if isinstance(parent, int)
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

    def expert_sources(self, path: str) -> tuple[str, ...]:
        return tuple(f"parent_{n}/{self.origin(path)}" for n in self.parents)

    def dense(self, path: str, spec: LeafSpec) -> None:
        rest = self.recipe.expert_init.rest
        if rest == "mean":
            self.add(
                path, spec, Mean(), tuple(f"parent_{n}/{self.origin(path)}" for n in self.parents)
            )
        else:
            self.add(path, spec, Copy(), (f"parent_{rest}/{self.origin(path)}",))

    def shared(self, path: str, spec: LeafSpec) -> None:
        init = self.recipe.expert_init
        parent = init.shared if init.shared is not None else init.rest
        if parent != "mean":
            self.cut(path, spec, f"parent_{parent}/{self.origin(path)}")
            return
        sources = tuple(f"parent_{n}/{self.origin(path)}" for n in self.parents)
        self.add(
            path,
            spec,
            Mean(),
            sources,
            "Remedy: a narrower shared expert is cut from one parent; set ParentExperts.shared.",
        )

    def step_source(self) -> str:
        rest = self.recipe.expert_init.rest
        return f"parent_{rest if isinstance(rest, int) else self.parents[0]}/{STEP}"

    def drop_reason(self, name: str) -> str | None:
        rest = self.recipe.expert_init.rest
        if name == STEP and self.recipe.step == "keep":
            return "the step is another parent's"
        if isinstance(rest, int) and name.startswith("target/") and name in self.target:
            return f"taken from parent {rest}"
        return super().drop_reason(name)


class _Merging(_Matching):
    """Sparse to dense."""

    def check(self) -> None:
        if not any(is_expert(name) for name in self.source):
            raise ValueError("the source has no experts to merge: it is dense already")
        shared = [name for name in self.source if is_shared(name)]
        if shared:
            raise ValueError(
                f"the source has shared experts (e.g. {shared[0]}), whose sum with the routed ones"
                " is no MLP of the dense size: only models without them can be merged"
            )
        experts = [name for name in self.target if is_expert(name)]
        if experts:
            raise ValueError(
                f"merging gives a dense model, the target has experts (e.g. {experts[0]}): choose"
                " the dense model file"
            )

    def _expert(self, path: str) -> str:
        head, found, tail = path.rpartition("mlp/")
        return f"{head}{EXPERT}{tail}" if found else path

    def parameter(self, path: str, spec: LeafSpec) -> None:
        expert = self._expert(path)
        if expert == path or expert not in self.source:
            self.add(path, spec, Copy(), (path,))
            return
        layer = path.removeprefix("target/").rpartition("/mlp/")[0]
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
        self.add(path, spec, operation, (expert,))

    def slot_origin(self, path: str) -> tuple[Operation, tuple[str, ...]]:
        expert = self._expert(path)
        return (Zeros(), ()) if expert != path and expert in self.source else (Copy(), (path,))

    def is_converted(self, slot: str) -> bool:
        return is_expert(slot) or is_router(slot)

    def drop_reason(self, name: str) -> str | None:
        return (
            "routers have no place in a dense model"
            if name.startswith("target/") and is_router(name)
            else super().drop_reason(name)
        )


def _count_layers(tree: Specs) -> dict[str, int]:
    """Number of layers of each stack ('encoder/' -> 12)."""
    counts: dict[str, int] = {}
    for path in tree:
        bare = PARENT.fullmatch(path)
        match = LAYER.match(bare.group(2) if bare else path)
        if match and path.find(SLOTS) < 0:
            stack = match["stack"].removeprefix("target/")
            counts[stack] = max(counts.get(stack, 0), int(match["number"]) + 1)
    return counts
