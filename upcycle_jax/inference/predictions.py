"""Predictions or scores for every example of a task or mixture, as T5X-style JSON lines that
survive an interruption.
"""

import dataclasses
import enum
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from upcycle_jax import checks
from upcycle_jax.checkpoints import CheckpointReader, loading, open_checkpoint
from upcycle_jax.inference import ranking, running
from upcycle_jax.inference.inference_settings import InferenceSettings
from upcycle_jax.inference.job_files import KEPT, JobFiles
from upcycle_jax.inference.json_lines import json_line
from upcycle_jax.models.base import Generative
from upcycle_jax.models.generation import Decoded
from upcycle_jax.training import batches, full_disk, prepare
from upcycle_jax.types import PyTree

if TYPE_CHECKING:
    from upcycle_jax.data.examples import Example, TaskExamples

_log = logging.getLogger(__name__)


class Mode(enum.StrEnum):
    """What is written of each example."""

    PREDICT = "predict"
    PREDICT_WITH_AUX = "predict_with_aux"
    SCORE = "score"
    RANK = "rank"


@dataclasses.dataclass(frozen=True)
class InferResult:
    """What a run of `infer` wrote.

    Attributes:
      files: the finished file of each task.
      examples: examples that this run computed; those of an earlier, interrupted one do not
        count.
    """

    files: Mapping[str, epath.Path]
    examples: int


NOT_IN_IDENTITY = frozenset(
    {"output_dir", "partitioner", "shard_id", "num_shards", "verify", "files"}
)
"""Fields of `Infer` that change no line of a result; the part of the examples is in the names of
files.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infer(InferenceSettings):
    """Writes `<output_dir>/<task>-<mode>.jsonl-<shard>-of-<shards>` for each task of a mixture.

    A line is `{"inputs": {"inputs_pretokenized": ..., ...}, "prediction": "..."}` or `{"inputs":
    ..., "score": ...}`, in the order of the task; predict_with_aux adds `"aux": {"scores": [...],
    "predictions": [...]}`, all decodes and what the decoder ranks them by; rank gives
    `"prediction": "..."` and `"options": {"...": log-probability, ...}`. Finished batches are kept
    in `tmp-...` beside the file: the same command goes on from them, and has nothing to do where
    the file exists. What it was made with is kept in
    `settings-<task>-<mode>-<shard>-of-<shards>.json`, so that the file of another checkpoint or of
    other data is not taken for its result.

    `InferenceSettings` has the attributes that are not listed.

    Attributes:
      mode: 'predict', 'predict_with_aux', 'score' (the log-probability of the example's target) or
        'rank' (the most likely of the answers that an example allows).
      dataset_cfg: `DatasetConfig` of what to read; its batch size is that of predictions. It is
        read once and in order.
      checkpoint_path: a checkpoint, or a MODEL_DIR (its latest step).
      checkpoint_period: batches between two writes, T5X's name.
      shard_id: which part of the examples this job computes, from 0; jobs do not need to know of
        each other.
      num_shards: number of parts. Part i is every num_shards-th example from number i on.
      num_examples: only the first so many examples of each task; None for all.
      include_all_inputs: write every feature of an example, tokens included.
      random_seed: of a decoder that draws.
    """

    model: Generative
    mode: str = Mode.PREDICT
    checkpoint_period: checks.Count = 100
    shard_id: checks.CountOrZero = 0
    num_shards: checks.Count = 1
    num_examples: checks.Count | None = None
    include_all_inputs: bool = False
    random_seed: checks.Seed = 0

    def run(self, *, dry_run: bool = False) -> InferResult:
        """Predicts or scores what is not there yet.

        Args:
          dry_run: say what would be done and return; nothing is written.

        Raises:
          FileNotFoundError: no checkpoint is there.
          ValueError: settings that cannot run, a checkpoint of another model, one that is damaged
            or has NaN in its parameters, a full disk, or work of other settings or of a job that is
            under way in output_dir.
        """
        self._check()
        model, data = self.model, self.dataset_cfg
        batches.data_layout(self.partitioner, data.batch_size)  # raises where it does not split
        reader = open_checkpoint(self.checkpoint_path)
        loading.check_params(reader, model)
        if dry_run:
            print(
                f"{self.mode} {data.mixture_or_task_name!r}, split {data.split!r}, part"
                f" {self.part}, with {reader.path} (step {reader.step}) and {self.decoder!r},"
                f" {data.batch_size} examples at a time, to {self.output_dir}"
            )
            return InferResult(files={}, examples=0)

        from upcycle_jax.data.examples import task_examples

        dataset = prepare.open_data(model, data)
        tasks = task_examples(data, model.features, self.few_shot)
        settings = self.identity(reader, dataset.fingerprint())
        job = JobFiles(self.mode, epath.Path(self.output_dir), self.part, settings)
        _check_tasks(self, job, tasks)
        params = loading.load_params(reader, model, self.partitioner, verify=self.verify)
        job.write_files(self.files or {})
        examples = sum(_infer_task(self, job, task, params) for task in tasks)
        return InferResult({task.name: job.file(task.name) for task in tasks}, examples)

    @property
    def part(self) -> str:
        """The part of the examples, as names of files say it."""
        return f"{self.shard_id:05}-of-{self.num_shards:05}"

    def identity(self, reader: CheckpointReader, data: Mapping[str, Any]) -> dict[str, Any]:
        """What results are made with, as JSON gives it back: every field that is not of
        `NOT_IN_IDENTITY`, and the data. Results of another identity are not those of this job.

        Args:
          reader: of the checkpoint.
          data: fingerprint of the data; versions of libraries in it do not count.
        """
        decodes = self.mode in (Mode.PREDICT, Mode.PREDICT_WITH_AUX)
        config = self.dataset_cfg
        # Fields that JSON does not hold, or that do not count in every mode. Others are as they
        # are.
        told: dict[str, dict[str, Any]] = {
            "mode": {"mode": str(self.mode)},
            "checkpoint_path": {
                "checkpoint": str(reader.path),
                "fingerprint": reader.fingerprint(),
            },
            "decoder": {"decoder": repr(self.decoder) if decodes else None},
            "rank_options": {"rank_options": self.rank_options if self.mode == Mode.RANK else None},
            "few_shot": {"few_shot": repr(self.few_shot)},
            "model": {"model": repr(self.model.config.for_inference)},
            "dataset_cfg": {
                "task_feature_lengths": dict(config.task_feature_lengths),
                "split": config.split,
                "batch_size": config.batch_size,
            },
        }
        names = [field.name for field in dataclasses.fields(self)]
        as_it_is = {
            name: getattr(self, name) for name in names if name not in NOT_IN_IDENTITY | told.keys()
        }
        data = {name: value for name, value in data.items() if name != "versions"}
        entries = [entry for part in told.values() for entry in part.items()]
        return json.loads(json.dumps({**dict(entries), **as_it_is, "data": data}))

    def _check(self) -> None:
        if self.mode not in list(Mode):
            known = ", ".join(repr(str(mode)) for mode in Mode)
            raise ValueError(f"mode must be one of {known}, got {self.mode!r}")
        for name in ("checkpoint_period", "num_shards"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(
                f"shard_id must be from 0 to {self.num_shards - 1} (num_shards={self.num_shards}),"
                f" got {self.shard_id}"
            )


def _check_tasks(infer: Infer, job: JobFiles, tasks: Sequence["TaskExamples"]) -> None:
    """Raises a ValueError where work of other settings or of another job that lives is in the way
    of a task, or its first example does not say which answers it allows and they are to be ranked.
    """
    for task in tasks:
        job.check(task.name)
        job.refuse_if_held(task.name)
        for example in task.examples(1) if infer.mode == Mode.RANK else ():
            task.options(example, infer.rank_options)


def _infer_task(infer: Infer, job: JobFiles, task: "TaskExamples", params: PyTree) -> int:
    """Writes the chunks of one task that are not there yet, then the file; returns the number of
    examples computed.
    """
    if not job.file(task.name).exists():
        with full_disk.explained(str(job.output_dir), kept=KEPT), job.hold(task.name):
            job.check(task.name)  # Another job may have worked on it until now.
            if not job.file(task.name).exists():
                return _infer_chunks(infer, job, task, params)
    _log.info("%s is there already", job.file(task.name))
    job.remove_chunks(task.name)
    return 0


def _infer_chunks(infer: Infer, job: JobFiles, task: "TaskExamples", params: PyTree) -> int:
    started, count = time.monotonic(), 0
    runner = running.Runner(
        infer.model,
        infer.partitioner,
        batch_size=infer.dataset_cfg.batch_size,
        decoder=infer.decoder,
        eos_ids=task.eos_ids,
        max_length=task.target_length,
        seed=infer.random_seed,
    )
    finished = job.begin(task.name)
    if finished:
        _log.info(
            "%s: going on after %d chunks of %d batches",
            task.name,
            finished,
            infer.checkpoint_period,
        )
    chunks = 0
    for chunk in running.in_batches(
        _numbered(infer, task), infer.checkpoint_period * runner.batch_size
    ):
        chunks += 1
        if chunks <= finished:
            continue
        lines = []
        for rows in running.in_batches(chunk, runner.batch_size):
            lines += _records(infer, task, runner, params, rows)
        job.write_chunk(task.name, chunks - 1, lines)
        count += len(chunk)
        _log.info(
            "%s: %d examples, %.1f per second",
            task.name,
            count,
            count / (time.monotonic() - started),
        )
    job.merge(task.name, chunks)
    return count


def _numbered(infer: Infer, task: "TaskExamples") -> Iterator[tuple[int, "Example"]]:
    """The examples of this job's part, each with its number in the task."""
    part = task.examples(infer.num_examples, shard=infer.shard_id, num_shards=infer.num_shards)
    for place, example in enumerate(part):
        yield infer.shard_id + place * infer.num_shards, example


def _records(
    infer: Infer,
    task: "TaskExamples",
    runner: running.Runner,
    params: PyTree,
    rows: Sequence[tuple[int, "Example"]],
) -> list[str]:
    """JSON lines of one batch of (number, example)."""
    numbers, examples = [number for number, _ in rows], [example for _, example in rows]
    batch = task.batch(examples, runner.batch_size)
    records: list[dict[str, Any]] = [
        {"inputs": task.record(example, whole=infer.include_all_inputs)} for example in examples
    ]
    if infer.mode == Mode.SCORE:
        scores = runner.score(params, batch, len(rows))
        for record, score in zip(records, scores, strict=True):
            record["score"] = float(score)
    elif infer.mode == Mode.RANK:
        ranked = ranking.rank(task, runner, params, examples, infer.rank_options)
        for record, answer in zip(records, ranked, strict=True):
            record |= {"prediction": answer.best, "options": dict(answer.scores)}
    else:
        decoded = runner.predict(params, batch, numbers)
        for i, record in enumerate(records):
            record["prediction"] = task.decode(np.asarray(decoded.tokens[i, 0]))
            if infer.mode == Mode.PREDICT_WITH_AUX:
                record["aux"] = _all_decodes(task, decoded, i)
    return [json_line(record) for record in records]


def _all_decodes(task: "TaskExamples", decoded: Decoded, row: int) -> dict[str, Any]:
    return {
        "scores": np.asarray(decoded.scores[row]).tolist(),
        "predictions": [task.decode(tokens) for tokens in np.asarray(decoded.tokens[row])],
    }
