"""Writes the tokenised examples of tasks as ArrayRecord files, which training reads without
TensorFlow, shuffled as a whole.

Examples:

    python -m upcycle_jax.cache_tasks --tasks=embedded_text_span_corruption --output_cache_dir=cache
    python -m upcycle_jax.cache_tasks --gin_file=runs/pretrain.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'my_text'" --gin.TEXT_FILES="{'c4': ['/data/c4/*.jsonl.gz']}" \\
        --gin.VOCABULARY="'/data/spiece.model'" --output_cache_dir=/data/cache

    python -m upcycle_jax.cache_tasks --gin_file=runs/cache_images.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'birds'" --gin.IMAGE_FOLDER="'/data/birds'" \\
        --output_cache_dir=/data/cache

Then train with --gin.USE_CACHED_TASKS=True --seqio_additional_cache_dirs=<output_cache_dir>. Noise
(span corruption and its kin) is not cached: it is drawn anew each time a segment is read. Killed
and started again, the command goes on after the last whole file; a finished cache is left alone.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upcycle_jax import checks
from upcycle_jax.config import command, registry
from upcycle_jax.config.flags import Flags
from upcycle_jax.features.images import IMAGE

if TYPE_CHECKING:
    from upcycle_jax.config import Config

_LENGTHS = "task_feature_lengths"
_IMAGE_SIZE = "IMAGE_SIZE"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("cache")
    own.add_argument(
        "--output_cache_dir", required=True, metavar="DIR", help="folder of all caches"
    )
    own.add_argument(
        "--tasks",
        type=_names,
        default=[],
        metavar="NAME,NAME",
        help="tasks and mixtures (default: MIXTURE_OR_TASK_NAME)",
    )
    own.add_argument(
        "--splits",
        type=_names,
        default=None,
        metavar="NAME,NAME",
        help="splits to cache (default: all of a task)",
    )
    own.add_argument(
        "--module_import",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module that registers tasks",
    )
    own.add_argument(
        "--num_shards",
        type=int,
        metavar="N",
        help="files of a split (default: by its size, or as many as its source has)",
    )
    own.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of random steps before the place for caching (default 0)",
    )
    own.add_argument(
        "--overwrite", action="store_true", help="replace a cache, whatever it was made from"
    )
    own.add_argument(
        "--verify",
        action="store_true",
        help="read every file of a cache that is there already, and compare its sha256",
    )


def _run(flags: Flags, loaded: "Config") -> int:
    asked = flags.extra
    if asked.num_shards is not None and asked.num_shards < 1:
        raise ValueError(f"--num_shards is {asked.num_shards}: give at least 1")
    if loaded.bindings.effective("ImageDatasetConfig", ()):
        return _cache_images(flags, loaded)
    bound = loaded.bindings.effective("DatasetConfig", ())
    given: dict[str, Any] = {"use_cached": False}
    if asked.module_import:
        given["module"] = tuple(asked.module_import)
    if _LENGTHS not in bound:
        given[_LENGTHS] = {}  # not looked at
    if not asked.tasks and "mixture_or_task_name" not in bound:
        raise ValueError("no task is named: give --tasks, or a gin file with MIXTURE_OR_TASK_NAME")
    chosen = [{"mixture_or_task_name": name} for name in asked.tasks] or [{}]
    configs = [loaded.build("DatasetConfig", **given, **name)() for name in chosen]
    command.say_unused(loaded, name="cache_tasks", other_functions=registry.FUNCTIONS)
    from upcycle_jax.data import tensorflow_import

    tensorflow_import.quietly()
    from upcycle_jax.data.cache import writer

    options = writer.CacheOptions(
        output_cache_dir=asked.output_cache_dir,
        splits=asked.splits,
        num_shards=asked.num_shards,
        seed=asked.seed,
        sequence_length=configs[0].task_feature_lengths if _LENGTHS in bound else None,
        overwrite=asked.overwrite,
        verify=asked.verify,
    )
    for config in configs:
        writer.write_caches(config, options, dry_run=flags.dry_run)
    print(_train_with(asked.output_cache_dir))
    return 0


def _cache_images(flags: Flags, loaded: "Config") -> int:
    asked = flags.extra
    given: dict[str, Any] = {"use_cached": False}
    if asked.module_import:
        given["module"] = tuple(asked.module_import)
    if _LENGTHS not in loaded.bindings.effective("ImageDatasetConfig", ()):
        given[_LENGTHS] = _image_lengths(loaded)
    chosen = [{"mixture_or_task_name": name} for name in asked.tasks] or [{}]
    configs = [loaded.build("ImageDatasetConfig", **given, **name)() for name in chosen]
    command.say_unused(loaded, name="cache_tasks", other_functions=registry.FUNCTIONS)
    from upcycle_jax.data.images import records_writing

    for config in configs:
        records_writing.write_sets(
            config,
            asked.output_cache_dir,
            splits=asked.splits,
            num_shards=asked.num_shards,
            overwrite=asked.overwrite,
            verify=asked.verify,
            dry_run=flags.dry_run,
        )
    print(_train_with(asked.output_cache_dir))
    return 0


def _image_lengths(loaded: "Config") -> dict[str, int]:
    """The side of the images of the model that is to read the cache, where it is known."""
    has = loaded.has_macro(_IMAGE_SIZE)
    size = loaded.macro(_IMAGE_SIZE, checks.Size | None) if has else None
    return {} if size is None else {IMAGE: size}


def _train_with(folder: str) -> str:
    return f"train with --gin.USE_CACHED_TASKS=True --seqio_additional_cache_dirs={folder}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("cache_tasks", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())
