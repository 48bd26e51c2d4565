"""Whether a run fits a TPU slice, as text and as a row of a table."""

import dataclasses

from upcycle_jax.costs import exchange, parameters
from upcycle_jax.planning import compilation, declared, roofline
from upcycle_jax.planning.collectives import Traffic
from upcycle_jax.planning.compilation import Compiled, State, Workload, gib
from upcycle_jax.planning.roofline import Roofline
from upcycle_jax.planning.topologies import Topology

COLUMNS = (
    "configuration",
    "parameters",
    "slice",
    "mesh",
    "batch",
    "microbatches",
    "state and gradients / device",
    "needed / device",
    "of",
    "model FLOPs / device / step",
    "all-to-all / device / step",
    "other collectives / device / step",
    "program / model FLOPs",
    "bytes / FLOP (chip)",
    "MFU at most",
    "restore needs / device",
    "compile time",
)

_ROUNDS = "; per round of loops whose length only the running program knows"


@dataclasses.dataclass(frozen=True)
class PodReport:
    """What compiling for a slice showed.

    Attributes:
      name: of the configuration.
      topology: the slice.
      workload: what was compiled.
      state: bytes of the state on one device.
      step: the compiled train step.
      restores: the compiled programs of the upcycling restore; empty where nothing is upcycled.
    """

    name: str
    topology: Topology
    workload: Workload
    state: State
    step: Compiled
    restores: tuple[Compiled, ...]

    @property
    def restore_bytes(self) -> int:
        """Peak memory of the restore on one device: the whole state, and what the largest leaf's
        program needs beside it.
        """
        return (
            self.state.parameters
            + self.state.optimizer
            + max((program.needed_bytes for program in self.restores), default=0)
        )

    @property
    def fits(self) -> bool:
        """Whether everything fits into one device's memory."""
        programs = (self.step, *self.restores)
        memory = self.topology.chip.memory_bytes
        return (
            all(p.fits for p in programs)
            and max(self.step.needed_bytes, self.restore_bytes) <= memory
        )

    @property
    def roofline(self) -> Roofline | None:
        """Bounds on the speed of the step; None where the program could not be read, or has no
        products.
        """
        work, traffic = self.step.work, self.step.traffic
        if work is None or traffic is None or not work.flops:
            return None
        sent = roofline.sent_bytes(traffic, len(self.topology.devices))
        return Roofline(self.workload.device_model_flops, work, sent, self.topology.chip)

    def text(self) -> str:
        """Everything, for people; ends with what to change where it does not fit."""
        work, chip = self.workload, self.topology.chip
        flops = work.device_model_flops
        lines = [
            (
                f"topology       {self.topology.name} ({self.topology.accelerator_type}):"
                f" {len(self.topology.devices)} devices of {gib(chip.memory_bytes)}"
            ),
            (
                f"mesh           {compilation.mesh_text(work.partitioner)}"
                f"{', fsdp' if work.partitioner.fsdp else ''}"
            ),
            f"model          {parameters.count(work.model).total:,} parameters",
            (
                f"batch          {work.batch_size} rows of {dict(work.task_feature_lengths)}, "
                f"{work.trainer.num_microbatches or 1} microbatches"
            ),
            (
                f"state          per device: parameters {gib(self.state.parameters)}, optimizer"
                f" {gib(self.state.optimizer)}, gradients {gib(self.state.parameters)}"
            ),
            (
                f"compute        per device and step: {flops:.4g} FLOPs of the model (XLA counts"
                f" {self.step.flops:.4g}, loop bodies once); at the chip's peak"
                f" {flops / chip.peak_flops * 1e3:.1f} ms"
            ),
            f"exchange       per device and step: {gib(work.costs.exchange_bytes)} of"
            " all-to-alls, from the shapes"
            + (" at even load" if exchange.follows_load(work.model) else ""),
            "",
            *self._program(self.step),
            *self._roofline(),
            *self._undeclared(),
        ]
        for program in self.restores:
            lines += self._program(program)
        if self.restores:
            lines.append(
                f"the restore needs at most {gib(self.restore_bytes)} per device: the state and one"
                " leaf's program"
            )
        lines += ["", *self._verdict()]
        return "\n".join(lines) + "\n"

    def _program(self, program: Compiled) -> list[str]:
        head = f"{program.name}: compiled in {program.seconds:.1f} s"
        if not program.fits:
            return [
                f"{head}; the compiler found no room: it needs {gib(program.needed_bytes)} per"
                " device"
            ]
        lines = [
            f"{head}; per device {gib(program.needed_bytes)}: arguments"
            f" {gib(program.argument_bytes)}, temporaries {gib(program.temporary_bytes)}"
            + (f"; in use at once {gib(program.live_bytes)}" if program.live_bytes else "")
        ]
        if program.traffic is None:
            return [
                *lines,
                (
                    "  collectives unknown: jax cannot read the program of this libtpu; install the"
                    " one that jax[tpu] names"
                ),
            ]
        lines += [f"  {_traffic_line(item)}" for item in program.traffic]
        return lines if program.traffic else [*lines, "  no collectives"]

    def _roofline(self) -> list[str]:
        """What the step's program does, beside what the model needs and the chip can do."""
        found = self.roofline
        if found is None:
            return []
        times = ", ".join(f"{name} {1e3 * time:.1f} ms" for name, time in found.seconds.items())
        return [
            (
                f"  {found.work.flops:.4g} FLOPs of matrix products, {found.waste:.3f} times the"
                f" model's; {found.bytes_per_flop:.2g} bytes moved per FLOP, the chip's ratio is"
                f" {found.chip_bytes_per_flop:.2g}" + (_ROUNDS if found.work.open_ended else "")
            ),
            f"  at least {times}: MFU is at most {found.mfu_bound:.0%} ({found.limit})",
        ]

    def _undeclared(self) -> list[str]:
        """Whether the step sends anything that it is not expected to send."""
        if self.step.traffic is None:
            return []
        found = declared.undeclared(self.workload, self.step.traffic)
        if not found:
            return ["  every collective is an exchange of experts, a sum, or FSDP's"]
        return [f"  NOT EXPECTED: {_traffic_line(item)}" for item in found]

    def _bounds(self) -> list[str]:
        """The cells of `_roofline`."""
        found = self.roofline
        if found is None:
            return ["unknown"] * 3
        return [
            f"{found.waste:.3f}" + (" per round" if found.work.open_ended else ""),
            f"{found.bytes_per_flop:.2g} ({found.chip_bytes_per_flop:.2g})",
            f"{found.mfu_bound:.0%} ({found.limit})",
        ]

    def _verdict(self) -> list[str]:
        memory = self.topology.chip.memory_bytes
        needed = max(self.step.needed_bytes, self.restore_bytes)
        if self.fits:
            return [f"FITS: {gib(needed)} of {gib(memory)} per device ({needed / memory:.0%})"]
        changes = compilation.advice(self.workload, self.step.needed_bytes, memory)
        return [
            f"DOES NOT FIT: {gib(needed)} of {gib(memory)} per device. Any of these helps, the"
            " largest saving first:"
        ] + [f"  {line}" for line in changes]

    def cells(self) -> list[str]:
        """The row of the table, in the order of `COLUMNS`."""
        work, chip = self.workload, self.topology.chip
        exchanged = other = "unknown"
        if self.step.traffic is not None:
            sums = [
                sum(t.nbytes for t in self.step.traffic if (t.kind == "all-to-all") == is_exchange)
                for is_exchange in (True, False)
            ]
            exchanged, other = (gib(nbytes) if nbytes else "-" for nbytes in sums)
            if any(item.open_ended for item in self.step.traffic if item.kind == "all-to-all"):
                exchanged += " per round"
        return [
            self.name,
            f"{parameters.count(work.model).total:,}",
            f"{self.topology.name} ({self.topology.accelerator_type})",
            compilation.mesh_text(work.partitioner) + (", fsdp" if work.partitioner.fsdp else ""),
            str(work.batch_size),
            str(work.trainer.num_microbatches or 1),
            gib(self.state.with_gradients),
            gib(self.step.needed_bytes) + ("" if self.fits else ": does not fit"),
            gib(chip.memory_bytes),
            f"{work.device_model_flops:.3g}",
            exchanged,
            other,
            *self._bounds(),
            gib(self.restore_bytes) if self.restores else "-",
            f"{self.step.seconds + sum(p.seconds for p in self.restores):.0f} s",
        ]


def markdown(reports: list[PodReport]) -> str:
    """A Markdown table of reports."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(report.cells() for report in reports)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def build(name: str, topology: Topology, workload: Workload) -> PodReport:
    """Compiles everything.

    Raises:
      ValueError: the configuration does not fit the mesh.
    """
    return PodReport(
        name=name,
        topology=topology,
        workload=workload,
        state=compilation.state_bytes(workload),
        step=compilation.compile_train_step(workload),
        restores=(
            tuple(compilation.compile_upcycling(workload)) if workload.recipe is not None else ()
        ),
    )


def _traffic_line(item: Traffic) -> str:
    among = f"groups of {item.group_size}" if item.group_size else "all devices"
    rounds = _ROUNDS if item.open_ended else ""
    return (
        f"{item.kind:<20} {item.count:>5} x, {gib(item.nbytes):>10} per device, among"
        f" {among}{rounds}"
    )
