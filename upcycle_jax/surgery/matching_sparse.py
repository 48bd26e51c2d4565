"""Plans of conversions of a Mixture-of-Experts: to more experts, or to a dense model."""

import functools

from upcycle_jax import axes
from upcycle_jax.models import layer_names
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.surgery.matching_base import ROUTING, Matching, Specs
from upcycle_jax.surgery.operations import (
    CopiesOfColumns,
    CopiesOfExperts,
    Copy,
    JoinSharedExpert,
    MergeExperts,
    Operation,
    PickExpert,
    Zeros,
)
from upcycle_jax.surgery.recipe import MergeRecipe, MoreExperts, Recipe
from upcycle_jax.trees import LeafSpec, Role


class Enlarging(Matching):
    """Sparse to sparse with more experts."""

    recipe: Recipe

    def __init__(self, source: Specs, target: Specs, recipe: Recipe, init: MoreExperts):
        super().__init__(source, target, recipe)
        self.init = init

    def check(self) -> None:
        before, after = (
            {
                spec.shape[0]
                for path, spec in side.items()
                if spec.role is Role.EXPERT and path.startswith(TARGET)
            }
            for side in (self.source, self.target)
        )
        if not before:
            raise ValueError(
                "MoreExperts multiplies the experts of a Mixture-of-Experts, and the source has"
                " none: choose CopyExperts or another initialisation for a dense source"
            )
        had, has = max(before), max(after, default=0)
        if has != had * self.init.copies:
            raise ValueError(
                f"MoreExperts.copies={self.init.copies} makes {had * self.init.copies} experts of"
                f" the source's {had}, the target has {has}: set NUM_EXPERTS ="
                f" {had * self.init.copies}, or other copies"
            )

    def parameter(self, path: str, spec: LeafSpec) -> None:
        remedy = "Remedy: the target's other sizes and its sparse layers must be the source's."
        operation: Operation = Copy()
        if spec.role is Role.EXPERT:
            operation = self.init.operation(path, spec)
        elif spec.role is Role.ROUTER:
            operation = self.init.router_operation()
        elif spec.role is Role.ROUTER_BIAS:
            operation = CopiesOfColumns(self.init.copies)
        self.add(path, spec, operation, (path,), remedy)

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        if spec.role in ROUTING:
            return Zeros(), ()
        if spec.role is not Role.EXPERT:
            return Copy(), (path,)
        if self.recipe.optimizer_state == "dense_only":
            return Zeros(), ()
        return CopiesOfExperts(self.init.copies), (path,)

    def is_converted(self, slot: str) -> bool:
        return self.source[slot].role in (Role.EXPERT, *ROUTING)

    def drop_reason(self, name: str, spec: LeafSpec) -> str | None:
        if name.startswith(PARAM_STATES) and self.is_converted(name):
            return "slots of converted leaves start afresh"
        return super().drop_reason(name, spec)


class Merging(Matching):
    """Sparse to dense."""

    recipe: MergeRecipe

    def check(self) -> None:
        if not self.experts:
            raise ValueError("the source has no experts to merge: it is dense already")
        gates = [name for name, spec in self.source.items() if spec.role is Role.SHARED_GATE]
        if gates:
            raise ValueError(
                f"the source's shared experts have gates (e.g. {gates[0]}): each token has another"
                " weight for them, which no dense MLP computes. Only shared experts without a gate"
                " can be merged"
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

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """Dense leaf -> leaf of the shared expert whose hidden units it gets."""
        return {
            spec.twin: name
            for name, spec in self.source.items()
            if spec.role is Role.SHARED_EXPERT and name.startswith(TARGET)
        }

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
        if path not in self.shared:
            self.add(path, spec, operation, (self.experts[path],))
        elif axes.MLP not in spec.axes:
            self.faults.append(
                f"! {path}: biases of the output of routed and shared experts are not merged"
            )
        else:
            self.add(
                path,
                spec,
                JoinSharedExpert(operation, spec.axes.index(axes.MLP)),
                (self.experts[path], self.shared[path]),
                "Remedy: the dense model's MLPs are as wide as an expert and the shared expert"
                " together: set the dense model's hidden size (mlp_dim) to that sum.",
            )

    def slot_origin(self, path: str, spec: LeafSpec) -> tuple[Operation, tuple[str, ...]]:
        return (Zeros(), ()) if path in self.experts else (Copy(), (path,))

    def is_converted(self, slot: str) -> bool:
        return self.source[slot].role in (Role.EXPERT, Role.SHARED_EXPERT, *ROUTING)

    def drop_reason(self, name: str, spec: LeafSpec) -> str | None:
        if name.startswith(TARGET) and spec.role in ROUTING:
            return "routers have no place in a dense model"
        return super().drop_reason(name, spec)
