"""A configuration on more chips than it was written for, on paper: what exchange and sums of
gradients take beside compute, from the speeds of links that makers print, and where memory ends.

Every device keeps its work: the batch grows with the chips, partitions of experts and of the model
stay, and the data axis grows.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from upcycle_jax.costs import exchange, interconnect
from upcycle_jax.costs.hardware import Accelerator
from upcycle_jax.costs.interconnect import Slices
from upcycle_jax.partitioning import DATA, MODEL
from upcycle_jax.planning.compilation import Workload, gib
from upcycle_jax.planning.estimate import (
    AbstractPartitioner,
    Hardware,
    Memory,
    Plan,
    divided_bytes,
    memory_of,
    passes_over_divided,
    summed_bytes,
)
from upcycle_jax.text import Table
from upcycle_jax.training import batches


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A step of the upcycled model on so many chips; times in seconds, none of which anything
    real falls below.

    Attributes:
      slices: where the chips are.
      workload: with the batch of so many chips.
      memory: of a device.
      compute: the model's products at the chips' peak.
      exchange_bytes: all-to-alls of a device, its own part included.
      exchange_inside: the exchange, where experts are divided inside a slice; None where their
        partitions do not fit into one.
      exchange_across: where experts are divided over all slices; None where the network's speed is
        not printed, 0 with one slice.
      sums_inside: sums of gradients inside of slices, and gathers of parameters that the data
        axis divides.
      sums_across: the part that goes between slices; None where the network's speed is not printed.
      most_rows: rows of a device's microbatch that there is room for; 0 where not even the state
        fits.
    """

    slices: Slices
    workload: Workload
    memory: Memory
    compute: float
    exchange_bytes: int
    exchange_inside: float | None
    exchange_across: float | None
    sums_inside: float
    sums_across: float | None
    most_rows: int

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.slices.count * self.slices.chips

    @property
    def verdict(self) -> str:
        """Whether experts must be divided inside a slice: where an exchange across slices takes
        longer than compute.
        """
        if not self.exchange_bytes:
            return "no exchange"
        if self.exchange_inside is None:
            return "cannot: it is too small"
        if self.slices.count == 1:
            return "one slice"
        if self.exchange_across is None:
            return "not known"
        return "yes" if self.exchange_across > self.compute else "no"


def scaled(plan: Plan, num_chips: int) -> Scaled:
    """The plan's upcycled model on another number of its chips.

    Raises:
      ValueError: the chips do not form the mesh, or rows of the batch do not divide.
    """
    chip, work = plan.hardware.chip, plan.workload
    hardware = Hardware(chip, num_chips)
    rows, left = divmod(work.batch_size * num_chips, plan.hardware.num_chips)
    if left or not rows:
        before = plan.hardware.num_chips
        multiple = before // math.gcd(work.batch_size, before)
        raise ValueError(
            f"--scale={num_chips}: {work.batch_size} rows on {before} chips are no whole number of"
            f" rows on {num_chips}; give a multiple of {multiple} chips"
        )
    old = work.partitioner
    partitioner = AbstractPartitioner(
        num_expert_partitions=old.num_expert_partitions,
        num_model_partitions=old.num_model_partitions,
        fsdp=old.fsdp,
        rules=old.rules,
        num_devices=hardware.num_devices,
    )
    work = dataclasses.replace(work, partitioner=partitioner, batch_size=rows)
    batches.check_batch_size(rows, work.trainer.num_microbatches or 1, partitioner)
    slices = Slices.of(chip, num_chips)
    inside, across = _sums(work, chip, slices)
    memory = memory_of(work, chip)
    sent = work.costs.exchange_bytes
    group = math.ceil(old.num_expert_partitions / chip.devices_per_chip)
    return Scaled(
        slices=slices,
        workload=work,
        memory=memory,
        compute=work.device_model_flops / chip.device_peak_flops,
        exchange_bytes=sent,
        exchange_inside=(
            interconnect.exchange_seconds(slices, sent * chip.devices_per_chip, group)
            if group <= slices.chips
            else None
        ),
        exchange_across=interconnect.network_seconds(
            chip, sent * chip.devices_per_chip, min(slices.count, group)
        ),
        sums_inside=inside,
        sums_across=across,
        most_rows=_most_rows(work, memory),
    )


def _sums(work: Workload, chip: Accelerator, slices: Slices) -> tuple[float, float | None]:
    """Seconds that sums of gradients take inside of slices and between them.

    In a slice each device scatters and gathers its gradients over the replicas there, a ring's 2 (n
    - 1) / n of them; between slices it sums the n-th part that it then holds, likewise. Parameters
    that the data axis divides are gathered, and their gradients scattered, first between slices, of
    which each has what its own devices hold, then inside.
    """
    shape = work.partitioner.mesh.shape
    per_slice = slices.chips * chip.devices_per_chip
    links = chip.interconnect_bandwidth / chip.devices_per_chip
    inside = across = 0.0
    for replicas, nbytes in summed_bytes(work).items():
        here = max(replicas // slices.count, 1)
        here = min(here, per_slice // shape[MODEL])
        inside += 2 * nbytes * (here - 1) / here
        there = replicas // here
        across += 2 * nbytes / here * (there - 1) / there
    data = shape[DATA]
    here, passes = max(data // slices.count, 1), 0
    if divided := divided_bytes(work):
        passes = passes_over_divided(work)
    inside += passes * divided * (here - 1) / here
    across += passes * divided * (data // here - 1) / data
    if slices.count == 1:
        return inside / links, 0.0
    if chip.network_bandwidth is None:
        return inside / links, None
    return inside / links, across / (chip.network_bandwidth / chip.devices_per_chip)


def _most_rows(work: Workload, memory: Memory) -> int:
    """Rows of a device's microbatch for which there is room beside state and gradients."""
    rows = work.batch_size // (work.trainer.num_microbatches or 1)
    mine = rows / work.partitioner.num_data_shards
    room = memory.available - memory.state.with_gradients
    return max(int(mine * room / memory.activations), 0)


def as_json(one: Scaled) -> dict[str, Any]:
    """Everything as plain JSON; bytes and seconds."""
    return {
        "chips": one.num_chips,
        "slices": one.slices.count,
        "mesh": dict(one.workload.partitioner.mesh.shape),
        "batch_size": one.workload.batch_size,
        "memory_needed": dataclasses.asdict(one.memory.needed),
        "most_rows_at_once": one.most_rows,
        "compute_at_peak": one.compute,
        "exchange_bytes": one.exchange_bytes,
        "exchange_inside_slice": one.exchange_inside,
        "exchange_across_slices": one.exchange_across,
        "gradient_sums_inside": one.sums_inside,
        "gradient_sums_between": one.sums_across,
        "must_stay_in_slice": one.verdict,
    }


def table(plan: Plan, found: Sequence[Scaled]) -> Table:
    """One column for each number of chips."""

    def milliseconds(seconds: float | None, compute: float) -> str:
        if not seconds:
            return "not known" if seconds is None else "-"
        return f"{1e3 * seconds:.3g} ms ({seconds / compute:.0%} of compute)"

    def row(name: str, *cells: str) -> list[str]:
        return [name, *cells]

    return Table(
        f"At scale, every {plan.hardware.chip.name} with the same work",
        ["", *(f"{one.num_chips:,} chips" for one in found)],
        [
            row("slices", *(f"{one.slices.count} x {one.slices.chips:,}" for one in found)),
            row(
                "mesh",
                *(
                    " x ".join(map(str, one.workload.partitioner.mesh.shape.values()))
                    for one in found
                ),
            ),
            row("batch, rows", *(f"{one.workload.batch_size:,}" for one in found)),
            row(
                "memory / device",
                *(
                    f"{gib(one.memory.needed.low)} to {gib(one.memory.needed.high)}"
                    for one in found
                ),
            ),
            row(
                f"  of {gib(found[0].memory.available)}",
                *(str(one.memory.verdict) for one in found),
            ),
            row("  rows of a device at once, at most", *(str(one.most_rows) for one in found)),
            row("compute at peak", *(f"{1e3 * one.compute:.3g} ms" for one in found)),
            row(
                "exchange inside a slice",
                *(milliseconds(one.exchange_inside, one.compute) for one in found),
            ),
            row(
                "exchange across slices",
                *(milliseconds(one.exchange_across, one.compute) for one in found),
            ),
            row(
                "sums and gathers inside slices",
                *(milliseconds(one.sums_inside, one.compute) for one in found),
            ),
            row(
                "sums and gathers between slices",
                *(milliseconds(one.sums_across, one.compute) for one in found),
            ),
            row("must experts stay in a slice?", *(one.verdict for one in found)),
        ],
    )


def arithmetic(plan: Plan, one: Scaled) -> list[str]:
    """The table's last column, step by step."""
    chip, work = plan.hardware.chip, one.workload
    group = math.ceil(work.partitioner.num_expert_partitions / chip.devices_per_chip)
    sent = one.exchange_bytes * chip.devices_per_chip
    lines = [
        (
            f"compute    {work.device_model_flops:.4g} FLOPs / {chip.device_peak_flops:.4g} FLOP/s"
            f" = {1e3 * one.compute:.3g} ms"
        )
    ]
    if one.exchange_inside and chip.torus_axes:
        sides = interconnect.block_sides(chip, group)
        cuts = 8 if group == one.slices.chips and one.slices.are_tori else 4
        lines.append(
            f"exchange   {gib(sent)} of a chip, {group} chips in a block of"
            f" {' x '.join(map(str, sides))}: {sides[0]} x {sent:.4g} bytes / ({cuts} x"
            f" {chip.link_bandwidth:.3g} bytes/s of a link) = {1e3 * one.exchange_inside:.3g} ms"
        )
    elif one.exchange_inside:
        lines.append(
            f"exchange   {group - 1} / {group} of {sent:.4g} bytes /"
            f" {chip.interconnect_bandwidth:.3g} bytes/s = {1e3 * one.exchange_inside:.3g} ms"
        )
    if one.exchange_across:
        spread = min(one.slices.count, group)
        lines.append(
            f"  across   {spread - 1} / {spread} of {sent:.4g} bytes / {chip.network_bandwidth:.3g}"
            f" bytes/s of the network = {1e3 * one.exchange_across:.3g} ms"
        )
    state, rows = one.memory.state.with_gradients, work.batch_size
    at_once = rows // (work.trainer.num_microbatches or 1) / work.partitioner.num_data_shards
    lines.append(
        f"memory     ({gib(one.memory.available)} - {gib(state)} of state and gradients) /"
        f" ({gib(one.memory.activations)} of activations / {at_once:g} at once) ="
        f" {one.most_rows} rows"
    )
    follows = " at even load" if exchange.follows_load(work.model) else ""
    return [
        f"Arithmetic for {one.num_chips:,} chips, exchanges from the shapes{follows} (figures of"
        f" links: {chip.source}):",
        *(f"  {line}" for line in lines),
    ]
