"""A run in words, before it starts: what `--dry_run` prints."""

import dataclasses

from upcycle_jax.costs import capacities, exchange, parameters
from upcycle_jax.costs.parameters import Bytes
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.surgery.plan_text import plan_text, totals
from upcycle_jax.text import size
from upcycle_jax.training.prepare import PreparedRun
from upcycle_jax.training.restore import Start
from upcycle_jax.training.step_costs import step_costs
from upcycle_jax.training.train_settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run costs.

    Attributes:
      parameters: of the model.
      active_parameters: that a token meets on average; equal to `parameters` for dense models.
      train_flops_per_step: matrix products, forward and backward.
      hardware_flops_per_step: the same with what the backward pass computes again
        (REMAT_POLICY).
      device_flops_per_step: what one device executes, elementwise operations, the optimizer and
        what is not split over the mesh included.
      exchange_bytes: all-to-alls of one device in a step, at even load.
      activation_bytes: what one device keeps for the backward pass.
      parameter_bytes: in total and per device.
      optimizer_bytes: in total and per device.
    """

    parameters: int
    active_parameters: int
    train_flops_per_step: float
    hardware_flops_per_step: float
    device_flops_per_step: float
    exchange_bytes: int
    activation_bytes: int
    parameter_bytes: Bytes
    optimizer_bytes: Bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, uncompressed."""
        return self.parameter_bytes.total + self.optimizer_bytes.total


def costs(run: PreparedRun) -> Costs:
    """Counts a run's parameters, FLOPs and bytes from its specs and the trace of its model."""
    settings, cfg = run.settings, run.settings.train_dataset_cfg
    params = {path: spec for path, spec in run.specs.items() if path.startswith(TARGET)}
    slots = {path: spec for path, spec in run.specs.items() if path.startswith(PARAM_STATES)}
    counts = parameters.count(settings.model)
    step = step_costs(
        settings.model,
        settings.trainer,
        settings.partitioner,
        batch_size=cfg.batch_size,
        lengths=cfg.task_feature_lengths,
        packed=cfg.pack,
    )
    on_cpu = settings.partitioner.mesh.devices.flat[0].platform == "cpu"
    return Costs(
        parameters=counts.total,
        active_parameters=counts.active,
        train_flops_per_step=float(step.model_flops),
        hardware_flops_per_step=float(step.hardware_flops),
        device_flops_per_step=step.device_flops,
        exchange_bytes=step.exchange_bytes,
        activation_bytes=step.all_activation_bytes if on_cpu else step.activation_bytes,
        parameter_bytes=parameters.nbytes(params, settings.partitioner),
        optimizer_bytes=parameters.nbytes(slots, settings.partitioner),
    )


def describe(run: PreparedRun, cost: Costs, *, whole_plan: bool = True) -> str:
    """The plan of a run as text: model, mesh, memory, steps, data, where it starts from, and the
    plan of the conversion if there is one.

    Args:
      run: the run.
      cost: what it costs.
      whole_plan: show the leaves of a conversion, not only its totals.
    """
    settings = run.settings
    mesh = settings.partitioner.mesh
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    params, optimizer = cost.parameter_bytes, cost.optimizer_bytes
    state = params.per_device * 2 + optimizer.per_device
    lines = [
        f"MODEL_DIR      {settings.folder}",
        f"start          {run.source.describe()}",
        (
            f"steps          {run.source.step} -> {settings.total_steps}"
            f" ({max(settings.total_steps - run.source.step, 0)} to do)"
        ),
        f"parameters     {cost.parameters:,} ({cost.active_parameters:,} active per token)",
        f"compute        {_compute(cost)}",
        f"mesh           {mesh.devices.size} x {device.device_kind}: {axes}",
        (
            f"memory         per device: parameters {size(params.per_device)}, optimizer"
            f" {size(optimizer.per_device)}, gradients {size(params.per_device)}: {size(state)},"
            f" and activations, about {size(cost.activation_bytes)}"
        ),
        f"checkpoint     {size(cost.checkpoint_bytes)}{_saving(settings)}",
        f"batch          {_batch(settings)}",
        *(f"capacity       {text}" for text in _capacities(settings)),
        f"optimizer      {settings.trainer.optimizer}",
        f"evaluation     {_evaluation(settings)}",
        *(f"group          {group}" for group in run.trainer.parameter_groups),
    ]
    if cost.exchange_bytes:
        even = " at even load" if exchange.follows_load(settings.model) else ""
        lines.insert(
            7,
            f"exchange       per device and step: {size(cost.exchange_bytes)} of all-to-alls{even}",
        )
    if run.source.damaged:
        lines.append(
            f"damaged        checkpoints of steps {', '.join(map(str, run.source.damaged))} cannot"
            " be read"
        )
    if run.source.start == Start.UPCYCLE:
        assert run.source.plan is not None
        plan, shardings = run.source.plan, settings.partitioner.shardings(run.specs)
        lines += [
            "",
            f"Upcycling with {plan.recipe}:",
            plan_text(plan, shardings) if whole_plan else totals(plan),
        ]
    return "\n".join(lines)


def _compute(cost: Costs) -> str:
    again = cost.hardware_flops_per_step - cost.train_flops_per_step
    return (
        f"{cost.train_flops_per_step:.3g} FLOPs per step (matrix products, forward and backward)"
        + (f", and {again:.3g} computed again" if again else "")
        + f"; one device executes {cost.device_flops_per_step:.3g}, elementwise operations included"
    )


def _saving(settings: TrainSettings) -> str:
    save = settings.checkpoint_cfg.save
    if save is None:
        return ", none is saved"
    keep = f", the latest {save.keep} kept" if save.keep else ", all kept"
    return f" every {save.period} steps and at the end{keep}"


def _batch(settings: TrainSettings) -> str:
    cfg = settings.train_dataset_cfg
    lengths = ", ".join(f"{name} {length}" for name, length in cfg.task_feature_lengths.items())
    parts = (
        f", {settings.trainer.num_microbatches} microbatches"
        if settings.trainer.num_microbatches
        else ""
    )
    return f"{cfg.batch_size} rows of {cfg.mixture_or_task_name} ({lengths}){parts}"


def _capacities(settings: TrainSettings) -> list[str]:
    cfg, parts = settings.train_dataset_cfg, settings.trainer.num_microbatches or 1
    return capacities.capacity_texts(
        settings.model, batch_size=cfg.batch_size // parts, lengths=cfg.task_feature_lengths
    )


def _evaluation(settings: TrainSettings) -> str:
    cfg = settings.train_eval_dataset_cfg
    if cfg is None:
        return "none"
    when = f"every {settings.eval_period} steps, " if settings.eval_period else ""
    how_much = f"{settings.eval_steps} batches" if settings.eval_steps else "all batches"
    return (
        f"{when}at the start and the end: {how_much} of {cfg.batch_size} rows of each task of"
        f" {cfg.mixture_or_task_name}, split {cfg.split}"
    )
