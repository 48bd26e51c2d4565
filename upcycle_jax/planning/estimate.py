"""What continuing a dense checkpoint would cost, dense, upcycled, or as an MoE from scratch:
memory, time and FLOPs, from shapes alone.

A plan is an estimate and says so: times are ranges, made of a range of model FLOPs utilisation
(MFU) and of what a chip's memory and links must move at least.
"""

import dataclasses
import enum
import functools
import math
import re

from jax.sharding import AbstractMesh

from upcycle_jax import axes
from upcycle_jax.costs import hardware, parameters
from upcycle_jax.costs.hardware import Accelerator
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.partitioning import DATA, EXPERT, MESH_AXES, Partitioner
from upcycle_jax.planning import compilation
from upcycle_jax.planning.compilation import State, Workload
from upcycle_jax.training import batches, prepare
from upcycle_jax.trees import LeafSpec

SECONDS_PER_DAY = 86_400
ASSUMED_EXTRA_STEPS = 100_000
"""Where nothing says how long to train: one plotted point of the paper's figures."""
DEFAULT_MFU = (0.25, 0.55)
MOE_SLOWDOWN = (0.75, 0.97)
MFU_SOURCE = (
    "dense MFU 25 to 55 %: an assumption; 52 % (Llama 3 8B on 512 H100, printed in arXiv"
    " 2412.09952) and 46 % (PaLM on TPU v4, arXiv 2204.02311) were reached by larger models with"
    " longer sequences. MoE: 0.75 to 0.97 times that; 0.75 is 39.2 / 52.4 % of arXiv 2412.09952 (8"
    " experts, capacity factor 2, printed), 0.97 is 1.49 times the FLOPs in 1.53 times the time of"
    " arXiv 2212.05055, figures 2 and 5 (read off). Measure steps of your own and give"
    " --mfu=LOW,HIGH to narrow it"
)


class Kind(enum.StrEnum):
    """What is trained."""

    DENSE = "dense continuation"
    UPCYCLED = "upcycled"
    SCRATCH = "MoE from scratch"


class Fit(enum.StrEnum):
    """Whether what a device holds has room on it."""

    FITS = "fits"
    MAY_FIT = "may fit"
    DOES_NOT_FIT = "DOES NOT FIT"


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Chips of one kind.

    Attributes:
      chip: what they are.
      num_chips: how many.
    """

    chip: Accelerator
    num_chips: int

    @property
    def num_devices(self) -> int:
        """jax devices; two per chip on TPU v2 and v3."""
        return self.num_chips * self.chip.devices_per_chip

    @classmethod
    def parse(cls, text: str) -> "Hardware":
        """From 'tpu_v5e:256', the kind and the number of chips.

        Raises:
          ValueError: it is not written so, or no such accelerator is known.
        """
        match = re.fullmatch(r"([^:]+):(\d+)", text.strip())
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"hardware {text!r} is not KIND:CHIPS, e.g. tpu_v5e:256 or h100:8; kinds:"
                f" {', '.join(hardware.names())}"
            )
        return cls(hardware.accelerator(match[1]), int(match[2]))


@dataclasses.dataclass(frozen=True)
class AbstractPartitioner(Partitioner):
    """A partitioner over devices that are not there: sizes and shard shapes, no placement.

    Attributes:
      num_devices: how many.
    """

    num_devices: int = 1

    @functools.cached_property
    def mesh(self) -> AbstractMesh:  # type: ignore[override]
        """The mesh's axes and sizes.

        Raises:
          ValueError: the device count is not a multiple of the two partition counts.
        """
        return AbstractMesh(self.mesh_shape(self.num_devices), MESH_AXES)


@dataclasses.dataclass(frozen=True)
class Range:
    """From `low` to `high`, in the unit that the owner says."""

    low: float
    high: float

    def __mul__(self, factor: float) -> "Range":
        return Range(self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      state: parameters and optimizer slots.
      activations: what one microbatch's backward pass needs.
      available: what the device has.
    """

    state: State
    activations: int
    available: int

    @property
    def needed(self) -> Range:
        """At the peak: gradients and activations share room (low) or stand side by side (high)."""
        state = self.state.parameters + self.state.optimizer
        return Range(
            state + max(self.state.parameters, self.activations),
            self.state.with_gradients + self.activations,
        )

    @property
    def verdict(self) -> Fit:
        """Whether a device has room."""
        if self.needed.high <= self.available:
            return Fit.FITS
        return Fit.MAY_FIT if self.needed.low <= self.available else Fit.DOES_NOT_FIT


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
      compute: matrix products, at the range of MFU.
      memory: reading and writing state and gradients at the full bandwidth of the chip's memory: a
        bound from below.
      network: all-to-alls of experts and sums of gradients at the full bandwidth of the chip's
        links: a bound from below.
    """

    compute: Range
    memory: float
    network: float

    @property
    def total(self) -> Range:
        """Low: everything at once, so the longest counts. High: one after the other."""
        return Range(
            max(self.compute.low, self.memory, self.network),
            self.compute.high + self.memory + self.network,
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training one model costs per step.

    Attributes:
      kind: what is trained.
      parameters: of the model.
      active_parameters: that a token meets on average.
      flops: of a step, all devices: matrix products, forward and backward.
      memory: of one device.
      time: of a step.
    """

    kind: Kind
    parameters: int
    active_parameters: int
    flops: float
    memory: Memory
    time: StepTime


@dataclasses.dataclass(frozen=True)
class Spending:
    """A number of steps of one kind.

    Attributes:
      kind: what is trained.
      steps: how many; a range where they are what a given device time pays for.
      flops: of all steps.
      tokens: positions of inputs and targets, padding included.
      device_days: devices times days.
    """

    kind: Kind
    steps: Range
    flops: Range
    tokens: Range
    device_days: Range


@dataclasses.dataclass(frozen=True)
class Plan:
    """Three ways to spend more compute on a dense checkpoint.

    Attributes:
      name: of the configuration.
      hardware: what it runs on.
      workload: the upcycled run.
      costs: per step, by kind.
      extra_steps: steps that the upcycled model is trained.
      is_assumed: nobody gave the extra steps.
      dense_steps: steps that the dense checkpoint was trained, or None where not known.
      tokens_per_step: positions of a batch.
      mfu: of dense models.
      advice: what to change where the upcycled model does not surely fit.
    """

    name: str
    hardware: Hardware
    workload: Workload
    costs: dict[Kind, Cost]
    extra_steps: int
    is_assumed: bool
    dense_steps: int | None
    tokens_per_step: int
    mfu: Range
    advice: list[str]

    def spend(self, kind: Kind, steps: Range) -> Spending:
        """What so many steps of a kind take."""
        cost, devices = self.costs[kind], self.hardware.num_devices
        days = Range(steps.low * cost.time.total.low, steps.high * cost.time.total.high) * (
            devices / SECONDS_PER_DAY
        )
        return Spending(kind, steps, steps * cost.flops, steps * self.tokens_per_step, days)

    def images_per_second(self, kind: Kind) -> Range | None:
        """Images that training of a kind goes through; None of models of something else."""
        if not isinstance(self.workload.model.features, ImageFeatures):
            return None
        seconds = self.costs[kind].time.total
        return Range(
            self.workload.batch_size / seconds.high, self.workload.batch_size / seconds.low
        )

    def equal_steps(self) -> list[Spending]:
        """Every kind trained for the extra steps."""
        return [self.spend(kind, Range(self.extra_steps, self.extra_steps)) for kind in Kind]

    def equal_flops(self) -> list[Spending]:
        """Every kind trained for the FLOPs that the upcycled model's extra steps take."""
        budget = self.extra_steps * self.costs[Kind.UPCYCLED].flops
        return [
            self.spend(kind, Range(budget / cost.flops, budget / cost.flops))
            for kind, cost in self.costs.items()
        ]

    def equal_time(self) -> list[Spending]:
        """Every kind trained for the device time that the upcycled model's extra steps take; both
        ends of the ranges are compared.
        """
        mine = self.costs[Kind.UPCYCLED].time.total
        out = []
        for kind, cost in self.costs.items():
            ratios = sorted((mine.low / cost.time.total.low, mine.high / cost.time.total.high))
            spent = self.spend(kind, Range(*ratios) * self.extra_steps)
            days = self.spend(Kind.UPCYCLED, Range(self.extra_steps, self.extra_steps)).device_days
            out.append(dataclasses.replace(spent, device_days=days))
        return out

    @property
    def extra_share(self) -> float | None:
        """FLOPs of the extra steps over those of the dense model's training so far; None where that
        is not known.
        """
        if not self.dense_steps:
            return None
        return (
            self.extra_steps
            * self.costs[Kind.UPCYCLED].flops
            / (self.dense_steps * self.costs[Kind.DENSE].flops)
        )


def make_plan(
    name: str,
    workload: Workload,
    hardware: Hardware,
    *,
    extra_steps: int | None,
    dense_steps: int | None,
    mfu: tuple[float, float] = DEFAULT_MFU,
) -> Plan:
    """Plans the upcycled run of a configuration and its two baselines.

    Args:
      name: what to call it.
      workload: the upcycled run; its devices do not matter.
      hardware: what to run on.
      extra_steps: steps that the upcycled model is trained; None: `ASSUMED_EXTRA_STEPS`.
      dense_steps: steps that the dense checkpoint was trained, or None.
      mfu: lowest and highest MFU of dense models.

    Raises:
      ValueError: the model is dense, a number is out of range, or the batch, the groups or an array
        do not divide over the mesh; the message says what to change.
    """
    if workload.model.config.moe is None:
        raise ValueError(
            "MODEL is dense: give the model that it becomes, e.g."
            " --gin_file=models/t5_1_1_base_upcycled.gin"
        )
    steps = ASSUMED_EXTRA_STEPS if extra_steps is None else extra_steps
    if steps < 1 or (dense_steps is not None and dense_steps < 1):
        raise ValueError(f"extra_steps {steps} and dense_steps {dense_steps} must be at least 1")
    if not 0 < mfu[0] <= mfu[1] <= 1:
        raise ValueError(
            f"mfu is {mfu[0]:g},{mfu[1]:g}: give the lowest and the highest utilisation, above 0"
            " and at most 1, e.g. 0.3,0.5"
        )
    old = workload.partitioner
    partitioner = AbstractPartitioner(
        num_expert_partitions=old.num_expert_partitions,
        num_model_partitions=old.num_model_partitions,
        fsdp=old.fsdp,
        rules=old.rules,
        num_devices=hardware.num_devices,
    )
    sparse = dataclasses.replace(workload, partitioner=partitioner, tile=hardware.chip.tile)
    batches.check_batch_size(sparse.batch_size, sparse.trainer.num_microbatches or 1, partitioner)
    prepare.check_microbatch_groups(
        sparse.model,
        sparse.trainer,
        batch_size=sparse.batch_size,
        task_feature_lengths=sparse.task_feature_lengths,
    )
    dense = dataclasses.replace(sparse, model=sparse.model.dense)
    moe_mfu = (mfu[0] * MOE_SLOWDOWN[0], mfu[1] * MOE_SLOWDOWN[1])
    upcycled = cost_of(Kind.UPCYCLED, sparse, hardware, mfu=moe_mfu)
    memory = upcycled.memory
    shape = StepShape(batch_size=sparse.batch_size, lengths=sparse.task_feature_lengths)
    return Plan(
        name=name,
        hardware=hardware,
        workload=sparse,
        costs={
            Kind.DENSE: cost_of(Kind.DENSE, dense, hardware, mfu=mfu),
            Kind.UPCYCLED: upcycled,
            Kind.SCRATCH: dataclasses.replace(upcycled, kind=Kind.SCRATCH),
        },
        extra_steps=steps,
        is_assumed=extra_steps is None,
        dense_steps=dense_steps,
        tokens_per_step=shape.num_tokens(sparse.model),
        mfu=Range(*mfu),
        advice=(
            []
            if memory.verdict is Fit.FITS
            else compilation.advice(sparse, round(memory.needed.high), memory.available)
        ),
    )


def cost_of(
    kind: Kind, workload: Workload, hardware: Hardware, *, mfu: tuple[float, float]
) -> Cost:
    """What a step of one model costs.

    Args:
      kind: what is trained.
      workload: the model, its batch and a mesh of the hardware's devices.
      hardware: what it runs on.
      mfu: lowest and highest MFU of this model.

    Raises:
      ValueError: an array or the groups do not divide over the mesh.
    """
    chip = hardware.chip
    if workload.tile != chip.tile:
        workload = dataclasses.replace(workload, tile=chip.tile)
    counts, costs = parameters.count(workload.model), workload.costs
    per_device = workload.device_model_flops
    memory = memory_of(workload, chip)
    # Parameters, slots and gradients are each read and written once.
    moved = 2 * memory.state.with_gradients
    sent = costs.exchange_bytes + gradient_bytes(workload)
    time = StepTime(
        compute=Range(
            per_device / (chip.device_peak_flops * mfu[1]),
            per_device / (chip.device_peak_flops * mfu[0]),
        ),
        memory=moved / (chip.hbm_bandwidth / chip.devices_per_chip),
        network=sent / (chip.interconnect_bandwidth / chip.devices_per_chip),
    )
    return Cost(kind, counts.total, counts.active, per_device * hardware.num_devices, memory, time)


def memory_of(workload: Workload, chip: Accelerator) -> Memory:
    """What a device needs and has; `Workload.tile` is the chip's.

    Raises:
      ValueError: an array or the groups do not divide over the mesh.
    """
    return Memory(
        compilation.state_bytes(workload), workload.costs.activation_bytes, chip.device_hbm_bytes
    )


def summed_bytes(workload: Workload) -> dict[int, int]:
    """Bytes of the gradients that one device holds a sum of, by the number of replicas that they
    are summed over (1: none).

    Gradients of experts are summed over the data axis, all others over the data and the expert
    axis; those of parameters that the data axis divides (`divided_bytes`) only over the latter.
    They are summed in the activations' dtype, as XLA does it, but for the embedding and the logits,
    whose gradients are float32.
    """
    sizes = workload.partitioner.mesh.shape
    found: dict[int, int] = {}
    for leaf in workload.model.param_specs().values():
        replicas = 1 if _is_divided(leaf, workload) else sizes[DATA]
        replicas *= 1 if axes.EXPERT in leaf.axes else sizes[EXPERT]
        found[replicas] = found.get(replicas, 0) + _shard_bytes(leaf, workload)
    return found


def divided_bytes(workload: Workload) -> int:
    """Bytes of the parameters that the data axis divides (FSDP), in the dtype in which they are
    gathered and their gradients are scattered: all of that axis together, of one device's part of
    the others.
    """
    shards = (
        _shard_bytes(leaf, workload)
        for leaf in workload.model.param_specs().values()
        if _is_divided(leaf, workload)
    )
    return workload.partitioner.mesh.shape[DATA] * sum(shards)


def passes_over_divided(workload: Workload) -> int:
    """How often a step moves the parameters that the data axis divides, or their gradients: in each
    microbatch they are gathered for the forward pass, again where the backward pass computes layers
    again, and their gradients are scattered.
    """
    again = 1 if workload.costs.recomputed_flops else 0
    return (workload.trainer.num_microbatches or 1) * (2 + again)


def _is_divided(leaf: LeafSpec, workload: Workload) -> bool:
    return any(
        DATA in ((entry,) if isinstance(entry, str) else entry or ())
        for entry in workload.partitioner.spec(leaf.axes)
    )


def _shard_bytes(leaf: LeafSpec, workload: Workload) -> int:
    itemsize = 4 if axes.VOCAB in leaf.axes else workload.model.config.activation_dtype.itemsize
    shard = workload.partitioner.shardings({"": leaf})[""].shard_shape(leaf.shape)
    return math.prod(shard) * itemsize


def gradient_bytes(workload: Workload) -> int:
    """Bytes that one device sends in a step so that gradients are summed over replicas: 2 (n - 1) /
    n of each, a ring's; and, where the data axis divides parameters, that they are gathered and
    their gradients scattered: (n - 1) / n of them in each pass.
    """
    n = workload.partitioner.mesh.shape[DATA]
    divided = divided_bytes(workload)
    moved = passes_over_divided(workload) * divided * (n - 1) / n if divided else 0
    return round(
        moved
        + sum(
            2 * nbytes * (replicas - 1) / replicas
            for replicas, nbytes in summed_bytes(workload).items()
        )
    )
