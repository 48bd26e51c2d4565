"""Finds the caches that a configuration with `use_cached` names, or gives the command that makes
them. No TensorFlow.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from upcycle_jax import data_folders
from upcycle_jax.data import tensorflow_import
from upcycle_jax.data.cache.format import (
    MANIFEST,
    MIXTURE,
    SEQIO_COMPLETED,
    TEXT_SETTINGS,
    CachedTask,
    find_folder,
    sha256_of_file,
)
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.text import tokenizer
from upcycle_jax.features import FeatureConverter, check_all_read, token_features

_TOKENIZER = "TokenizerVocabulary"
"""The kind of vocabulary that is a Hugging Face tokenizer; its class needs SeqIO."""
_COMMAND, _DEFAULT_FOLDER = "python -m upcycle_jax.cache_tasks", "cache"


@dataclasses.dataclass(frozen=True)
class CachedMixture:
    """Cached tasks with their mixing rates, sorted by name; a single task has rate 1."""

    name: str
    tasks: tuple[tuple[CachedTask, float], ...]

    def tasks_with(self, split: str) -> tuple[tuple[CachedTask, float], ...]:
        """The tasks that have the split.

        Raises:
          ValueError: none has.
        """
        having = tuple((task, rate) for task, rate in self.tasks if split in task.manifest.splits)
        if not having:
            splits = sorted({name for task, _ in self.tasks for name in task.manifest.splits})
            raise ValueError(f"the cache of '{self.name}' has no split '{split}': it has {splits}")
        return having

    def verify(self) -> int:
        """Reads every file of every task and compares its sha256; returns the bytes read.

        Raises:
          ValueError: a file is not what was written.
        """
        for task, _ in self.tasks:
            task.verify()
        return sum(task.num_bytes for task, _ in self.tasks)

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids."""
        return max(task.manifest.vocabulary_size for task, _ in self.tasks)


def command(config: DatasetConfig, *, overwrite: bool = False, with_lengths: bool = False) -> str:
    """The shell command that caches what the configuration reads; with its lengths for tasks whose
    cache serves one choice of them.
    """
    folders = data_folders.current().cache_dirs
    words = [*_COMMAND.split(), f"--tasks={config.mixture_or_task_name}"]
    words.append(f"--output_cache_dir={folders[0] if folders else _DEFAULT_FOLDER}")
    words += [f"--module_import={module}" for module in config.modules]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    bound = ["text_files", "vocabulary", "extra_ids"]
    bound += (
        ["objective", "text_field", "validation_fraction"] if config.text_files is not None else []
    )
    defaults["task_feature_lengths"] = dataclasses.MISSING
    bound += ["task_feature_lengths"] if with_lengths else []
    for name in bound:
        value = getattr(config, name)
        if value != defaults[name]:
            value = dict(value) if isinstance(value, Mapping) else value
            words.append(f"--gin.DatasetConfig.{name}={value!r}")
    words += ["--overwrite"] if overwrite else []
    return " ".join(shlex.quote(word) for word in words)


def find(config: DatasetConfig, features: FeatureConverter) -> CachedMixture | None:
    """The caches of `python -m upcycle_jax.cache_tasks` that the configuration means; None without
    `use_cached`, and where SeqIO's own cache is meant.

    Args:
      config: what to read.
      features: the model's converter, whose task features the cache must have.

    Raises:
      FileNotFoundError: no cache; with the command that makes it.
      ValueError: a cache that is damaged, or of another vocabulary, objective or lengths; with the
        command that makes it again.
    """
    if not config.use_cached:
        return None
    folders, name = data_folders.current().cache_dirs, config.mixture_or_task_name
    again = f"`{command(config, overwrite=True)}`"
    folder = find_folder(folders, name, MANIFEST)
    if folder is not None:
        tasks: list[tuple[CachedTask, float]] = [(CachedTask.open(folder, remedy=again), 1.0)]
    else:
        folder = find_folder(folders, name, MIXTURE)
        if folder is None:
            if _seqio_has(config):
                return None
            where = (
                ", ".join(folders)
                if folders
                else "no folder: name it with --seqio_additional_cache_dirs"
            )
            raise FileNotFoundError(
                f"use_cached (USE_CACHED_TASKS) is set, but '{name}' is not cached (looked in"
                f" {where}). Prepare it with `{command(config)}` and start with"
                " --seqio_additional_cache_dirs of the same folder"
            )
        tasks = _mixture_tasks(folder, folders, config)
    for task, _ in tasks:
        _check(config, features, task)
    return CachedMixture(name, tuple(tasks))


def _mixture_tasks(
    folder: pathlib.Path, folders: tuple[str, ...], config: DatasetConfig
) -> list[tuple[CachedTask, float]]:
    again = f"`{command(config, overwrite=True)}`"
    try:
        rates = json.loads((folder / MIXTURE).read_text())["tasks"]
        rates = {str(name): float(rate) for name, rate in rates.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MIXTURE} cannot be read ({error}): {again}") from error
    tasks = []
    for name, rate in sorted(rates.items()):
        found = find_folder((str(folder.parent), *folders), name, MANIFEST)
        if found is None:
            raise FileNotFoundError(
                f"the task '{name}' of the mixture '{config.mixture_or_task_name}' is not cached"
                f" beside {folder}. Prepare it with `{command(config)}`"
            )
        tasks.append((CachedTask.open(found, remedy=again), rate))
    return tasks


def _seqio_has(config: DatasetConfig) -> bool:
    """Whether every task of the mixture is in a SeqIO cache. Asks the registry only where
    TensorFlow and SeqIO can be imported.
    """
    folders = data_folders.current().cache_dirs
    if find_folder(folders, config.mixture_or_task_name, SEQIO_COMPLETED) is not None:
        return True
    try:
        tensorflow_import.quietly()
        from upcycle_jax.data import resolve
    except ImportError:
        return False
    tasks = resolve.tasks(dataclasses.replace(config, use_cached=False))
    return all(task.cache_dir is not None for task in tasks)


def _check(config: DatasetConfig, features: FeatureConverter, task: CachedTask) -> None:
    """Raises a ValueError where the cache is not what the configuration describes."""
    manifest, problems = task.manifest, []
    asked = token_features(features, config.task_feature_lengths)
    missing = set(asked) - manifest.features.keys()
    if missing:
        problems.append(f"it has no feature {sorted(missing)} (only {sorted(manifest.features)})")
    else:
        what = f"the cached task '{manifest.task}' at {task.folder}"
        check_all_read(features, config.task_feature_lengths, manifest.features, what=what)
    if manifest.feature_lengths is not None and dict(manifest.feature_lengths) != dict(
        config.task_feature_lengths
    ):
        problems.append(
            f"its examples were made for lengths {dict(manifest.feature_lengths)}, but"
            f" task_feature_lengths is {dict(config.task_feature_lengths)}"
        )
    if config.vocabulary is not None or config.text_files is not None:
        problems += [
            problem
            for name, feature in manifest.features.items()
            for problem in _other_vocabulary(config, name, feature)
        ]
    if config.text_files is not None:
        made = manifest.text_files or {}
        for name in TEXT_SETTINGS:
            if made.get(name) != getattr(config, name):
                problems.append(f"{name} was {made.get(name)!r} and is {getattr(config, name)!r}")
    if problems:
        again = command(config, overwrite=True, with_lengths=manifest.feature_lengths is not None)
        raise ValueError(
            f"the cached task '{manifest.task}' at {task.folder} does not fit:"
            f" {'; '.join(problems)}. Cache it again: `{again}`"
        )


def _other_vocabulary(config: DatasetConfig, name: str, feature: Mapping[str, Any]) -> list[str]:
    cached = feature["vocabulary"]
    wanted = config.vocabulary or "bytes"
    was = cached.get("path") or cached["kind"]
    if not _same_vocabulary(wanted, cached):
        return [f"'{name}' was tokenised with {was}, VOCABULARY is {wanted!r}"]
    if cached["kind"] != _TOKENIZER and cached.get("extra_ids") != config.extra_ids:
        return [
            f"'{name}' has {cached.get('extra_ids')} extra ids, DatasetConfig.extra_ids is"
            f" {config.extra_ids}"
        ]
    return []


def _same_vocabulary(wanted: str, cached: Mapping[str, Any]) -> bool:
    """Whether VOCABULARY is the one of a cache, extra ids aside. Where its file is not on this
    machine, its name has to do.
    """
    if wanted == "bytes":
        return cached["kind"] == "ByteVocabulary"
    if cached["kind"] == _TOKENIZER and tokenizer.file_of(wanted).exists():
        return all(cached.get(key) == value for key, value in tokenizer.identity(wanted).items())
    path = pathlib.Path(wanted)
    if path.is_file():
        return cached.get("file_sha256") == sha256_of_file(path)
    return cached.get("path") == wanted
