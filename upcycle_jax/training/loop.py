"""The loop of a run that is prepared, from opening its data to the last checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from upcycle_jax import surgery
from upcycle_jax.checkpoints import model_settings
from upcycle_jax.checkpoints.verification import DamagedCheckpointError
from upcycle_jax.costs.mfu import Utilisation
from upcycle_jax.costs.model_info import model_info
from upcycle_jax.data import BatchIterator
from upcycle_jax.data.faster_input import faster_input
from upcycle_jax.distributed import in_turn
from upcycle_jax.state_tree import PARAM_STATES, STEP, TARGET
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.text import duration
from upcycle_jax.training import (
    batches,
    data_place,
    description,
    garbage,
    manifest,
    prepare,
    restore,
    set_aside,
)
from upcycle_jax.training.early_programs import EarlyPrograms
from upcycle_jax.training.evaluation import Evaluator
from upcycle_jax.training.holding import Hold
from upcycle_jax.training.input_check import InputCheck
from upcycle_jax.training.interrupts import StopRequest
from upcycle_jax.training.metric_writers import MetricWriter, progress_line
from upcycle_jax.training.prepare import PreparedRun
from upcycle_jax.training.progress import LossWatch, Window
from upcycle_jax.training.restore import RECENT_LOSSES, Source, Start
from upcycle_jax.training.routing_check import RoutingCheck
from upcycle_jax.training.run_start import RUN_START
from upcycle_jax.training.saving import Saver
from upcycle_jax.training.spikes import LossHistory, OnSpike
from upcycle_jax.training.tracking import WandbRun
from upcycle_jax.training.train_settings import TrainSettings
from upcycle_jax.training.train_state import TrainState, model_hash
from upcycle_jax.training.train_step import TrainStep
from upcycle_jax.training.trainer import NonFinite

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run of `train` ended.

    Attributes:
      step: updates done in the whole run.
      start: how this call started, e.g. 'scratch' or 'resume'.
      interrupted: the signal that ended it early, or None.
      evaluation: metrics of the last evaluation by task, empty without one.
    """

    step: int
    start: str
    interrupted: str | None = None
    evaluation: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def train_prepared(
    run: PreparedRun, cost: description.Costs, stop: StopRequest, hold: Hold
) -> TrainResult:
    """Opens data, MODEL_DIR and state, in that order, and trains: data that cannot be read leaves
    no trace in MODEL_DIR.

    Args:
      run: what was prepared, with steps left to do.
      cost: what it costs.
      stop: the signals that end it early.
      hold: the lease of MODEL_DIR.
    """
    with contextlib.closing(EarlyPrograms(run)) as programs:
        return _train(run, cost, stop, hold, programs)


def _train(
    run: PreparedRun,
    cost: description.Costs,
    stop: StopRequest,
    hold: Hold,
    programs: EarlyPrograms,
) -> TrainResult:
    """See `train_prepared`."""
    settings = run.settings
    train_data = prepare.open_data(settings.model, settings.train_dataset_cfg)
    eval_data = None
    if settings.train_eval_dataset_cfg is not None:
        eval_data = prepare.open_data(settings.model, settings.train_eval_dataset_cfg)
    iterator = train_data.train_iterator(
        process_index=run.train_layout.shard, process_count=run.train_layout.num_shards
    )
    eval_tasks = {}
    if eval_data is not None and run.eval_layout is not None:
        eval_tasks = eval_data.eval_batches(
            num_batches=settings.eval_steps,
            process_index=run.eval_layout.shard,
            process_count=run.eval_layout.num_shards,
        )
    iterator.prepare(
        data_place.expected_batch(run.source, first_batch=settings.first_batch),
        settings.total_steps - run.source.step,
    )
    saves = settings.checkpoint_cfg.save is not None
    prepare.make_model_dir(settings.folder, checkpoint_bytes=cost.checkpoint_bytes if saves else 0)
    # Here every process has decided where it starts. Orbax opens no folder with damaged metadata.
    if restore.any_process(bool(run.source.damaged)):
        restore.set_aside(settings.folder, run.source.damaged)
    loop: _Loop | None = None
    try:
        with Saver(settings.folder, settings.checkpoint_cfg.save, hold) as saver:
            state, source = _load(run, saver, iterator, programs)
            run = dataclasses.replace(run, source=source)
            set_aside.set_aside(
                settings.folder, step=source.step, fresh=source.start != Start.RESUME
            )
            _write_start(run, cost, iterator.fingerprint())
            advice = functools.partial(faster_input, train_data)
            loop = _Loop(run, state, iterator, eval_tasks, saver, cost, hold, advice, programs)
            del state  # the loop donates it
            result = loop.run(stop)
        hold.require(look=True)
        status = f"interrupted by {result.interrupted}" if result.interrupted else "finished"
        manifest.update(settings.folder, status=status, step=result.step)
    except BaseException as error:
        if loop is not None:
            with contextlib.suppress(OSError):  # The disk may be full, which `error` says.
                loop.close(failed=True)
                if not hold.is_lost:
                    _write_failure(settings.folder, loop.step, error)
        raise
    loop.close(failed=False)
    return result


def _write_failure(model_dir: epath.Path, step: int, error: BaseException) -> None:
    text = f"{type(error).__name__}: {error}"[:2000]
    manifest.update(model_dir, status="failed", step=step, error=text)


def _load(
    run: PreparedRun, saver: Saver, iterator: BatchIterator, programs: EarlyPrograms
) -> tuple[TrainState, Source]:
    """The first state, and the data placed where it belongs; a checkpoint of MODEL_DIR that turns
    out to be damaged is passed over for the one before it.
    """
    settings, source = run.settings, run.source
    damaged: list[int] = []
    while True:
        error, state = None, None
        try:
            fresh = programs.fresh_state() if source.start == Start.SCRATCH else None
            state = (
                fresh()
                if fresh is not None
                else restore.load(
                    source,
                    model=settings.model,
                    optimizer=settings.trainer.optimizer,
                    groups=settings.trainer.parameter_groups,
                    seed=settings.random_seed,
                    specs=run.specs,
                    partitioner=settings.partitioner,
                    manager=saver.manager,
                )
            )
            data_place.place(source, iterator, saver.manager, first_batch=settings.first_batch)
        except DamagedCheckpointError as found:
            if source.start != Start.RESUME:
                raise
            error, state = found, None
        if source.start != Start.RESUME or not restore.any_process(error is not None):
            break
        restore.warn_of_damage(source.path, error or "another process found it damaged")
        damaged.append(source.step)
        source = restore.find_source(
            settings.folder, settings.checkpoint_cfg, run.specs, passed_over=damaged
        )
    assert state is not None
    if damaged and source.start == Start.RESUME:
        restore.set_aside(settings.folder, damaged)
        saver.reopen()
    return state, source


def _write_start(run: PreparedRun, cost: description.Costs, data_fingerprint: Any) -> None:
    """Leaves the run's description in MODEL_DIR."""
    settings, source = run.settings, run.source
    folder, files = settings.folder, settings.files or {}
    params = {
        path.removeprefix(TARGET): spec
        for path, spec in run.specs.items()
        if path.startswith(TARGET)
    }
    rest = {
        path: spec
        for path, spec in run.specs.items()
        if path == STEP or path.startswith(PARAM_STATES)
    }
    texts = {
        "model-info.txt": model_info(params, partitioner=settings.partitioner, state=rest),
        **files,
    }
    for name, text in texts.items():
        manifest.write_text(folder / name, text)
    identity = {
        "start_step": source.step,
        "total_steps": settings.total_steps,
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "train_flops_per_step": cost.train_flops_per_step,
        "model_hash": model_hash(params),
        "model": to_json(settings.model.config),
        "batch_size": settings.train_dataset_cfg.batch_size,
        "seed": settings.random_seed,
        "optimizer": str(settings.trainer.optimizer),
        **_groups(settings),
        "restored_from": source.record(),
        "recipe": to_json(source.plan.recipe) if source.plan is not None else None,
        "converted_by": _checkpoint_record(run).get("surgery", {}).get("recipe"),
        "data": data_fingerprint,
    }
    this_start = {
        "step": source.step,
        "restored_from": source.record(),
        "versions": manifest.versions(),
        "devices": manifest.devices(settings.partitioner.mesh),
        "cores": os.cpu_count(),
        "config_sha256": {name: manifest.digest(text) for name, text in files.items()},
    }
    previous = manifest.read(folder) if source.start == Start.RESUME else {}
    if previous.get("data") and not _same_data(previous["data"], data_fingerprint):
        _log.warning(
            "THE TRAINING DATA IS NOT WHAT IT WAS when %s was written: the manifest has the new"
            " fingerprint now",
            folder,
        )
    changed = manifest.model_changes(previous, identity)
    if changed:
        _log.warning(
            "%s goes on with other settings of its model than it began with: %s. If that is not"
            " wanted, set what it was",
            folder,
            "; ".join(changed),
        )
    manifest.write(folder, manifest.start(previous, identity=identity, this_start=this_start))


def _groups(settings: TrainSettings) -> dict[str, Any]:
    """The parameter groups, where there are any."""
    groups = settings.trainer.parameter_groups
    return {"parameter_groups": [str(group) for group in groups]} if groups else {}


def _same_data(before: Any, now: Any) -> bool:
    def bare(fingerprint: Any) -> Any:
        return (
            {k: v for k, v in fingerprint.items() if k != "versions"}
            if isinstance(fingerprint, Mapping)
            else fingerprint
        )

    return manifest.as_json(bare(before)) == manifest.as_json(bare(now))


class _Loop:
    """The state of a run while it runs."""

    def __init__(
        self,
        run: PreparedRun,
        state: TrainState,
        iterator: BatchIterator,
        eval_tasks: Mapping[str, Any],
        saver: Saver,
        cost: description.Costs,
        hold: Hold,
        faster: Callable[[], str],
        programs: EarlyPrograms,
    ):
        settings = run.settings
        self._run, self._settings, self._saver, self._iterator, self._eval_tasks = (
            run,
            settings,
            saver,
            iterator,
            eval_tasks,
        )
        self._hold, self._programs = hold, programs
        self._state = state
        self.step = run.source.step
        self._watch = LossWatch(
            settings.folder,
            NonFinite(settings.trainer.non_finite),
            _loss_history(run),
            layers=[layer for s in settings.model.stacks.values() for layer in s.moe_layers],
        )
        self._window = Window(
            batch_size=settings.train_dataset_cfg.batch_size,
            flops_per_step=cost.train_flops_per_step,
        )
        self._routing = RoutingCheck(settings.model.stacks.values())
        self._input = InputCheck(faster)
        self._utilisation = Utilisation.of_run(
            model_flops=cost.train_flops_per_step,
            hardware_flops=cost.hardware_flops_per_step,
            devices=settings.partitioner.mesh.devices.flat,
        )
        self._evaluator = (
            Evaluator(settings.model, settings.partitioner, num_shards=run.eval_layout.num_shards)
            if run.eval_layout
            else None
        )
        self._evaluation: dict[str, dict[str, Any]] = {}
        self._writers: dict[str, MetricWriter] = {}
        self._metadata = _checkpoint_record(run)
        self._tracker: WandbRun | None = None
        if settings.tracker is not None and jax.process_index() == 0:
            self._tracker = settings.tracker.start(settings.folder, manifest.read(settings.folder))

    def run(self, stop: StopRequest) -> TrainResult:
        """Trains to the end or to a signal.

        The order inside matters: losses are looked at before a state is saved or evaluated, the
        state is saved before it is evaluated (an evaluation may be long), and the next batch is
        taken after the save, whose data position then belongs to its step.
        """
        garbage.resume()
        settings = self._settings
        self._evaluate_start()
        train_step, batch = self._compile(next(self._iterator))
        reason = None
        self._window.go_on()
        while True:
            on_device = batches.to_global(
                batch, settings.partitioner, self._run.train_layout.num_shards
            )
            self._state, output = in_turn(train_step(self._state, on_device, *self._loss_limit()))
            self.step += 1
            self._hold.require()
            self._saver.check()
            self._window.add(output.metrics)
            self._watch.add(self.step, output, batch=self._iterator.position - 1, rows=batch)
            reason = stop.after_step(self.step)
            ends = self.step >= settings.total_steps or reason is not None
            evaluates = (
                self._evaluator is not None
                and not reason
                and (ends or self._due(settings.eval_period))
            )
            reports, saves = (
                ends or self._due(settings.report_period),
                ends or self._saver.due(self.step),
            )
            if reports or saves or evaluates:
                self._watch.settle()
                self._window.pause()
                if reports:
                    self._report()
                if saves:
                    self._saver.save(self._state, self.step, self._iterator, self._record())
                if evaluates:
                    self._evaluate()
                self._window.go_on()
            if ends:
                return TrainResult(
                    step=self.step,
                    start=str(self._run.source.start),
                    interrupted=reason,
                    evaluation=self._evaluation,
                )
            last: Any = output.loss  # the type of arrays does not know `is_ready`
            batch = self._input.take(self._iterator, last.is_ready)

    def close(self, *, failed: bool) -> None:
        """Closes the metric files and the tracker."""
        for writer in self._writers.values():
            writer.close()
        if self._tracker is not None:
            self._tracker.close(failed=failed)

    def _loss_limit(self) -> tuple[jax.Array, ...]:
        """The loss above which the next update is skipped, as the step's third argument; nothing
        where no spike is skipped.
        """
        history = self._watch.history
        if history is None or history.spikes.policy != OnSpike.SKIP:
            return ()
        return (
            batches.replicated_scalar(history.limit(self.step + 1), self._settings.partitioner),
        )

    def _record(self) -> dict[str, Any]:
        """What the next checkpoint says of itself."""
        history = self._watch.history
        return self._metadata | ({RECENT_LOSSES: history.record()} if history is not None else {})

    def _due(self, period: int | None) -> bool:
        return period is not None and self.step % period == 0

    def _compile(self, batch: Mapping[str, Any]) -> tuple[TrainStep, Mapping[str, Any]]:
        """The compiled step, and the batch that showed its shapes."""
        settings, shards = self._settings, self._run.train_layout.num_shards
        cfg = settings.train_dataset_cfg
        expected = settings.model.input_specs(
            cfg.batch_size, cfg.task_feature_lengths, packed=cfg.pack
        )
        batches.check_first_batch(batch, expected, shards)
        on_device = batches.to_global(batch, settings.partitioner, shards)
        compiled = self._programs.step(self._run, self._state, on_device, *self._loss_limit())
        return compiled, batch

    def _writer(self, name: str) -> MetricWriter:
        if name not in self._writers:
            self._writers[name] = MetricWriter(
                self._settings.folder / name, first_step=self._run.source.step
            )
        return self._writers[name]

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        """Metrics of one kind ('train', 'training_eval/<task>') at this step, from process 0."""
        if jax.process_index() == 0:
            self._hold.require()
            self._writer(name).write(self.step, values)
            if self._tracker is not None:
                self._tracker.write(self.step, name, values)

    def _report(self) -> None:
        values = self._window.take()
        values |= self._utilisation.metrics(values["timing/steps_per_second"])
        if self._watch.skipped:
            values["skipped_updates"] = float(self._watch.skipped)
        self._write("train", values)
        self._routing.look(values)
        self._input.look(values["timing/seconds"])
        speed, tokens = values["timing/steps_per_second"], values["timing/target_tokens_per_second"]
        _log.info(
            "%s",
            progress_line(
                self.step,
                self._settings.total_steps,
                values,
                steps_per_second=speed,
                tokens_per_second=tokens,
                unit=self._settings.model.features.unit,
            ),
        )

    def _evaluate_start(self) -> None:
        """Evaluates the restored state before any update, so that the drop that a conversion causes
        is seen.

        A resumed run has that behind it, unless it was killed in the middle of an evaluation.
        """
        if self._evaluator is None:
            return
        done = all(
            self._writer(f"training_eval/{task}").has_step(self.step) for task in self._eval_tasks
        )
        if self._run.source.start == Start.RESUME and (
            done or not (self._due(self._settings.eval_period))
        ):
            return
        self._evaluate()

    def _evaluate(self) -> None:
        assert self._evaluator is not None
        started = time.monotonic()
        self._evaluation = self._evaluator.evaluate(self._state.params, self._eval_tasks)
        for task, values in self._evaluation.items():
            self._write(f"training_eval/{task}", values)
            shown = "  ".join(
                f"{name} {values[name]:.4f}"
                for name in ("cross_ent_loss", "accuracy")
                if name in values
            )
            _log.info("step %d  %s: %s", self.step, task, shown)
        _log.info("evaluation took %s", duration(time.monotonic() - started))


def _checkpoint_record(run: PreparedRun) -> dict[str, Any]:
    """What every checkpoint of the run says about its origin; the record of a conversion is handed
    on from checkpoint to checkpoint.
    """
    source = run.source
    if source.plan is not None and source.reader is not None:
        record = surgery.record(source.plan, source.reader)
    else:
        record = dict(source.reader.metadata()) if source.reader is not None else {}
    record.pop(RECENT_LOSSES, None)
    if source.start != Start.RESUME:
        record.pop(RUN_START, None)  # of the run that the checkpoint comes from
    if run.settings.trainer.counts_from_start:
        record |= prepare.starts(run.settings, source).record()
    config = run.settings.model.config
    stated = model_settings.record(config.forward_settings) | model_settings.record_config(config)
    return record | stated


def _loss_history(run: PreparedRun) -> LossHistory | None:
    """The losses that spikes stand out of, those of the checkpoint included where the run resumes;
    None where spikes are not looked for.
    """
    spikes, source = run.settings.trainer.loss_spikes, run.source
    if spikes is None:
        return None
    known = (
        source.reader.metadata().get(RECENT_LOSSES, ())
        if source.start == Start.RESUME and source.reader is not None
        else ()
    )
    return LossHistory(spikes, known)
