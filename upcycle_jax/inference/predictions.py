"""Predictions or scores for every example of a task or mixture, as T5X-style JSON lines that
survive an interruption.
"""

import contextlib
import dataclasses
import enum
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from upcycle_jax import checks, distributed
from upcycle_jax.checkpoints import loading, open_checkpoint
from upcycle_jax.data import fingerprints
from upcycle_jax.data.prompts import Options
from upcycle_jax.files import replacing, write_whole
from upcycle_jax.inference import ranking, running
from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.inference.json_lines import json_line
from upcycle_jax.models.base import Generative
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import full_disk, holding, prepare
from upcycle_jax.types import PyTree

if TYPE_CHECKING:
    from upcycle_jax.data.examples import Example, TaskExamples

_log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
KEPT = "Finished batches are kept"


class Mode(enum.StrEnum):
    """What is written of each example."""

    PREDICT = "predict"
    PREDICT_WITH_AUX = "predict_with_aux"
    SCORE = "score"
    RANK = "rank"


@dataclasses.dataclass(frozen=True)
class InferResult:
    """What a call of `infer` wrote.

    Attributes:
      files: the finished file of each task.
      examples: examples that this call computed; those of an earlier, interrupted call do not
        count.
    """

    files: Mapping[str, epath.Path]
    examples: int


def infer(
    *,
    mode: str = Mode.PREDICT,
    model: Generative,
    dataset_cfg: checks.Dataset,
    checkpoint_path: checks.PathText | os.PathLike,
    output_dir: checks.PathText | os.PathLike,
    partitioner: Partitioner = Partitioner(),
    decoder: DecodingAlgorithm = Greedy(),
    checkpoint_period: checks.Count = 100,
    shard_id: checks.CountOrZero = 0,
    num_shards: checks.Count = 1,
    num_examples: checks.Count | None = None,
    include_all_inputs: bool = False,
    rank_options: Options | None = None,
    few_shot: checks.Examples | None = None,
    random_seed: checks.Seed = 0,
    verify: bool = True,
    files: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> InferResult:
    """Writes `<output_dir>/<task>-<mode>.jsonl-<shard>-of-<shards>` for each task of a mixture.

    A line is `{"inputs": {"inputs_pretokenized": ..., ...}, "prediction": "..."}` or `{"inputs":
    ..., "score": ...}`, in the order of the task; predict_with_aux adds `"aux": {"scores": [...],
    "predictions": [...]}`, all decodes and what the decoder ranks them by; rank gives
    `"prediction": "..."` and `"options": {"...": log-probability, ...}`. Finished batches are kept
    in `tmp-...` beside the file: the same command goes on from them, and has nothing to do where
    the file exists. What it was made with is kept in
    `settings-<task>-<mode>-<shard>-of-<shards>.json`, so that the file of another checkpoint or of
    other data is not taken for its result.

    Args:
      mode: 'predict', 'predict_with_aux', 'score' (the log-probability of the example's target) or
        'rank' (the most likely of the answers that an example allows).
      model: the model.
      dataset_cfg: `DatasetConfig` of what to read; its batch size is that of predictions. It is
        read once and in order.
      checkpoint_path: a checkpoint, or a MODEL_DIR (its latest step).
      output_dir: made if need be.
      partitioner: the mesh.
      decoder: how predictions are searched.
      checkpoint_period: batches between two writes, T5X's name.
      shard_id: which part of the examples this job computes, from 0; jobs do not need to know of
        each other.
      num_shards: number of parts. Part i is every num_shards-th example from number i on.
      num_examples: only the first so many examples of each task; None for all.
      include_all_inputs: write every feature of an example, tokens included.
      rank_options: those answers, for all tasks or by task name; None leaves them to the tasks
        (`data.prompts`).
      few_shot: `FewShot`, solved examples before each input, or None.
      random_seed: of a decoder that draws.
      verify: compare the parameters with the checksums that were saved with them.
      files: small text files to leave in output_dir (name -> content), e.g. 'config.gin'.
      dry_run: say what would be done and return; nothing is written.

    Raises:
      FileNotFoundError: no checkpoint is there.
      ValueError: settings that cannot run, a checkpoint of another model, one that is damaged or
        has NaN in its parameters, a full disk, or work of other settings or of a call that is under
        way in output_dir.
    """
    _check_numbers(mode, checkpoint_period, shard_id, num_shards)
    running.data_layout(model, dataset_cfg, partitioner)
    reader = open_checkpoint(checkpoint_path)
    loading.check_params(reader, model)
    job = _Job(
        mode=Mode(mode),
        output_dir=epath.Path(output_dir),
        part=f"{shard_id:05}-of-{num_shards:05}",
        settings={
            "mode": str(mode),
            "checkpoint": str(reader.path),
            "fingerprint": reader.fingerprint(),
            "decoder": repr(decoder) if mode in (Mode.PREDICT, Mode.PREDICT_WITH_AUX) else None,
            "rank_options": rank_options if mode == Mode.RANK else None,
            "few_shot": repr(few_shot),
            "model": repr(model.config.for_inference),
            "task_feature_lengths": dict(dataset_cfg.task_feature_lengths),
            "split": dataset_cfg.split,
            "batch_size": dataset_cfg.batch_size,
            "checkpoint_period": checkpoint_period,
            "num_examples": num_examples,
            "include_all_inputs": include_all_inputs,
            "random_seed": random_seed,
        },
    )
    if dry_run:
        print(
            f"{mode} {dataset_cfg.mixture_or_task_name!r}, split {dataset_cfg.split!r}, part"
            f" {job.part}, with {reader.path} (step {reader.step}) and {decoder!r},"
            f" {dataset_cfg.batch_size} examples at a time, to {output_dir}"
        )
        return InferResult(files={}, examples=0)

    from upcycle_jax.data.examples import task_examples

    dataset = prepare.open_data(model, dataset_cfg)
    tasks = task_examples(dataset_cfg, model.features, few_shot)
    job = job.with_data(dataset.fingerprint())
    _check_tasks(job, tasks, rank_options)
    params = loading.load_params(reader, model, partitioner, verify=verify)
    job.write_files(files or {})
    done, count = {}, 0
    for task in tasks:
        runner = running.Runner(
            model,
            partitioner,
            batch_size=dataset_cfg.batch_size,
            decoder=decoder,
            eos_id=task.eos_id,
            seed=random_seed,
        )
        numbered = enumerate(task.examples(num_examples, shard=shard_id, num_shards=num_shards))
        examples = ((shard_id + place * num_shards, example) for place, example in numbered)
        count += _infer_task(
            job, task, runner, params, examples, checkpoint_period, include_all_inputs, rank_options
        )
        done[task.name] = job.file(task.name)
    return InferResult(files=done, examples=count)


def _check_numbers(mode: str, checkpoint_period: int, shard_id: int, num_shards: int) -> None:
    if mode not in list(Mode):
        raise ValueError(
            f"mode must be one of {', '.join(repr(str(known)) for known in Mode)}, got {mode!r}"
        )
    for name, value in (("checkpoint_period", checkpoint_period), ("num_shards", num_shards)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= shard_id < num_shards:
        raise ValueError(
            f"shard_id must be from 0 to {num_shards - 1} (num_shards={num_shards}), got {shard_id}"
        )


def _check_tasks(
    job: "_Job", tasks: Sequence["TaskExamples"], rank_options: Options | None
) -> None:
    """Raises a ValueError where work of other settings or of another call that lives is in the way
    of a task, or its first example does not say which answers it allows and they are to be ranked.
    """
    for task in tasks:
        job.check(task.name)
        job.refuse_if_held(task.name)
        for example in task.examples(1) if job.mode == Mode.RANK else ():
            task.options(example, rank_options)


def _infer_task(
    job: "_Job",
    task: "TaskExamples",
    runner: running.Runner,
    params: PyTree,
    examples: "Iterable[tuple[int, Example]]",
    batches_per_chunk: int,
    whole: bool,
    rank_options: Options | None,
) -> int:
    """Writes the chunks of one task that are not there yet, then the file; returns the number of
    examples computed.
    """
    if not job.file(task.name).exists():
        with full_disk.explained(str(job.output_dir), kept=KEPT), job.hold(task.name):
            job.check(task.name)  # Another call may have worked on it until now.
            if not job.file(task.name).exists():
                return _infer_chunks(
                    job, task, runner, params, examples, batches_per_chunk, whole, rank_options
                )
    _log.info("%s is there already", job.file(task.name))
    job.remove_chunks(task.name)
    return 0


def _infer_chunks(
    job: "_Job",
    task: "TaskExamples",
    runner: running.Runner,
    params: PyTree,
    examples: "Iterable[tuple[int, Example]]",
    batches_per_chunk: int,
    whole: bool,
    rank_options: Options | None,
) -> int:
    started, count = time.monotonic(), 0
    finished = job.begin(task.name)
    if finished:
        _log.info(
            "%s: going on after %d chunks of %d batches", task.name, finished, batches_per_chunk
        )
    chunks = 0
    for chunk in running.in_batches(examples, batches_per_chunk * runner.batch_size):
        chunks += 1
        if chunks <= finished:
            continue
        lines = []
        for rows in running.in_batches(chunk, runner.batch_size):
            lines += _records(job.mode, task, runner, params, rows, whole, rank_options)
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


def _records(
    mode: Mode,
    task: "TaskExamples",
    runner: running.Runner,
    params: PyTree,
    rows: Sequence[Any],
    whole: bool,
    rank_options: Options | None,
) -> list[str]:
    """JSON lines of one batch of (number, example)."""
    numbers, examples = [number for number, _ in rows], [example for _, example in rows]
    batch = task.batch(examples, runner.batch_size)
    records: list[dict[str, Any]] = [
        {"inputs": task.record(example, whole=whole)} for example in examples
    ]
    if mode == Mode.SCORE:
        scores = runner.score(params, batch, len(rows))
        for record, score in zip(records, scores, strict=True):
            record["score"] = float(score)
    elif mode == Mode.RANK:
        ranked = ranking.rank(task, runner, params, examples, rank_options)
        for record, answer in zip(records, ranked, strict=True):
            record |= {"prediction": answer.best, "options": dict(answer.scores)}
    else:
        decoded = runner.predict(params, batch, numbers)
        for i, record in enumerate(records):
            record["prediction"] = task.decode(np.asarray(decoded.tokens[i, 0]))
            if mode == Mode.PREDICT_WITH_AUX:
                record["aux"] = _all_decodes(task, decoded, i)
    return [json_line(record) for record in records]


def _all_decodes(task: "TaskExamples", decoded: Decoded, row: int) -> dict[str, Any]:
    return {
        "scores": np.asarray(decoded.scores[row]).tolist(),
        "predictions": [task.decode(tokens) for tokens in np.asarray(decoded.tokens[row])],
    }


@dataclasses.dataclass(frozen=True)
class _Job:
    """The files of one call. Process 0 writes; the others wait where they will read."""

    mode: Mode
    output_dir: epath.Path
    part: str
    settings: Mapping[str, Any]

    def with_data(self, fingerprint: Mapping[str, Any]) -> "_Job":
        """The same job, whose settings name the data too; versions of libraries do not count."""
        data = {name: value for name, value in fingerprint.items() if name != "versions"}
        settings = json.loads(json.dumps({**self.settings, "data": data}))
        return dataclasses.replace(self, settings=settings)

    def file(self, task: str) -> epath.Path:
        """The finished file."""
        return self.output_dir / f"{task}-{self.mode}.jsonl-{self.part}"

    def _folder(self, task: str) -> epath.Path:
        return self.output_dir / f"tmp-{task}-{self.mode}-{self.part}"

    def _chunk(self, task: str, index: int) -> epath.Path:
        return self._folder(task) / f"chunk-{index:06}.jsonl"

    def _settings_of_file(self, task: str) -> epath.Path:
        return self.output_dir / f"settings-{task}-{self.mode}-{self.part}.json"

    def check(self, task: str) -> None:
        """Raises a ValueError where work of other settings is in the way."""
        finished = self.file(task).exists()
        path = self._settings_of_file(task) if finished else self._folder(task) / SETTINGS_FILE
        if not path.exists():
            if finished:
                _log.warning(
                    "%s is there, and nothing says what it was made with: it is left as it is",
                    self.file(task),
                )
            return
        different = [
            line.partition(":")[0]
            for line in fingerprints.differences(json.loads(path.read_text()), self.settings)
        ]
        if different:
            what = (
                f"{self.file(task)} is the result"
                if finished
                else f"{path.parent} holds an unfinished job"
            )
            raise ValueError(
                f"{what} of other settings ({', '.join(different)}): "
                + ("remove it" if finished else "finish it with those, remove the folder")
                + ", or choose another INFER_OUTPUT_DIR"
            )

    def _lease(self, task: str) -> str:
        return f"{task}-{self.mode}-{self.part}"

    def hold(self, task: str) -> contextlib.AbstractContextManager[holding.Hold]:
        """The lease of one task's part: other parts and tasks are other calls' to write."""
        return holding.hold_results(self.output_dir, self._lease(task), setting="INFER_OUTPUT_DIR")

    def refuse_if_held(self, task: str) -> None:
        """Raises a ValueError where another call that lives works on the task."""
        holding.refuse_if_results_held(
            self.output_dir, self._lease(task), setting="INFER_OUTPUT_DIR"
        )

    def write_files(self, files: Mapping[str, str]) -> None:
        """Leaves small files in the output folder."""
        if distributed.is_first():
            with full_disk.explained(str(self.output_dir), kept=KEPT):
                self.output_dir.mkdir(parents=True, exist_ok=True)
                for name, text in files.items():
                    (self.output_dir / name).write_text(text)

    def begin(self, task: str) -> int:
        """Makes the folder of chunks; returns how many of them are finished."""
        if distributed.is_first():
            folder = self._folder(task)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=1))
        distributed.barrier(f"chunks of {task}")
        finished = 0
        while self._chunk(task, finished).exists():
            finished += 1
        distributed.barrier(f"chunks of {task} counted")
        return finished

    def write_chunk(self, task: str, index: int, lines: Sequence[str]) -> None:
        """Writes a chunk; one that is there is whole."""
        if distributed.is_first():
            write_whole(self._chunk(task, index), "".join(f"{line}\n" for line in lines))

    def merge(self, task: str, chunks: int) -> None:
        """Joins all chunks into the finished file, notes its settings and removes the chunks'
        folder.
        """
        if distributed.is_first():
            file = self.file(task)
            with replacing(file) as out:
                for index in range(chunks):
                    out.write(self._chunk(task, index).read_text())
                # Settings without their file are harmless; a file without settings is not.
                self._settings_of_file(task).write_text(json.dumps(self.settings, indent=1))
            _log.info("wrote %s", file)
        self.remove_chunks(task)
        distributed.barrier(f"{task} merged")

    def remove_chunks(self, task: str) -> None:
        """Removes the folder of chunks, which a call that was killed after the file was whole has
        left.
        """
        if distributed.is_first() and self._folder(task).exists():
            self._folder(task).rmtree()
