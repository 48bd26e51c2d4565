"""Compiles the programs of a run for devices that are not there, and says what they need.

Two programs: the train step, exactly as the loop jits it, and (for a run that upcycles) the program
that makes the experts of each tiled leaf while the dense checkpoint is restored. Nothing is
computed and no checkpoint is read.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from upcycle_jax import surgery
from upcycle_jax.byte_sizes import parse_bytes
from upcycle_jax.costs import parameters
from upcycle_jax.costs.step import StepCosts
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.planning import hlo, program_work
from upcycle_jax.planning.collectives import Traffic, collectives, summary
from upcycle_jax.planning.program_work import Work
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.surgery import MergeRecipe, Recipe, online
from upcycle_jax.training import batches, prepare
from upcycle_jax.training.step_costs import step_costs
from upcycle_jax.training.train_settings import TrainSettings
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import jitted_train_step
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.trees import LeafSpec

_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is compiled: the parts of a training run that decide its programs.

    Attributes:
      model: the model.
      trainer: optimizer, schedule, microbatches.
      partitioner: the mesh, over the devices to compile for.
      batch_size: rows of a batch, over all devices.
      task_feature_lengths: lengths of the features that the model needs.
      packed: whether batches carry segments.
      recipe: how a dense checkpoint becomes the model, or None for no upcycling.
      tile: what arrays are padded to, see `Accelerator.tile`; None: not known.
    """

    model: Model
    trainer: Trainer
    partitioner: Partitioner
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    packed: bool = False
    recipe: Recipe | MergeRecipe | None = None
    tile: tuple[int, int] | None = None

    @classmethod
    def of_run(cls, run: TrainSettings) -> "Workload":
        """Of a training run; the partitioner still has this machine's devices."""
        dataset, restore = run.train_dataset_cfg, run.checkpoint_cfg.restore
        return cls(
            model=run.model,
            trainer=run.trainer,
            partitioner=run.partitioner,
            batch_size=dataset.batch_size,
            task_feature_lengths=dataset.task_feature_lengths,
            packed=dataset.pack,
            recipe=restore.recipe if restore is not None else None,
        )

    @functools.cached_property
    def costs(self) -> StepCosts:
        """What one step costs, from the trace of the model.

        Raises:
          ValueError: the tokens do not divide into routing groups.
        """
        return step_costs(
            self.model,
            self.trainer,
            self.partitioner,
            batch_size=self.batch_size,
            lengths=self.task_feature_lengths,
            packed=self.packed,
            tile=self.tile,
        )

    @property
    def device_model_flops(self) -> float:
        """Model FLOPs of one step on one device: matrix products, forward and backward."""
        return self.costs.model_flops / self.partitioner.mesh.size


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled program; bytes and FLOPs are those of one device.

    Attributes:
      name: what it is.
      seconds: compile time.
      needed_bytes: memory at its peak: arguments, results that do not reuse them, temporaries,
        code.
      argument_bytes: of its arguments.
      temporary_bytes: of its temporaries.
      live_bytes: the most that is in use at once; what is needed beyond it lies unused between
        buffers. 0 where XLA does not say.
      flops: as XLA counts them, a loop's body once; 0 where it does not say.
      traffic: collectives by kind, or None where jax cannot read the program (a libtpu that is
        newer than jax).
      work: FLOPs of its matrix products and bytes that it moves, loops as often as they run; None
        where jax cannot read the program.
      fits: whether the compiler found room, apart from any comparison made here.
    """

    name: str
    seconds: float
    needed_bytes: int
    argument_bytes: int = 0
    temporary_bytes: int = 0
    live_bytes: int = 0
    flops: float = 0.0
    traffic: tuple[Traffic, ...] | None = ()
    work: Work | None = None
    fits: bool = True


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes of the state on one device, from the specs.

    Attributes:
      parameters: float32 parameters.
      optimizer: optimizer slots.
    """

    parameters: int
    optimizer: int

    @property
    def with_gradients(self) -> int:
        """Parameters, slots and one set of float32 gradients."""
        return 2 * self.parameters + self.optimizer


def state_bytes(workload: Workload, partitioner: Partitioner | None = None) -> State:
    """Bytes of parameters and optimizer state on one device.

    Raises:
      ValueError: an array does not divide over the mesh.
    """
    partitioner = partitioner or workload.partitioner
    trainer = workload.trainer
    specs = state_specs(workload.model, trainer.optimizer, trainer.parameter_groups)
    parts = [
        {path: spec for path, spec in specs.items() if path.startswith(prefix)}
        for prefix in (TARGET, PARAM_STATES)
    ]
    return State(*(parameters.nbytes(part, partitioner).per_device for part in parts))


def compile_train_step(workload: Workload) -> Compiled:
    """Compiles the train step.

    Raises:
      ValueError: the batch or an array does not divide over the mesh, or microbatches change what
        is routed together.
    """
    partitioner, trainer = workload.partitioner, workload.trainer
    batches.check_batch_size(workload.batch_size, trainer.num_microbatches or 1, partitioner)
    prepare.check_microbatch_groups(
        workload.model,
        trainer,
        batch_size=workload.batch_size,
        task_feature_lengths=workload.task_feature_lengths,
    )
    specs = state_specs(workload.model, trainer.optimizer, trainer.parameter_groups)
    shardings = partitioner.shardings(specs)
    state = from_state_dict(
        {path: _abstract(spec, shardings[path]) for path, spec in specs.items()}
    )
    features = workload.model.input_specs(
        workload.batch_size, workload.task_feature_lengths, packed=workload.packed
    )
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=partitioner.batch_sharding)
        for name, leaf in features.items()
    }
    step = jitted_train_step(
        workload.model, trainer, partitioner=partitioner, shardings=shardings, seed=0
    )
    with partitioner.activate():
        return _compiled("train step", lambda: step.lower(state, batch))


def compile_upcycling(workload: Workload) -> list[Compiled]:
    """Compiles the programs that tile dense leaves into experts during the restore, one per
    distinct shape.

    The dense source is the model without its experts, in float32.

    Raises:
      ValueError: the recipe does not fit the model.
    """
    dense, optimizer = workload.model.dense, workload.trainer.optimizer
    targets = state_specs(workload.model, optimizer, workload.trainer.parameter_groups)
    shardings = workload.partitioner.shardings(targets)
    plan = surgery.make_plan(state_specs(dense, optimizer), targets, workload.recipe)
    done: dict[Any, Compiled] = {}
    for row in plan.rows:
        # Unchanged leaves are only read, drawn ones are made on the host: neither has a program for
        # the devices.
        if not row.operation.stacked or not row.moves_values:
            continue
        sharding = shardings[row.target]
        sources = [
            _abstract(spec, online.source_sharding(row, spec, sharding))
            for spec in row.source_specs
        ]
        key = (row.operation, row.spec.shape, sharding)
        if key not in done:
            name = f"upcycling restore of {row.spec}"
            program = online.movement(row.operation, row.spec.shape, row.spec.dtype, sharding)
            done[key] = _compiled(
                name, lambda program=program, sources=sources: program.lower(sources)
            )
    return list(done.values())


def _abstract(spec: LeafSpec, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def _compiled(name: str, lower: Any) -> Compiled:
    lowered = lower()
    started = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _OUT_OF_MEMORY.search(str(error))
        if needed is None:
            raise
        return Compiled(name, time.monotonic() - started, parse_bytes(needed[1]), fits=False)
    seconds = time.monotonic() - started
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    arguments, temporaries = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
    results = int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes)
    text = _text(program)
    read = None if text is None else hlo.parse(text)
    return Compiled(
        name,
        seconds,
        needed_bytes=arguments
        + max(results, 0)
        + temporaries
        + int(memory.generated_code_size_in_bytes),
        argument_bytes=arguments,
        temporary_bytes=temporaries,
        live_bytes=int(getattr(memory, "peak_memory_in_bytes", 0)),
        flops=float(cost.get("flops", 0.0)),
        traffic=None if read is None else tuple(summary(collectives(read))),
        work=None if read is None else program_work.work(read),
    )


def _text(program: Any) -> str | None:
    """A compiled program's HLO, or None where jax cannot read it."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def advice(workload: Workload, needed_bytes: int, memory_bytes: int) -> list[str]:
    """What to change so that a step fits, each with what it would save on one device, largest
    first.

    Args:
      workload: what was compiled.
      needed_bytes: what its step needs on one device.
      memory_bytes: what one device has.
    """
    partitioner, config = workload.partitioner, workload.model.config
    now = state_bytes(workload)
    saved: list[tuple[int, str]] = []

    def consider(text: str, **changes: Any) -> None:
        try:
            after = state_bytes(workload, dataclasses.replace(partitioner, **changes))
            batches.check_batch_size(
                workload.batch_size,
                workload.trainer.num_microbatches or 1,
                dataclasses.replace(partitioner, **changes),
            )
        except ValueError:
            return
        saving = now.with_gradients - after.with_gradients
        if saving > 0:
            saved.append(
                (
                    saving,
                    (
                        f"{text}: state and gradients {gib(after.with_gradients)} instead of"
                        f" {gib(now.with_gradients)}"
                    ),
                )
            )

    if config.moe is not None:
        for parts in _larger_divisors(config.moe.num_experts, partitioner.num_expert_partitions):
            consider(f"NUM_EXPERT_PARTITIONS = {parts}", num_expert_partitions=parts)
    if not partitioner.fsdp:
        consider("Partitioner.fsdp = True", fsdp=True)
    for parts in _larger_divisors(partitioner.mesh.size, partitioner.num_model_partitions):
        consider(f"NUM_MODEL_PARTITIONS = {parts}", num_model_partitions=parts)
    activations = max(needed_bytes - now.with_gradients, 0)
    microbatches, rows = workload.trainer.num_microbatches or 1, workload.batch_size
    for factor in (2, 4, 8, 16):
        part, remainder = divmod(rows, microbatches * factor)
        fits = now.with_gradients + activations // factor <= memory_bytes
        if (
            not remainder
            and part
            and part % partitioner.num_data_shards == 0
            and (fits or factor == 2)
        ):
            after = activations // factor
            text = (
                f"NUM_MICROBATCHES = {microbatches * factor}: about {gib(after)} of activations"
                f" instead of {gib(activations)}"
            )
            saved.append((activations - activations // factor, text))
            break
    lines = [text for _, text in sorted(saved, key=lambda item: -item[0])]
    if config.remat_policy != "full":
        lines.append(
            "REMAT_POLICY = 'full': activations inside layers are computed again in the backward"
            " pass"
        )
    return [*lines, "a larger topology, or a smaller BATCH_SIZE"]


def _larger_divisors(number: int, than: int) -> Iterable[int]:
    return [n for n in range(than + 1, number + 1) if number % n == 0]


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 0.1 * 2**30 else f"{nbytes / 2**20:.1f} MiB"


def mesh_text(partitioner: Partitioner) -> str:
    """The mesh, e.g. 'data 8 x expert 32 x model 1'."""
    return " x ".join(f"{name} {size}" for name, size in partitioner.mesh.shape.items())
