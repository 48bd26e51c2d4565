"""From a `DatasetConfig` to the SeqIO task or mixture that it means: imports task modules,
registers text files, replaces vocabularies.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from upcycle_jax import data_folders
from upcycle_jax.data import shipped_tasks, sources, tensorflow_import
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.objectives import preprocessors
from upcycle_jax.data.text import files as text_files
from upcycle_jax.features.names import DOCUMENTS


def _import_task_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"MIXTURE_OR_TASK_MODULE names {name!r}, which is not importable ({error}): install"
                " it, or add its folder to PYTHONPATH"
            ) from error
        raise


def _known_names() -> list[str]:
    registered = (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
    return sorted({*registered, *shipped_tasks.names()})


def _registered(name: str) -> seqio.Task | seqio.Mixture | None:
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    return None


def _apply_settings() -> None:
    tensorflow_import.quietly()
    current = data_folders.current()
    if current.tfds_data_dir:
        seqio.set_tfds_data_dir_override(current.tfds_data_dir)
    if current.cache_dirs:
        known = seqio.get_global_cache_dirs()
        seqio.add_global_cache_dirs(
            [folder for folder in current.cache_dirs if folder not in known]
        )


def task_or_mixture(config: DatasetConfig) -> seqio.Task | seqio.Mixture:
    """The task or mixture that the configuration names.

    Raises:
      ValueError: the name is unknown, or the text files or the vocabulary are unusable.
      FileNotFoundError: a text file or vocabulary is not there.
    """
    _apply_settings()
    if config.use_cached and config.vocabulary is not None:
        raise ValueError(
            "vocabulary is set with use_cached, and the cache is SeqIO's: its examples are"
            " tokenised with the task's own vocabulary, so unset one of them (caches of `python -m"
            " upcycle_jax.cache_tasks` can have another one)"
        )
    for task_module in config.modules:
        _import_task_module(task_module)
    if config.text_files is not None:
        return _text_file_tasks(config, text_files.normalise(config.text_files))
    name = config.mixture_or_task_name
    provider = _registered(name)
    module = shipped_tasks.module_of(name)
    if provider is None and module is not None:
        _import_task_module(module)
        provider = _registered(name)
    if provider is None:
        near = difflib.get_close_matches(name, _known_names(), n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"known: {', '.join(_known_names())}"
        )
        raise ValueError(
            f"no SeqIO task or mixture is named {name!r}: {hint} Set MIXTURE_OR_TASK_MODULE to the"
            " module that registers it"
        )
    if config.vocabulary is None:
        return provider
    return _with_vocabulary(provider, config.vocabulary, config.extra_ids)


def _with_vocabulary(
    provider: seqio.Task | seqio.Mixture, vocabulary: str, extra_ids: int
) -> seqio.Task | seqio.Mixture:
    """The same tasks over another vocabulary, not registered: SeqIO's tokenizing steps read it from
    the task's features.
    """
    pieces = sources.vocabulary_from(vocabulary, extra_ids=extra_ids)

    def replaced(task):
        merged = {
            name: (
                feature
                if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
                else dataclasses.replace(
                    feature,
                    vocabulary=pieces,
                    add_eos=feature.add_eos and sources.ends(pieces, name),
                )
            )
            for name, feature in task.output_features.items()
        }
        if DOCUMENTS in merged:
            preprocessors.end_of_documents(merged)
        return task.replace(output_features=merged)

    if isinstance(provider, seqio.Task):
        return replaced(provider)
    return seqio.Mixture(
        provider.name, [(replaced(task), provider.get_rate(task)) for task in provider.tasks]
    )


_definitions: dict[str, Any] = {}  # what each task name over text files was defined from


def _text_file_tasks(
    config: DatasetConfig, domains: Mapping[str, Sequence[str]]
) -> seqio.Task | seqio.Mixture:
    """Registers one task per domain, and a mixture at equal rates where the domains have names.
    The same definition may be repeated.
    """
    name = config.mixture_or_task_name
    vocabulary = config.vocabulary or sources.BYTES
    files = {domain: text_files.find_files(patterns) for domain, patterns in domains.items()}
    definition = (
        files,
        config.objective,
        config.text_field,
        config.validation_fraction,
        vocabulary,
        config.extra_ids,
    )
    known = _registered(name)
    if known is not None:
        if _definitions.get(name) == definition:
            return known
        raise ValueError(
            f"the name {name!r} is taken by another SeqIO task or mixture: choose another"
            " MIXTURE_OR_TASK_NAME for your text_files"
        )
    pieces = sources.vocabulary_from(vocabulary, extra_ids=config.extra_ids)
    tasks = []
    for domain, paths in files.items():
        task_name = f"{name}_{domain}" if domain else name
        if _registered(task_name) is not None:
            raise ValueError(
                f"the name {task_name!r} is taken by another SeqIO task: rename the domain"
                f" {domain!r} or the mixture {name!r}"
            )
        load = functools.partial(
            text_files.load_corpus,
            domain or name,
            [str(path) for path in paths],
            field=config.text_field,
            validation_fraction=config.validation_fraction,
            whole_documents=sources.in_rows(config.objective),
        )
        source = sources.CorpusSource(load)
        _ = source.corpus  # bad files are found here, before anything is registered
        tasks.append(
            sources.language_model_task(task_name, source, pieces, objective=config.objective)
        )
    for task in tasks:
        seqio.TaskRegistry.add_provider(task.name, task)
    _definitions[name] = definition
    if [task.name for task in tasks] == [name]:
        return tasks[0]
    return seqio.MixtureRegistry.add(name, [(task.name, 1.0) for task in tasks])


def tasks(config: DatasetConfig) -> tuple[seqio.Task, ...]:
    """The tasks of the mixture, sorted by name."""
    return tuple(sorted(seqio.get_subtasks(task_or_mixture(config)), key=lambda task: task.name))


def splits(task: seqio.Task) -> tuple[str, ...]:
    """The splits of a task's data. TFDS knows them only of prepared data.

    Raises:
      ValueError: the data are not prepared.
    """
    if not isinstance(task.source, seqio.TfdsDataSource):
        return tuple(task.splits)
    try:
        return tuple(task.splits)
    except ValueError as error:
        dataset = task.source.tfds_dataset
        folder = data_folders.current().tfds_data_dir or "~/tensorflow_datasets"
        raise ValueError(
            f"the data of the task '{task.name}' (TFDS {dataset.name}) are not prepared in"
            f" {folder}: prepare them with `tfds build {dataset.name} --data_dir={folder}`, or name"
            " the folder that has them with --tfds_data_dir"
        ) from error


def tasks_with_split(config: DatasetConfig) -> tuple[seqio.Task, ...]:
    """Those of `tasks` that have the split.

    Raises:
      ValueError: none has.
    """
    known = tasks(config)
    having = tuple(task for task in known if config.split in splits(task))
    if not having:
        names = sorted({str(split) for task in known for split in splits(task)})
        raise ValueError(
            f"'{config.mixture_or_task_name}' has no split '{config.split}': it has {names}"
        )
    return having
