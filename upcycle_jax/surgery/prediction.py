"""What a recipe and the routers promise about the function of a result, before it is run."""

import dataclasses
from typing import Any

from upcycle_jax.features import num_rows
from upcycle_jax.models import registry
from upcycle_jax.models.base import Model, Stack
from upcycle_jax.models.layerwise import LayerwiseModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.policy import layer_sizes
from upcycle_jax.moe.routing import Router
from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.plan import Plan
from upcycle_jax.surgery.recipe import (
    MergeRecipe,
    MoreExperts,
    NormalRouter,
    Recipe,
    SplitExperts,
    VirtualGroups,
    ZeroRouter,
)
from upcycle_jax.surgery.verdict import Prediction, Verdict
from upcycle_jax.trees import Role
from upcycle_jax.types import Batch


def predict(plan: Plan, sparse: Model, batch: Batch) -> Prediction:
    """What the sparse model's function should be to the source's on such a batch. Where positions
    are interpolated, or a head starts at zero, the source has the result's.

    Raises:
      ValueError: the batch does not divide into routing groups, or `MoreExperts` cannot tell how
        many experts per token the source chose.
    """
    found = _predict(plan, sparse, batch)
    reason = found.reason
    if plan.interpolated:
        how = plan.interpolated[0].what
        reason += f"; the source with the result's positions ({how})"
    if plan.zeroed:
        paths = ", ".join(row.target.removeprefix(TARGET) for row in plan.zeroed)
        reason += f"; the source with {paths} at zero, too"
    return dataclasses.replace(found, reason=reason)


def _predict(plan: Plan, sparse: Model, batch: Batch) -> Prediction:
    """See `predict`."""
    recipe = plan.recipe
    if isinstance(recipe, MergeRecipe):
        return Prediction(Verdict.NOT_PRESERVED, "experts are merged")
    if recipe.depth is not None:
        return Prediction(Verdict.NOT_PRESERVED, "the depth changes")
    if any(row.spec.role is not Role.DENSE for row in plan.zeroed):
        return Prediction(Verdict.NOT_PRESERVED, "parameters of MoE layers start at zero")
    if not recipe.expert_init.preserves_function:
        return Prediction(
            Verdict.NOT_PRESERVED, f"{type(recipe.expert_init).__name__} changes the experts"
        )
    if not all(row.keeps_precision for row in plan.rows if row.is_parameter):
        return Prediction(Verdict.NOT_PRESERVED, "parameters are rounded to a narrower type")
    stacks = [one for one in sparse.stacks.values() if one.router is not None and one.moe]
    if isinstance(recipe.expert_init, MoreExperts):
        return _of_more_experts(recipe.expert_init, stacks, batch)
    if isinstance(recipe.expert_init, VirtualGroups):
        broken = _broken_groups(recipe.expert_init, recipe, stacks, batch)
        if broken:
            return Prediction(Verdict.NOT_PRESERVED, "; ".join(broken))
    parts = Parts.of(recipe, sparse.config.moe)
    reasons = ["a shared expert is added"] if parts.shared and not parts.divided else []
    for stack in stacks:
        assert stack.router is not None
        if stack.router.renormalized() is None:
            kind = type(stack.router).__name__
            return Prediction(Verdict.NOT_PRESERVED, f"{kind} gives experts mixtures of tokens")
        if not stack.router.unit_weights:
            reasons.append(f"combine weights are not renormalised in the {stack.name}")
        reasons += _crowded(stack, batch)
    if reasons:
        return Prediction(Verdict.SCALED, "; ".join(reasons))
    if isinstance(recipe.expert_init, VirtualGroups):
        what = "whole groups of shards are chosen"
    else:
        what = "experts are copies" if not parts.divided else "experts divide the dense MLP"
    return Prediction(Verdict.EXACT, f"{what}, combine weights sum to 1 and every token has room")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of which hidden units of the dense MLP an MoE layer is made where its function is preserved.

    Attributes:
      divided: routed experts have the first `routed` units, the shared expert the rest; else routed
        experts have all, and the shared expert the first `shared` units once more.
      routed: hidden units of routed experts; None for all.
      shared: hidden units of a shared expert that adds something; 0 for none.
      shared_factor: on what a shared expert adds that is not divided: that of its gate.
    """

    divided: bool = False
    routed: int | None = None
    shared: int = 0
    shared_factor: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe | MergeRecipe, moe: MoeSettings | None) -> "Parts":
        """The parts that a recipe gives the layers of these settings."""
        if isinstance(recipe, MergeRecipe) or moe is None or moe.shared_expert_mlp_dim is None:
            return cls()
        if isinstance(recipe.expert_init, SplitExperts):
            return cls(divided=True, routed=moe.expert_mlp_dim, shared=moe.shared_expert_mlp_dim)
        if recipe.shared_expert == "zeros":
            return cls()
        # A converted gate is zero: sigmoid(0) for every token.
        factor = 0.5 if moe.shared_expert_gate else 1.0
        return cls(shared=moe.shared_expert_mlp_dim, shared_factor=factor)


def twin_of(plan: Plan, sparse: LayerwiseModel, verdict: Verdict) -> LayerwiseModel:
    """The model that must be the source, in float32: the sparse one as it is or, where its weights
    do not sum to 1, with renormalised weights and room for every token.
    """
    if verdict is not Verdict.SCALED:
        return sparse.in_float32()
    twin, moe = sparse.in_float32(renormalised=True), sparse.config.moe
    if moe is None or not Parts.of(plan.recipe, moe).divided:
        return twin
    return with_moe(
        twin,
        shared_expert_mlp_dim=moe.shared_expert_mlp_dim,
        shared_expert_gate=moe.shared_expert_gate,
    )


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a result is compared with.

    Attributes:
      source: the model that the source's parameters are of.
      reference: what every layer of the result must be, given the same stream: the source, or it
        with fewer experts per token.
    """

    source: LayerwiseModel
    reference: LayerwiseModel

    @classmethod
    def of(cls, plan: Plan, sparse: LayerwiseModel) -> "Sources":
        """Those of a conversion into a sparse model: its dense one, or the smaller MoE.

        Raises:
          ValueError: see `predict`.
        """
        recipe = plan.recipe
        if isinstance(recipe, MergeRecipe) or not isinstance(recipe.expert_init, MoreExperts):
            return cls(sparse.dense, sparse.dense)
        init, moe = recipe.expert_init, sparse.config.moe
        assert moe is not None  # A result with more experts has some.
        width = moe.expert_mlp_dim
        smaller = {
            "num_experts": moe.num_experts // init.copies,
            "expert_mlp_dim": width * init.copies if init.split and width else width,
        }
        routers = {
            field.name: router
            for field in dataclasses.fields(moe)
            if isinstance(router := getattr(moe, field.name), Router)
        }

        def choosing(count: int | None) -> LayerwiseModel:
            with_count = {name: selecting(one, count) for name, one in routers.items()}
            return with_moe(sparse, **smaller, **with_count)

        fewest = min(
            (one.selected_per_token or init.copies for one in routers.values()),
            default=init.copies,
        )
        before = [selected_before(init, one) for one in routers.values()]
        source = choosing(next((count for count in before if count is not None), None))
        return cls(source, choosing(max(1, fewest // init.copies)))


def selecting(router: Router, count: int | None) -> Router:
    """A router with another number of experts per token; the same where it has none to set."""
    if count is None or not hasattr(router, "num_selected_experts"):
        return router
    return dataclasses.replace(router, num_selected_experts=count)  # type: ignore[call-arg]


def with_moe(model: LayerwiseModel, **changes: Any) -> LayerwiseModel:
    """The same model with other settings of its MoE layers, and its family's usual loss."""
    built = registry.with_moe(model.config, **changes)
    assert isinstance(built, LayerwiseModel)  # It is of the family of one.
    return built


def selected_before(init: MoreExperts, router: Router) -> int | None:
    """Experts per token of the source of a result with such a router; None where tokens do not
    choose.
    """
    count = router.selected_per_token
    if count is None or init.selected_before is not None:
        return init.selected_before
    if count % init.copies:
        raise ValueError(
            f"the result chooses {count} experts per token, which are no {init.copies} copies of"
            " any number, and the source does not state its own: set MoreExperts.selected_before"
        )
    return count // init.copies


def _of_more_experts(init: MoreExperts, stacks: list[Stack], batch: Batch) -> Prediction:
    """The prediction for a larger MoE made of an MoE."""
    if init.router_noise:
        return Prediction(Verdict.NOT_PRESERVED, "noise tells the copies of an expert apart")
    fewer = []
    for stack in stacks:
        router = stack.router
        assert router is not None
        if not router.follows_copies or router.selected_per_token is None:
            kind = type(router).__name__
            return Prediction(
                Verdict.NOT_PRESERVED,
                f"the weights of {kind} do not divide over copies in the {stack.name}",
            )
        now, before = router.selected_per_token, selected_before(init, router)
        assert before is not None
        what = f"{now} of {init.copies} copies of every expert are chosen where {before} experts"
        if now % init.copies:
            return Prediction(
                Verdict.NOT_PRESERVED,
                f"{what} were: not all copies of the last one. Choose a multiple of"
                f" {init.copies} experts per token, {before * init.copies} for the same function",
            )
        if now != before * init.copies:
            fewer.append(
                f"{what} were: the best {now // init.copies} with all copies. Choose"
                f" {before * init.copies} per token for the same function"
            )
    if crowded := [reason for stack in stacks for reason in _crowded(stack, batch)]:
        return Prediction(Verdict.NOT_PRESERVED, "; ".join(crowded))
    if fewer:
        return Prediction(Verdict.FEWER, "; ".join(fewer))
    return Prediction(
        Verdict.EXACT, "all copies of an expert are chosen with it and share its weight"
    )


def _broken_groups(
    init: VirtualGroups, recipe: Recipe, stacks: list[Stack], batch: Batch
) -> list[str]:
    """Why routers do not choose whole virtual groups with one weight; empty where they do."""
    size, reasons = init.granularity, []
    if size == 1:
        return []
    repeats = isinstance(recipe.router_init, NormalRouter) and not recipe.router_init.repeat % size
    if not repeats and not isinstance(recipe.router_init, ZeroRouter):
        reasons.append(f"router columns do not stand {size} times in a row")
    for stack in stacks:
        count = stack.router.selected_per_token if stack.router is not None else None
        if count is None:
            reasons.append(f"tokens do not choose in the {stack.name}")
        elif count % size:
            reasons.append(f"{count} experts per token are no whole groups of {size}")
        else:
            reasons += _crowded(stack, batch)
    return reasons


def _crowded(stack: Stack, batch: Batch) -> list[str]:
    """Why not every token has room in a stack's MoE layers; empty where it has."""
    assert stack.router is not None and stack.moe is not None
    rows, length = num_rows(batch), stack.length(batch)
    sizes = layer_sizes(stack.moe, stack.router, rows, length, train=False)
    group, slots = sizes.grouping.group_size, sizes.slots
    if slots >= group:
        return []
    return [f"{stack.name} experts have {slots} slots for {group} tokens"]
