"""Evaluation of checkpoints: teacher-forced metrics, and the tasks' own metrics of what the model
predicts or scores.
"""

import dataclasses
import enum
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from upcycle_jax import checks, distributed
from upcycle_jax.checkpoints import CheckpointReader, loading
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features import HostBatch
from upcycle_jax.files import write_whole
from upcycle_jax.inference import perplexity, ranking, running
from upcycle_jax.inference.inference_settings import InferenceSettings
from upcycle_jax.inference.json_lines import json_line
from upcycle_jax.training import batches, full_disk, holding, prepare
from upcycle_jax.training.evaluation import Evaluator
from upcycle_jax.training.metric_writers import MetricWriter
from upcycle_jax.types import PyTree

if TYPE_CHECKING:
    from upcycle_jax.data.examples import Example, TaskExamples, TaskResult

_log = logging.getLogger(__name__)

FOLDER = "inference_eval"
TEACHER_FORCED = "teacher_forced/"


class Answering(enum.StrEnum):
    """Where a task's predictions come from."""

    DECODE = "decode"
    RANK = "rank"


AVERAGE = "average"
SHOTS = "shots_per_example"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(InferenceSettings):
    """Evaluates one, several or all checkpoints on every task of a mixture.

    Writes into `<output_dir>/inference_eval`: for each task a folder with one line per step in
    `metrics.jsonl` and TensorBoard events, and `<task>-<step>.jsonl`, one line per example:
    `{"input": ..., "target": ..., "prediction" and/or "score": ...}`. Metrics are the task's own
    (computed from predictions, or from scores for rank classification) and, as
    `teacher_forced/<name>`, those of evaluation during training, with those of `perplexity` for
    language models. A mixture of several tasks gets a
    folder of its own with `average`: the mean over tasks of the mean of each task's own metrics, as
    SuperGLUE averages. Images have no metrics of their own: their `teacher_forced/accuracy` is
    precision at 1.

    `InferenceSettings` has the attributes that are not listed.

    Attributes:
      model: the model; tasks with metrics of their own need one that produces sequences.
      dataset_cfg: `DatasetConfig` of what to evaluate on; its batch size is that of evaluation.
      output_dir: usually the MODEL_DIR.
      steps: which checkpoints of a MODEL_DIR: 'latest', 'all', a step or several.
      answering: 'decode' predicts with the decoder; 'rank' takes the most likely of the answers
        that each example allows as its prediction. Tasks whose metrics are of scores are not
        changed by it, and those of a mixture that list no answers are decoded.
      few_shot: `FewShot`, solved examples before each input of the tasks' own metrics, or None.
        Teacher-forced metrics are without.
      num_examples: only the first so many examples of each task for its own metrics; None for all.
      teacher_forced: also compute loss, accuracy and so on of the given targets.
      teacher_forced_batches: batches per task for those; None for the whole split.
      write_predictions: write `<task>-<step>.jsonl`.
      skip_evaluated: leave out steps that have a line for every task: a run that was interrupted
        goes on.
      random_seed: of a decoder that draws.
    """

    steps: str | checks.CountOrZero | Sequence[checks.CountOrZero] = "latest"
    answering: str = Answering.DECODE
    num_examples: checks.Count | None = None
    teacher_forced: bool = True
    teacher_forced_batches: checks.Count | None = None
    write_predictions: bool = True
    skip_evaluated: bool = False
    random_seed: checks.Seed = 0

    def run(self, *, dry_run: bool = False) -> dict[int, dict[str, dict[str, float]]]:
        """Returns metrics by step and task.

        Args:
          dry_run: say what would be done and return; nothing is written.

        Raises:
          FileNotFoundError: no checkpoint is there.
          ValueError: settings that cannot run, a checkpoint of another model, a damaged one or one
            with NaN, a full disk, or another evaluation of the mixture that is at work in
            output_dir.
        """
        self._check()
        layout = batches.data_layout(self.partitioner, self.dataset_cfg.batch_size)
        readers = running.checkpoints(self.checkpoint_path, self.steps)
        for reader in readers:
            loading.check_params(reader, self.model)
        if dry_run:
            print(self._plan(readers))
            return {}

        dataset = prepare.open_data(self.model, self.dataset_cfg)
        given: Mapping[str, Any] = {}
        if self.teacher_forced:
            given = dataset.eval_batches(
                num_batches=self.teacher_forced_batches,
                process_index=layout.shard,
                process_count=layout.num_shards,
            )
        tasks = self._tasks(given)
        name = self.dataset_cfg.mixture_or_task_name
        with (
            full_disk.explained(f"{self.output_dir}/{FOLDER}", kept="Finished steps are kept"),
            holding.hold_results(self.folder, name, setting="EVAL_OUTPUT_DIR"),
        ):
            _write_files(self)
            evaluator = Evaluator(self.model, self.partitioner, num_shards=layout.num_shards)
            results = {}
            for reader in readers:
                if self.skip_evaluated and _is_evaluated(self, tasks, reader.step):
                    _log.info("step %d has been evaluated", reader.step)
                    continue
                results[reader.step] = _one_checkpoint(self, reader, tasks, evaluator, given)
        return results

    @property
    def folder(self) -> epath.Path:
        """Where results are written."""
        return epath.Path(self.output_dir) / FOLDER

    @property
    def _data(self) -> DatasetConfig:
        config: DatasetConfig = self.dataset_cfg
        return config

    def _tasks(self, given: Iterable[str]) -> "dict[str, _Task]":
        """What is evaluated, by name; `given` are those with batches of targets."""
        if not self._data.has_task_metrics:
            return {name: _Task(self, name) for name in given}
        from upcycle_jax.data.examples import task_examples

        found = task_examples(self._data, self.model.features, self.few_shot)
        return {task.name: _TextTask(self, task, is_one_of_many=len(found) > 1) for task in found}

    def _check(self) -> None:
        by_targets_alone = not self._data.has_task_metrics
        if by_targets_alone and (not self.teacher_forced or self.few_shot is not None):
            raise ValueError(
                "images are evaluated by their labels alone: leave TEACHER_FORCED and FEW_SHOT as"
                " they are (runs/few_shot.gin evaluates features)"
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(
                f"num_examples must be at least 1, or None for all, got {self.num_examples}"
            )
        if self.answering not in list(Answering):
            raise ValueError(f"PREDICT_BY must be 'decode' or 'rank', got {self.answering!r}")

    def _plan(self, readers: Sequence[CheckpointReader]) -> str:
        """What would be done, in words."""
        what = readers[0].path.parent if len(readers) > 1 else readers[0].path
        listed = ", ".join(str(reader.step) for reader in readers)
        how = repr(self.decoder) if self.answering == Answering.DECODE else "ranked answers"
        data = self._data
        how = f", with {how}" if data.has_task_metrics else ""
        return (
            f"evaluate {what} (steps {listed}) on {data.mixture_or_task_name!r}, split"
            f" {data.split!r}{how}, to {self.output_dir}/{FOLDER}"
        )


def _is_evaluated(evaluation: Evaluate, tasks: Mapping[str, "_Task"], step: int) -> bool:
    return all(_writer(evaluation, name).has_step(step) for name in _written(evaluation, tasks))


def _write_files(evaluation: Evaluate) -> None:
    if distributed.is_first():
        evaluation.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (evaluation.files or {}).items():
            (evaluation.folder / name).write_text(text)


def _written(evaluation: Evaluate, tasks: Mapping[str, "_Task"]) -> list[str]:
    """Everything that gets a line at each step: the tasks and, where several have metrics of their
    own, the mixture with their average.
    """
    averaged = sum(task.has_metrics for task in tasks.values()) > 1
    return [*tasks, *((evaluation.dataset_cfg.mixture_or_task_name,) if averaged else ())]


def _one_checkpoint(
    evaluation: Evaluate,
    reader: CheckpointReader,
    tasks: Mapping[str, "_Task"],
    evaluator: Evaluator,
    given: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Metrics by task of one checkpoint, written as they come."""
    params = loading.load_params(
        reader, evaluation.model, evaluation.partitioner, verify=evaluation.verify
    )
    results: dict[str, dict[str, float]] = {}
    own = {}
    for name, task in tasks.items():
        started = time.monotonic()
        result = task.run(params, reader.step)
        if result is not None:
            own[name] = dict(result.metrics)
        values: dict[str, Any] = dict(own.get(name, {}))
        if name in given:
            forced = task.teacher_forced(params, evaluator, given[name])
            values |= {
                f"{TEACHER_FORCED}{key}": value
                for key, value in forced.items()
                if not key.startswith("timing/")
            }
        values["timing/evaluation_seconds"] = time.monotonic() - started
        results[name] = values
        _write(evaluation, name, reader.step, values)
    qualities = [
        [value for key, value in metrics.items() if key != SHOTS] for metrics in own.values()
    ]
    scored = [np.mean(values) for values in qualities if values]
    if len(scored) > 1:
        mixture = evaluation.dataset_cfg.mixture_or_task_name
        results[mixture] = {AVERAGE: float(np.mean(scored)), "tasks": float(len(scored))}
        _write(evaluation, mixture, reader.step, results[mixture])
    return results


class _Task:
    """One task, evaluated by its targets alone."""

    def __init__(self, evaluation: Evaluate, name: str):
        self._evaluation, self.name = evaluation, name

    @property
    def has_metrics(self) -> bool:
        """Whether the task has metrics of its own."""
        return False

    def teacher_forced(
        self, params: PyTree, evaluator: Evaluator, batches: Callable[[], Iterable[HostBatch]]
    ) -> dict[str, Any]:
        """Metrics of the given targets."""
        return evaluator.evaluate(params, {self.name: batches})[self.name]

    def run(self, params: PyTree, step: int) -> "TaskResult | None":
        """Predicts and scores what the task's metrics need and computes them; None where the task
        has none.
        """
        _log.info("%s has no metrics of its own", self.name)
        return None


class _TextTask(_Task):
    """One task of texts: its examples are read once, its programs are compiled once, for all
    checkpoints.
    """

    def __init__(self, evaluation: Evaluate, task: "TaskExamples", *, is_one_of_many: bool):
        super().__init__(evaluation, task.name)
        self._task, self._is_one_of_many = task, is_one_of_many
        self._outputs = self._task.outputs  # raises early where a metric cannot be served
        self._ranks = (
            "prediction" in self._outputs
            and evaluation.answering == Answering.RANK
            and self._check_options()
        )
        self._examples: list[Example] | None = None
        self._counter: perplexity.TextCounter | None = None
        if self._outputs:
            self._runner = running.Runner(
                running.generative(evaluation.model),
                evaluation.partitioner,
                batch_size=evaluation.dataset_cfg.batch_size,
                decoder=evaluation.decoder,
                eos_ids=self._task.eos_ids,
                max_length=self._task.target_length,
                seed=evaluation.random_seed,
            )

    @property
    def has_metrics(self) -> bool:
        """See `_Task`."""
        return bool(self._outputs)

    def _check_options(self) -> bool:
        """Whether the first example says which answers it allows. A task of a mixture that does not
        is decoded.

        Raises:
          ValueError: the only task does not.
        """
        for example in self._task.examples(1):
            if self._is_one_of_many and not self._task.has_options(
                example, self._evaluation.rank_options
            ):
                _log.warning(
                    "%s does not say which answers it allows: its predictions are decoded",
                    self.name,
                )
                return False
            self._task.options(example, self._evaluation.rank_options)
        return True

    def teacher_forced(
        self, params: PyTree, evaluator: Evaluator, batches: Callable[[], Iterable[HostBatch]]
    ) -> dict[str, Any]:
        """Metrics of the given targets; with perplexities where the model is a language model."""
        if not perplexity.is_language_model(self._evaluation.model):
            return super().teacher_forced(params, evaluator, batches)
        if self._counter is None:
            self._counter = perplexity.TextCounter(self._task.target_texts())
        counted = {self.name: self._counter.counting(batches)}
        values = evaluator.evaluate(params, counted)[self.name]
        counts = perplexity.over_processes(self._counter.counts, evaluator.num_shards)
        return values | perplexity.perplexities(float(values[perplexity.LOSS]), counts)

    def run(self, params: PyTree, step: int) -> "TaskResult | None":
        """See `_Task`.

        Raises:
          ValueError: the split is empty.
        """
        if not self._outputs:
            return super().run(params, step)
        if self._examples is None:
            self._examples = list(self._task.examples(self._evaluation.num_examples))
            if not self._examples:
                raise ValueError(
                    f"the split '{self._evaluation.dataset_cfg.split}' of the task"
                    f" '{self.name}' is empty"
                )
        outputs: dict[str, list[Any]] = {kind: [] for kind in self._outputs}
        ranked = None
        if self._ranks:
            ranked = ranking.rank(
                self._task, self._runner, params, self._examples, self._evaluation.rank_options
            )
            outputs["prediction"] = [answer.tokens for answer in ranked]
        for rows in running.in_batches(list(enumerate(self._examples)), self._runner.batch_size):
            batch = self._task.batch([example for _, example in rows], self._runner.batch_size)
            if "prediction" in outputs and not self._ranks:
                outputs["prediction"] += list(
                    self._runner.predict(params, batch, [number for number, _ in rows]).tokens[:, 0]
                )
            if "score" in outputs:
                outputs["score"] += self._runner.score(params, batch, len(rows)).tolist()
        result = self._task.evaluate(self._examples, outputs)
        shots = [int(example["num_shots"]) for example in self._examples if "num_shots" in example]
        if shots:
            result = dataclasses.replace(
                result, metrics={**result.metrics, SHOTS: float(np.mean(shots))}
            )
        if self._evaluation.write_predictions and distributed.is_first():
            self._write_predictions(step, outputs, result, ranked)
        return result

    def _write_predictions(
        self,
        step: int,
        outputs: Mapping[str, Sequence[Any]],
        result: "TaskResult",
        ranked: Sequence[ranking.Ranked] | None,
    ) -> None:
        from upcycle_jax.data.examples import as_json

        assert self._examples is not None
        lines = []
        for i, example in enumerate(self._examples):
            record: dict[str, Any] = {"input": self._task.record(example)}
            if result.targets is not None:
                record["target"] = as_json(result.targets[i])
            if "prediction" in outputs:
                record["output"] = self._task.decode(outputs["prediction"][i])
                record["prediction"] = (
                    as_json(result.predictions[i])
                    if result.predictions is not None
                    else record["output"]
                )
            if ranked is not None:
                record["options"] = dict(ranked[i].scores)
            if "score" in outputs:
                record["score"] = float(outputs["score"][i])
            lines.append(json_line(record) + "\n")
        path = self._evaluation.folder / f"{self.name}-{step}.jsonl"
        write_whole(path, "".join(lines))


def _writer(evaluation: Evaluate, name: str) -> MetricWriter:
    return MetricWriter(evaluation.folder / name)


def _write(evaluation: Evaluate, name: str, step: int, values: Mapping[str, Any]) -> None:
    if distributed.is_first():
        writer = _writer(evaluation, name)
        writer.write(step, values)
        writer.close()
    shown = {
        key: float(value)
        for key, value in values.items()
        if not key.startswith(("timing/", f"{TEACHER_FORCED}experts/"))
    }
    _log.info(
        "step %d  %s: %s",
        step,
        name,
        "  ".join(f"{key} {value:.4f}" for key, value in shown.items()),
    )
