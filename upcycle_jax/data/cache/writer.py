"""Writes a task's tokenised examples as ArrayRecord files that are read without TensorFlow
(`format` has the layout).

Work is done in parts, one file each, in a folder beside the final one; a killed run continues
after the last whole part.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from array_record.python import array_record_module

from upcycle_jax import leases
from upcycle_jax.data import fingerprints, resolve
from upcycle_jax.data.cache import format as cache_format
from upcycle_jax.data.cache import steps
from upcycle_jax.data.cache.format import TEXT_SETTINGS, CachedTask, FileEntry, Manifest, SplitEntry
from upcycle_jax.data.cache.views import DENOISE
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features.names import DOCUMENTS
from upcycle_jax.progress import Meter
from upcycle_jax.text import size

EXAMPLES_PER_PART = 50_000
_MOST_PARTS = 1024
_LONGEST_RECORD = 2**16
"""Tokens. A longer text is kept in several records, because a segment reads whole records."""
_WRITER_OPTIONS = "group_size:1,zstd:3"
"""Groups of one record, because grain reads records in random order."""
_REPORT_SECONDS = 10.0
_PLAN = "plan.json"

Report = Callable[[str], None]

_REMEDY = "start again with --overwrite"


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How caches are written.

    Attributes:
      output_cache_dir: the folder of all caches; a task's own is below it.
      splits: splits to cache, or None for all of the task.
      num_shards: files of each split, or None to choose; fewer where the source has fewer files.
      seed: of random steps before the place for caching.
      sequence_length: lengths for tasks with steps that need them before they can be cached, or
        None.
      overwrite: replace a cache, or an unfinished one, that was made from something else.
      verify: read every file of a cache that is there already and compare its sha256.
      report: takes lines of progress.

    Raises:
      ValueError: the output folder is not on a local disk.
    """

    output_cache_dir: pathlib.Path | str
    splits: Sequence[str] | None = None
    num_shards: int | None = None
    seed: int = 0
    sequence_length: Mapping[str, int] | None = None
    overwrite: bool = False
    verify: bool = False
    report: Report = print

    def __post_init__(self) -> None:
        if "://" in os.fspath(self.output_cache_dir):
            raise ValueError(
                f"output_cache_dir is {os.fspath(self.output_cache_dir)!r}: ArrayRecord files are"
                " written to local or mounted folders only"
            )

    @property
    def folder(self) -> pathlib.Path:
        """The folder of all caches."""
        return pathlib.Path(os.path.expanduser(self.output_cache_dir))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is written for one task."""

    task: seqio.Task
    division: steps.Division
    parts: Mapping[str, int]
    identity: Mapping[str, Any]
    features: Mapping[str, Mapping[str, Any]]
    sequence_length: Mapping[str, int] | None

    @property
    def is_text(self) -> bool:
        """Whether examples are runs of text whose noise comes when they are read."""
        return bool(self.division.steps) and self.division.steps[0]["step"] == DENOISE

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: feature["dtype"] for name, feature in self.features.items()}


def _parts(task: seqio.Task, split: str, num_shards: int | None) -> int:
    if task.source.supports_arbitrary_sharding:
        examples = task.source.num_input_examples(split) or 0
        wanted = num_shards or min(_MOST_PARTS, -(-examples // EXAMPLES_PER_PART))
        return max(1, min(wanted, examples or wanted))
    available = len(task.source.list_shards(split))
    return max(1, min(num_shards or available, available))


def _feature(feature: seqio.Feature) -> dict[str, Any]:
    described = steps.vocabulary(feature.vocabulary)
    path = described.get("path")
    if path is not None and os.path.isfile(path):
        described["file_sha256"] = cache_format.sha256_of_file(pathlib.Path(path))
    return {
        "vocabulary": described,
        "eos_id": described["eos_id"],
        "add_eos": bool(feature.add_eos),
        "dtype": cache_format.token_dtype(described["size"]),
    }


def _plan(task: seqio.Task, config: DatasetConfig, options: CacheOptions) -> _Plan:
    have = resolve.splits(task)
    unknown = sorted(set(options.splits or ()) - set(have))
    if unknown:
        raise ValueError(f"'{task.name}' has no split {unknown}: it has {sorted(have)}")
    division = steps.divide(task)
    if division.frozen and options.sequence_length is None:
        raise ValueError(
            f"the task '{task.name}' cannot be cached before these steps:"
            f" {', '.join(division.frozen)}. They may need lengths: give"
            " --gin.DatasetConfig.task_feature_lengths=\"{'inputs': ..., 'targets': ...}\"; the"
            " cache then serves these lengths only"
        )
    lengths = dict(options.sequence_length) if division.frozen and options.sequence_length else None
    parts = {
        str(split): _parts(task, split, options.num_shards)
        for split in sorted(options.splits or have)
    }
    features = {
        name: _feature(feature)
        for name, feature in task.output_features.items()
        if name != DOCUMENTS  # kept beside the tokens, or made when they are read
    }
    identity: dict[str, Any] = {
        "task": task.name,
        "source": fingerprints.source(task.source),
        "steps": fingerprints.preprocessors(task),
        "frozen": list(division.frozen),
        "vocabularies": {
            name: {key: value for key, value in feature["vocabulary"].items() if key != "path"}
            for name, feature in features.items()
        },
        "feature_lengths": lengths,
        "seed": options.seed,
        "parts": parts,
    }
    return _Plan(task, division, parts, json.loads(json.dumps(identity)), features, lengths)


def _examples(plan: _Plan, split: str, part: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Examples of one part as they are stored."""
    shard = seqio.ShardInfo(index=part, num_shards=plan.parts[split])
    if plan.division.frozen:
        dataset = plan.task.get_dataset(
            sequence_length=plan.sequence_length,
            split=split,
            shuffle=False,
            seed=seed,
            shard_info=shard,
            num_epochs=1,
            try_in_mem_cache=False,
        )
    else:
        given = shard if shard.num_shards > 1 else None
        dataset = plan.task.preprocess_precache(
            plan.task.source.get_dataset(split, shuffle=False, seed=seed, shard_info=given),
            seed=seed,
        )
    for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        if not plan.is_text:
            yield example
            continue
        tokens = example["targets"]
        for start in range(0, len(tokens), _LONGEST_RECORD):
            yield {"targets": tokens[start : start + _LONGEST_RECORD]}


def _lengths(example: Mapping[str, Any], plan: _Plan) -> list[int]:
    out = []
    for name in sorted(plan.features):
        tokens = example.get(name)
        if tokens is not None and np.ndim(tokens) != 1:
            raise ValueError(
                f"the feature '{name}' of '{plan.task.name}' has shape {np.shape(tokens)}: only"
                " token sequences can be cached"
            )
        out.append(0 if tokens is None else len(tokens))
    return out


def _write_parts(plan: _Plan, work: pathlib.Path, split: str, options: CacheOptions) -> None:
    """Writes the files of a split that are not whole yet."""
    stems = _stems(plan, split)
    lacking = [part for part, stem in enumerate(stems) if not (work / f"{stem}.json").exists()]
    meter = Meter(
        len(stems),
        options.report,
        unit="parts",
        period=_REPORT_SECONDS,
        done=len(stems) - len(lacking),
    )
    inputs = plan.task.source.num_input_examples(split)
    for done, part in enumerate(lacking, start=len(stems) - len(lacking)):

        def report(examples: int, done: int = done) -> None:
            share = min(1.0, examples * len(stems) / inputs) if inputs else 0.0
            meter.reach(done + share, f"{plan.task.name}, {split}, {examples:,} examples of a part")

        _write_part(plan, work, split, part, seed=options.seed, report=report)


def _stems(plan: _Plan, split: str) -> list[str]:
    """The names of a split's files, without their endings."""
    return [f"{split}-{part:05}-of-{plan.parts[split]:05}" for part in range(plan.parts[split])]


def _write_part(
    plan: _Plan,
    folder: pathlib.Path,
    split: str,
    part: int,
    *,
    seed: int,
    report: Callable[[int], None],
) -> None:
    """Writes one file and, last, the note that it is whole; reports how many examples are in it."""
    stem = _stems(plan, split)[part]
    note = folder / f"{stem}.json"
    path, temporary = folder / f"{stem}.array_record", folder / f"{stem}.writing"
    temporary.unlink(missing_ok=True)
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), _WRITER_OPTIONS)
    lengths = []
    try:
        for number, example in enumerate(_examples(plan, split, part, seed=seed), start=1):
            lengths.append(_lengths(example, plan))
            writer.write(cache_format.encode(example, token_dtypes=plan.dtypes))
            report(number)
    finally:
        writer.close()
    os.replace(temporary, path)
    np.save(
        folder / f"{stem}.lengths.npy", np.array(lengths, np.int64).reshape(-1, len(plan.features))
    )
    entry = FileEntry(
        path.name, len(lengths), path.stat().st_size, cache_format.sha256_of_file(path)
    )
    cache_format.write_json(note, dataclasses.asdict(entry))


def _finish_split(plan: _Plan, folder: pathlib.Path, split: str) -> SplitEntry:
    """Joins the parts' lengths into the index, and describes the split."""
    stems = _stems(plan, split)
    files = [FileEntry(**json.loads((folder / f"{stem}.json").read_text())) for stem in stems]
    records = sum(file.records for file in files)
    if not records:
        raise ValueError(
            f"the split '{split}' of '{plan.task.name}' has no example: leave it out with --splits,"
            " or give the task data"
        )
    path = folder / f"{split}.ends.npy"
    ends = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.int64, shape=(records, len(plan.features))
    )
    first, total = 0, np.zeros(len(plan.features), np.int64)
    for stem, file in zip(stems, files, strict=True):
        if file.records:
            ends[first : first + file.records] = total + np.cumsum(
                np.load(folder / f"{stem}.lengths.npy"), axis=0
            )
            first, total = first + file.records, ends[first + file.records - 1].copy()
    ends.flush()
    tokens = dict(zip(sorted(plan.features), total.tolist(), strict=True))
    index = FileEntry(path.name, 0, path.stat().st_size, cache_format.sha256_of_file(path))
    return SplitEntry(
        records=records,
        tokens=tokens,
        files=tuple(file for file in files if file.records),
        index=index,
    )


def _clear(folder: pathlib.Path, splits: Mapping[str, SplitEntry]) -> None:
    """Leaves only what the manifest names."""
    kept = {entry.name for split in splits.values() for entry in (*split.files, split.index)} | {
        cache_format.MANIFEST
    }
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def _existing(folder: pathlib.Path, plan: _Plan, *, overwrite: bool) -> CachedTask | None:
    """The finished cache of the same identity, if there is one.

    Raises:
      ValueError: the folder holds something else.
    """
    if not folder.exists():
        return None
    if not (folder / cache_format.MANIFEST).exists():
        raise ValueError(
            f"{folder} is there and is no cache of this command (SeqIO's own?): choose another"
            " --output_cache_dir"
        )
    if overwrite:
        return None
    found = CachedTask.open(folder, remedy=_REMEDY)
    _same_identity(
        found.manifest.identity, plan, f"{folder} holds another cache of '{plan.task.name}'"
    )
    return found


def _same_identity(found: Mapping[str, Any], plan: _Plan, what: str) -> None:
    differences = fingerprints.differences(found, plan.identity)
    if differences:
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise ValueError(
            f"{what}:\n{listed}\nChoose another --output_cache_dir, or replace it with --overwrite"
        )


def _working_folder(folder: pathlib.Path, plan: _Plan, *, overwrite: bool) -> pathlib.Path:
    """The folder of unfinished work, as it was left or new."""
    work = folder.with_name(folder.name + cache_format.UNFINISHED)
    note = work / _PLAN
    # Without a note it is what a killed call had not yet removed, or had just made.
    if work.exists() and (
        not note.exists() or (overwrite and json.loads(note.read_text()) != plan.identity)
    ):
        shutil.rmtree(work)
    if note.exists():
        _same_identity(
            json.loads(note.read_text()), plan, f"{work} is an unfinished cache of something else"
        )
    work.mkdir(parents=True, exist_ok=True)
    cache_format.write_json(note, plan.identity)
    return work


def write_task(task: seqio.Task, config: DatasetConfig, options: CacheOptions) -> CachedTask:
    """Caches one task, or continues where an earlier call stopped. A finished cache of the same
    task is left as it is.

    Raises:
      ValueError: the task has no such split or cannot be cached, the folder holds something else,
        cannot be written to or is full, or another call is writing the same cache.
    """
    plan = _plan(task, config, options)
    folder = options.folder / cache_format.folder_name(task.name)
    existing = _existing(folder, plan, overwrite=options.overwrite)
    if existing is None:
        with leases.hold(
            folder.with_name(f".{folder.name}.lease.json"),
            what=f"the cache of {task.name!r} in {options.folder}",
            remedy="choose another --output_cache_dir",
        ):
            # Another call may have written it until now.
            existing = _existing(folder, plan, overwrite=options.overwrite)
            if existing is None:
                return _write_task(plan, folder, config, options)
    if options.verify:
        existing.verify()
    options.report(
        f"{task.name}: cached already at"
        f" {folder}{', every file as it was written' if options.verify else ''}"
    )
    return existing


def _write_task(
    plan: _Plan, folder: pathlib.Path, config: DatasetConfig, options: CacheOptions
) -> CachedTask:
    task = plan.task
    if plan.division.frozen:
        options.report(
            f"{task.name}: these steps run once and are the same in every epoch:"
            f" {', '.join(plan.division.frozen)}"
        )
    try:
        work = _working_folder(folder, plan, overwrite=options.overwrite)
        splits = {}
        for split in plan.parts:
            _write_parts(plan, work, split, options)
            splits[split] = _finish_split(plan, work, split)
        manifest = Manifest(
            task=task.name,
            identity=plan.identity,
            features=plan.features,
            steps=plan.division.steps,
            feature_lengths=plan.sequence_length,
            splits=splits,
            text_files=(
                {name: getattr(config, name) for name in TEXT_SETTINGS}
                if config.text_files is not None
                else None
            ),
            versions={
                name: importlib.metadata.version(name)
                for name in ("seqio", "tensorflow", "array_record")
            },
        )
        cache_format.write_json(work / cache_format.MANIFEST, manifest.to_json())
        _clear(work, splits)
        replaced = folder.with_name(f"{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # what a call that was killed here has left
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(work, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: of the ArrayRecord writer
        raise ValueError(
            f"the cache of '{task.name}' cannot be written below {options.output_cache_dir}"
            f" ({error}): free space or choose another --output_cache_dir; the same command goes on"
            " after the last whole part"
        ) from error
    for split, entry in splits.items():
        written = sum(file.bytes for file in entry.files)
        tokens = ", ".join(
            f"{count:,} tokens of {name}" for name, count in entry.tokens.items() if count
        )
        options.report(
            f"{task.name}, {split}: {entry.records:,} examples, {tokens}, {size(written)}"
            f" in {len(entry.files)} files"
        )
    return CachedTask(folder, manifest, _REMEDY)


def _describe(task: seqio.Task, config: DatasetConfig, options: CacheOptions) -> str:
    plan = _plan(task, config, options)
    later = [step["step"] for step in plan.division.steps]
    splits = ", ".join(f"{split} in {count} parts" for split, count in plan.parts.items())
    return (
        f"{task.name}: {splits}; when it is read: {', '.join(later) or 'nothing'}; frozen:"
        f" {', '.join(plan.division.frozen) or 'nothing'}"
    )


def write_caches(
    config: DatasetConfig, options: CacheOptions, *, dry_run: bool = False
) -> tuple[CachedTask, ...]:
    """Caches every task that the configuration names; of a mixture its rates too. A dry run only
    reports what would be written.

    Raises:
      ValueError: as `write_task`.
    """
    provider = resolve.task_or_mixture(config)
    tasks = resolve.tasks(config)
    if dry_run:
        for task in tasks:
            options.report(_describe(task, config, options))
        return ()
    written = tuple(write_task(task, config, options) for task in tasks)
    if isinstance(provider, seqio.Mixture):
        folder = options.folder / cache_format.folder_name(provider.name)
        folder.mkdir(parents=True, exist_ok=True)
        rates = {task.name: float(provider.get_rate(task)) for task in tasks}
        cache_format.write_json(
            folder / cache_format.MIXTURE, {"mixture": provider.name, "tasks": rates}
        )
        options.report(f"{provider.name}: a mixture of {len(rates)} cached tasks")
    return written
