"""A plan as text for a terminal (at most 140 columns), as Markdown and as JSON."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from upcycle_jax.costs import capacities
from upcycle_jax.planning import literature, scale
from upcycle_jax.planning.compilation import gib
from upcycle_jax.planning.estimate import MFU_SOURCE, MOE_SLOWDOWN, Fit, Kind, Plan, Range, Spending
from upcycle_jax.planning.scale import Scaled
from upcycle_jax.text import WIDTH, Format, Table, json_text


def case_of(plan: Plan) -> literature.Case:
    """The plan in the words of the advice."""
    stacks, moe = plan.workload.model.stacks.values(), plan.workload.model.config.moe
    assert moe is not None  # a plan without experts is refused before
    routers = [stack.router for stack in stacks if stack.router is not None]
    return literature.Case(
        dense_parameters=plan.costs[Kind.DENSE].parameters,
        dense_tokens=plan.dense_steps * plan.tokens_per_step if plan.dense_steps else None,
        extra_share=plan.extra_share,
        batch_tokens=plan.tokens_per_step,
        num_experts=moe.num_experts,
        capacity_factor=(
            None
            if all(router.has_room_for_all for router in routers)
            else moe.train_expert_capacity_factor
        ),
        router="experts_choose" if routers[0].fills_capacity else "tokens_choose",
        renormalize=any(getattr(router, "renormalize", False) for router in routers),
        sparse_share=sum(len(stack.sparse_layers) for stack in stacks)
        / sum(stack.num_layers for stack in stacks),
    )


def render(plan: Plan, style: Format, at_scale: Sequence[Scaled] = ()) -> str:
    """The plan, with a newline at its end; with what was scaled to other numbers of chips."""
    if style == Format.JSON:
        found = as_json(plan)
        if at_scale:
            found["at_scale"] = [scale.as_json(one) for one in at_scale]
        return json_text(found) + "\n"
    heading = f"Plan of {plan.name} on {plan.hardware.num_chips} x {plan.hardware.chip.name}"
    parts = [f"## {heading}" if style == Format.MARKDOWN else heading, _frame(plan)]
    parts += [table.render(style) for table in (costs_table(plan), *spending_tables(plan))]
    parts.append(textwrap.fill(f"Step times: {MFU_SOURCE}.", WIDTH))
    if at_scale:
        parts.append(scale.table(plan, at_scale).render(style))
        parts.append("\n".join(scale.arithmetic(plan, at_scale[-1])))
    parts.append(_verdict(plan))
    parts.append(advice_table(plan).render(style))
    return "\n\n".join(part for part in parts if part) + "\n"


def _frame(plan: Plan) -> str:
    work, chip = plan.workload, plan.hardware.chip
    mesh = " x ".join(f"{name} {size}" for name, size in work.partitioner.mesh.shape.items())
    lengths = ", ".join(f"{name} {length}" for name, length in work.task_feature_lengths.items())
    dense = f"{plan.dense_steps:,}" if plan.dense_steps else "not known"
    assumed = " (assumed: give --extra_steps)" if plan.is_assumed else ""
    share = (
        f"; the extra training costs {plan.extra_share:.0%} of that"
        if plan.extra_share is not None
        else ""
    )
    parts = work.trainer.num_microbatches or 1
    routed = capacities.capacity_texts(
        work.model, batch_size=work.batch_size // parts, lengths=work.task_feature_lengths
    )
    return "\n".join(
        [
            (
                f"mesh      {mesh}{', fsdp' if work.partitioner.fsdp else ''};"
                f" {plan.hardware.num_devices} devices of {gib(chip.device_hbm_bytes)} and"
                f" {chip.device_peak_flops / 1e12:g} bfloat16 TFLOP/s ({chip.source})"
            ),
            (
                f"batch     {work.batch_size} rows ({lengths}): {plan.tokens_per_step:,} positions;"
                f" {parts} microbatches"
            ),
            *(f"capacity  {text}" for text in routed),
            f"steps     dense checkpoint {dense}, extra {plan.extra_steps:,}{assumed}{share}",
        ]
    )


def costs_table(plan: Plan) -> Table:
    """Per step and per device, one column per kind."""
    costs = list(plan.costs.values())
    rows = [
        ["parameters", *(f"{cost.parameters:,}" for cost in costs)],
        ["active parameters", *(f"{cost.active_parameters:,}" for cost in costs)],
        ["FLOPs of a step", *(f"{cost.flops:.4g}" for cost in costs)],
        ["memory / device: parameters", *(gib(cost.memory.state.parameters) for cost in costs)],
        ["  optimizer", *(gib(cost.memory.state.optimizer) for cost in costs)],
        ["  gradients", *(gib(cost.memory.state.parameters) for cost in costs)],
        ["  activations (estimate)", *(gib(cost.memory.activations) for cost in costs)],
        ["  together", *(_gib_range(cost.memory.needed) for cost in costs)],
        [
            f"  of {gib(plan.hardware.chip.device_hbm_bytes)}",
            *(str(cost.memory.verdict) for cost in costs),
        ],
        ["step time, ms", *(_range(cost.time.total * 1e3) for cost in costs)],
        ["  compute", *(_range(cost.time.compute * 1e3) for cost in costs)],
        ["  memory traffic, at least", *(f"{cost.time.memory * 1e3:.3g}" for cost in costs)],
        ["  network, at least", *(f"{cost.time.network * 1e3:.3g}" for cost in costs)],
    ]
    speeds = [plan.images_per_second(kind) for kind in plan.costs]
    if any(speeds):
        rows.append(["images per second", *(_range(speed, "{:,.0f}") for speed in speeds if speed)])
    return Table("Cost of a step", ["", *(str(cost.kind) for cost in costs)], rows)


def spending_tables(plan: Plan) -> list[Table]:
    """Equal extra steps, equal extra FLOPs, equal extra device time."""
    header = ["", "steps", "positions (tokens and padding)", "FLOPs", "device-days"]
    named = (
        ("Equal extra steps", plan.equal_steps()),
        ("Equal extra FLOPs (those of the upcycled run)", plan.equal_flops()),
        ("Equal extra device time (that of the upcycled run)", plan.equal_time()),
    )
    return [Table(title, header, [_spending(spent) for spent in rows]) for title, rows in named]


def _spending(spent: Spending) -> list[str]:
    return [
        str(spent.kind),
        _range(spent.steps, "{:,.0f}"),
        _range(spent.tokens),
        _range(spent.flops),
        _range(spent.device_days),
    ]


def _range(values: Range, form: str = "{:.3g}") -> str:
    low, high = form.format(values.low), form.format(values.high)
    return low if low == high else f"{low} to {high}"


def _gib_range(values: Range) -> str:
    low, high = gib(values.low), gib(values.high)
    return low if low == high else f"{low} to {high}"


def _verdict(plan: Plan) -> str:
    cost = plan.costs[Kind.UPCYCLED]
    memory = cost.memory
    needed = f"{_gib_range(memory.needed)} of {gib(memory.available)} per device"
    if memory.verdict is Fit.FITS:
        return (
            f"FITS: the upcycled model needs {needed} (estimate; upcycle_jax.precompile compiles it"
            " for TPU slices)."
        )
    head = {
        Fit.MAY_FIT: (
            f"MAY FIT: the upcycled model needs {needed}; upcycle_jax.precompile decides it for TPU"
            " slices. What helps:"
        ),
        Fit.DOES_NOT_FIT: (
            f"DOES NOT FIT: the upcycled model needs {needed}. Any of these helps, the largest"
            " saving first:"
        ),
    }[memory.verdict]
    return "\n".join([head, *(f"  {line}" for line in plan.advice)])


def advice_table(plan: Plan) -> Table:
    """What the literature says about the plan."""
    rows = []
    for item in literature.advise(case_of(plan)):
        lines = textwrap.wrap(item.text, 56)
        origin = textwrap.wrap(f"{item.source} ({item.kind})", 30)
        for i in range(max(len(lines), len(origin))):
            first = [item.topic, str(item.stance)] if i == 0 else ["", ""]
            rows.append(
                [*first, lines[i] if i < len(lines) else "", origin[i] if i < len(origin) else ""]
            )
    return Table("What was published", ["topic", "for this plan", "finding", "source"], rows)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything as plain JSON; bytes, seconds, FLOPs, days."""
    costs: dict[str, dict[str, Any]] = {}
    for kind, cost in plan.costs.items():
        memory, time = cost.memory, cost.time
        costs[str(kind)] = {
            "parameters": cost.parameters,
            "active_parameters": cost.active_parameters,
            "flops_per_step": cost.flops,
            "memory_per_device": {
                "parameters": memory.state.parameters,
                "optimizer": memory.state.optimizer,
                "gradients": memory.state.parameters,
                "activations": memory.activations,
                "needed": dataclasses.asdict(memory.needed),
                "available": memory.available,
                "verdict": str(memory.verdict),
            },
            "step_seconds": {
                "total": dataclasses.asdict(time.total),
                "compute": dataclasses.asdict(time.compute),
                "memory_traffic": time.memory,
                "network": time.network,
            },
        }
        if (speed := plan.images_per_second(kind)) is not None:
            costs[str(kind)]["images_per_second"] = dataclasses.asdict(speed)
    named = {
        "equal_steps": plan.equal_steps(),
        "equal_flops": plan.equal_flops(),
        "equal_time": plan.equal_time(),
    }
    return {
        "name": plan.name,
        "hardware": {
            "chip": plan.hardware.chip.name,
            "chips": plan.hardware.num_chips,
            "devices": plan.hardware.num_devices,
        },
        "mesh": dict(plan.workload.partitioner.mesh.shape),
        "batch_size": plan.workload.batch_size,
        "positions_per_step": plan.tokens_per_step,
        "dense_steps": plan.dense_steps,
        "extra_steps": plan.extra_steps,
        "extra_steps_assumed": plan.is_assumed,
        "extra_share_of_dense_flops": plan.extra_share,
        "mfu": {
            "dense": dataclasses.asdict(plan.mfu),
            "moe_factor": list(MOE_SLOWDOWN),
            "source": MFU_SOURCE,
        },
        "costs": costs,
        "spending": {
            name: [dataclasses.asdict(spent) for spent in rows] for name, rows in named.items()
        },
        "what_to_change": plan.advice,
        "advice": [dataclasses.asdict(item) for item in literature.advise(case_of(plan))],
    }
