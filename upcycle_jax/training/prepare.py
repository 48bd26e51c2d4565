"""Everything that can be wrong with a run, checked before it computes or writes anything."""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping

from etils import epath

from upcycle_jax.checkpoints.formats import ORBAX_TEMPORARY
from upcycle_jax.checkpoints.model_settings import check_model
from upcycle_jax.checkpoints.steps import step_folders
from upcycle_jax.data import Dataset, DatasetConfig
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.models.base import Model, Stack, stack_lengths
from upcycle_jax.moe import grouping
from upcycle_jax.text import size
from upcycle_jax.training import batches, expert_slots, manifest, parameter_groups, restore
from upcycle_jax.training.restore import Source, Start
from upcycle_jax.training.run_start import RUN_START, Starts, recorded, state_start
from upcycle_jax.training.train_settings import TrainSettings
from upcycle_jax.training.train_state import state_specs
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.trees import LeafSpec

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that can start.

    Attributes:
      settings: what was asked for; an optimizer that leaves the form of its state to the
        checkpoint has that form.
      specs: specs of the whole state by full path.
      source: what it starts from.
      train_layout: this process's rows of training batches.
      eval_layout: this process's rows of evaluation batches, or None without evaluation.
    """

    settings: TrainSettings
    specs: Mapping[str, LeafSpec]
    source: Source
    train_layout: batches.DataLayout
    eval_layout: batches.DataLayout | None

    @property
    def trainer(self) -> Trainer:
        """The trainer, with what it counts from the start of the run counted from there.

        Raises:
          ValueError: the schedule ends before its decay begins.
        """
        trainer = self.settings.trainer
        if not trainer.counts_from_start:
            return trainer
        return trainer.started_at(starts(self.settings, self.source))


def starts(settings: TrainSettings, source: Source) -> Starts:
    """Where the run started that begins or resumes with `source`, and where its optimizer state.

    Raises:
      ValueError: nothing says it.
    """
    record = source.reader.metadata() if source.reader is not None else {}
    state = state_start(record, at_most=source.step)
    if source.start != Start.RESUME:
        fresh = source.fresh_optimizer or (
            source.plan is not None
            and getattr(source.plan.recipe, "optimizer_state", "") == "reset"
        )
        return Starts(run=source.step, state=source.step if fresh else state)
    run = recorded(record, RUN_START, at_most=source.step)
    if run is None:  # Nothing counted from there when that checkpoint was written.
        found = manifest.read(settings.folder)
        run = recorded(found, "start_step", at_most=source.step)
    if run is None:
        raise ValueError(
            f"the run counts steps from its start (step_offset = 'start'), and neither"
            f" {source.path} nor the {manifest.MANIFEST_FILE} of {settings.folder} says at which"
            " step it started: set step_offset to that step"
        )
    return Starts(run=run, state=state)


def prepare(settings: TrainSettings) -> PreparedRun:
    """Checks a run without computing, reading data or writing.

    Raises:
      FileNotFoundError: the checkpoint to start from does not exist.
      ValueError: numbers that do not divide, a checkpoint that does not fit, a MODEL_DIR of another
        model; see the message.
    """
    _check_numbers(settings)
    if settings.tracker is not None:
        settings.tracker.check()
    partitioner, trainer = settings.partitioner, settings.trainer
    batches.check_batch_size(
        settings.train_dataset_cfg.batch_size, trainer.num_microbatches or 1, partitioner
    )
    train_layout = batches.data_layout(partitioner, settings.train_dataset_cfg.batch_size)
    eval_layout = None
    if settings.train_eval_dataset_cfg is not None:
        eval_layout = batches.data_layout(partitioner, settings.train_eval_dataset_cfg.batch_size)
    check_groups(settings)
    param_specs = settings.model.param_specs()
    parameter_groups.check(trainer.parameter_groups, param_specs)
    optimizer = expert_slots.settle(
        trainer.optimizer,
        parameter_groups.trained(param_specs, trainer.parameter_groups),
        settings.folder,
        settings.checkpoint_cfg,
    )
    settings = dataclasses.replace(
        settings, trainer=dataclasses.replace(trainer, optimizer=optimizer)
    )
    specs = state_specs(settings.model, optimizer, trainer.parameter_groups)
    partitioner.shardings(specs)  # raises where a dimension does not divide over its mesh axis
    source = _find_source(settings, specs)
    expert_slots.warn_of_scaled_gradients(source, optimizer, param_specs)
    run = PreparedRun(settings, specs, source, train_layout, eval_layout)
    _ = run.trainer  # raises where what counts from the start of the run does not fit it
    return run


def looked_at_again(run: PreparedRun) -> PreparedRun:
    """The run as MODEL_DIR stands now that nobody else writes to it: a training that ended in the
    meantime may have left it to another model, or gone on.

    Raises:
      ValueError: as `prepare`.
    """
    settings = run.settings
    restore.check_owner(settings.folder, run.specs)
    if run.source.start != Start.RESUME and not step_folders(settings.folder):
        return run
    return dataclasses.replace(run, source=_find_source(settings, run.specs))


def _find_source(settings: TrainSettings, specs: Mapping[str, LeafSpec]) -> Source:
    source = restore.find_source(settings.folder, settings.checkpoint_cfg, specs)
    if source.reader is not None:
        check_model(source.reader, settings.model.config)
    check_steps(settings, source)
    return source


def _check_numbers(settings: TrainSettings) -> None:
    if not isinstance(settings.total_steps, int) or settings.total_steps < 1:
        raise ValueError(
            f"train.total_steps is {settings.total_steps!r}: give a positive number of steps"
        )
    for name in ("eval_steps", "eval_period", "stats_period"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"train.{name} is {value!r}: give a positive number, or None")
    if not isinstance(settings.first_batch, int) or settings.first_batch < 0:
        raise ValueError(
            f"train.first_batch is {settings.first_batch!r}: give the number of a batch, counted"
            " from 0"
        )


def check_groups(settings: TrainSettings) -> None:
    """Raises a ValueError where the tokens of a training microbatch or of an evaluation batch do
    not divide into routing groups, or where microbatches change the groups and may not.
    """
    for cfg, parts in (
        (settings.train_dataset_cfg, settings.trainer.num_microbatches or 1),
        (settings.train_eval_dataset_cfg, 1),
    ):
        if cfg is not None:
            for stack, length in _routed(settings.model, cfg.task_feature_lengths):
                stack.layer_sizes(cfg.batch_size // parts, length, train=True)
    check_microbatch_groups(
        settings.model,
        settings.trainer,
        batch_size=settings.train_dataset_cfg.batch_size,
        task_feature_lengths=settings.train_dataset_cfg.task_feature_lengths,
    )


def check_microbatch_groups(
    model: Model, trainer: Trainer, *, batch_size: int, task_feature_lengths: Mapping[str, int]
) -> None:
    """Raises a ValueError where microbatches change the routing groups of a batch and may not.

    Microbatches are consecutive rows: their groups are those of the batch where these are as large,
    and neither is padded along the batch.
    """
    parts = trainer.num_microbatches or 1
    moe = model.config.moe
    if moe is None or parts == 1:
        return
    rows, routed = batch_size // parts, _routed(model, task_feature_lengths)
    changed = []
    for stack, length in routed:
        whole, part = (
            stack.layer_sizes(batch, length, train=True).grouping for batch in (batch_size, rows)
        )
        if whole != dataclasses.replace(part, num_groups=whole.num_groups, batch_padding=0):
            changed.append(
                f"the {stack.name}'s batch is routed in groups of {whole.group_size} tokens, a"
                f" microbatch of {rows} rows in groups of {part.group_size}"
            )
    if not changed:
        return
    what = f"NUM_MICROBATCHES={parts} changes routing: {'; '.join(changed)}"
    if moe.t5x_mode or trainer.microbatch_groups == "of_microbatch":
        _log.warning("%s. Loss and gradients are not those of the whole batch", what)
        return
    common = math.gcd(*(rows * length for _, length in routed))
    size = grouping.largest_divisor(common, at_most=moe.group_size)
    raise ValueError(
        f"{what}. Set GROUP_SIZE to at most the tokens of a microbatch (GROUP_SIZE={size} divides"
        " them), use fewer microbatches, or set Trainer.microbatch_groups = 'of_microbatch' to"
        " route each microbatch on its own"
    )


def _routed(model: Model, task_feature_lengths: Mapping[str, int]) -> list[tuple[Stack, int]]:
    """The stacks with MoE layers, each with its length."""
    lengths = stack_lengths(model, task_feature_lengths)
    return [(stack, lengths[name]) for name, stack in model.stacks.items() if stack.sparse_layers]


def check_steps(settings: TrainSettings, source: Source) -> None:
    """Raises a ValueError where the step that the run starts from does not fit TRAIN_STEPS or the
    optimizer's step offset.
    """
    if source.step >= settings.total_steps and source.start != Start.RESUME:
        raise ValueError(
            f"the checkpoint {source.path} is at step {source.step}, TRAIN_STEPS is"
            f" {settings.total_steps}: TRAIN_STEPS counts from step 0 of the first run, so set it"
            f" above {source.step} (for n more steps: {source.step} + n)"
        )
    offset = settings.trainer.optimizer.step_offset
    if offset != "start" and offset > source.step:
        raise ValueError(
            f"the optimizer's step_offset is {offset}, but the run starts at step {source.step}:"
            f" the second moments cannot restart in the future. Set it to {source.step} (restart"
            " now) or 0 (go on)"
        )


def open_data(model: Model, config: DatasetConfig) -> Dataset:
    """Opens data for a model.

    Raises:
      FileNotFoundError, ValueError: as `open_dataset`; or the data has token ids that the model's
        embedding does not have.
    """
    dataset = open_dataset(config, model.features)
    needed, have = dataset.vocabulary_size(), model.vocab_size
    if have is not None and needed > have:
        raise ValueError(
            f"the vocabulary of {config.mixture_or_task_name!r} has {needed} ids, the model's"
            f" vocab_size is {have}: set {type(model.config).__name__}.vocab_size to at least"
            f" {needed} or choose another vocabulary"
        )
    return dataset


def check_model_dir(model_dir: epath.Path, *, checkpoint_bytes: int) -> str:
    """Looks whether a local MODEL_DIR can be written to and has room; writes nothing. What can only
    be found by writing is found by `make_model_dir`.

    Args:
      model_dir: the run's folder.
      checkpoint_bytes: size of one checkpoint, 0 where none is saved.

    Returns:
      What was found.

    Raises:
      ValueError: it cannot be written to, or one checkpoint does not fit.
    """
    if "://" in os.fspath(model_dir):
        return f"{model_dir} is not on a local disk: looked at when the run starts"
    folder = pathlib.Path(os.path.abspath(model_dir))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "may not be written to" if existing.is_dir() else "is a file"
        raise ValueError(
            f"MODEL_DIR {model_dir} cannot be written to ({existing} {why}): choose another folder"
            " or free it"
        )
    free = shutil.disk_usage(existing).free + _bytes_of_cut_short_saves(folder)
    if free < checkpoint_bytes:
        raise ValueError(
            f"MODEL_DIR {model_dir} has {size(free)} free, one checkpoint takes"
            f" {size(checkpoint_bytes)}: free space, keep fewer checkpoints"
            " (SaveCheckpointConfig.keep) or choose another folder"
        )
    return (
        f"{model_dir} can be written to; {size(free)} free, one checkpoint takes"
        f" {size(checkpoint_bytes)}"
    )


def _bytes_of_cut_short_saves(folder: pathlib.Path) -> int:
    """What the next start frees by removing them: a disk that filled during a save is full of
    one.
    """
    total = 0
    for cut_short in folder.glob(f"*{ORBAX_TEMPORARY}*"):
        for place, _, files in os.walk(cut_short):
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # a run that lives finishes its save
                    total += os.lstat(os.path.join(place, file)).st_size
    return total


def make_model_dir(model_dir: epath.Path, *, checkpoint_bytes: int) -> None:
    """Makes MODEL_DIR and tries a write, after `check_model_dir`, which has the arguments.

    Raises:
      ValueError: it cannot be written to, or one checkpoint does not fit.
    """
    check_model_dir(model_dir, checkpoint_bytes=checkpoint_bytes)
    probe = model_dir / f".write_test_{os.getpid()}"
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("can this folder be written to?")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"MODEL_DIR {model_dir} cannot be written to ({error}): choose another folder or"
            " free it"
        ) from error
