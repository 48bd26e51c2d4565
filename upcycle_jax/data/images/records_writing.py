"""Writes images as ArrayRecord files, or their pixels (`records` has the layout): of a folder
without TensorFlow, or of a SeqIO task. A killed run continues after the last whole file.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
from array_record.python import array_record_module

from upcycle_jax import leases
from upcycle_jax.data.cache import format as cache_format
from upcycle_jax.data.cache.format import FileEntry
from upcycle_jax.data.images import decoding, folders, mixtures, records, scaling
from upcycle_jax.data.images.config import AUTOMATIC, ImageDatasetConfig
from upcycle_jax.data.images.records import ImageManifest, ImageSplit
from upcycle_jax.features.images import IMAGE, LABEL
from upcycle_jax.progress import Meter
from upcycle_jax.text import size

_PART = 10_000
_OPTIONS = "group_size:1,uncompressed"
"""Groups of one record, which are read in random order; files are compressed already."""
_PLAN = "plan.json"

Report = Callable[[str], None]

_Example = tuple[bytes, int, str]
"""A file, its label, and what it is called."""


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where images come from.

    Attributes:
      identity: what tells them from others.
      num_classes: labels are below it.
      classes: their names, if any.
      counts: images of each split.
      examples: of a split from a place on.
    """

    identity: dict[str, Any]
    num_classes: int
    classes: Sequence[str] | None
    counts: dict[str, int]
    examples: Callable[[str, int], Iterator[_Example]]


def write_sets(
    config: ImageDatasetConfig,
    output_cache_dir: str | os.PathLike,
    *,
    report: Report = print,
    **options: Any,
) -> None:
    """Caches the images that a configuration names: of a mixture each set by its name, but for
    those that lie in memory anyway; of a registered mixture its rates too.

    Args:
      config: see `write`.
      output_cache_dir: the folder of all caches.
      report: takes lines of progress.
      **options: the others of `write`.

    Raises:
      FileNotFoundError: see `write`.
      ValueError: see `write`; or no set of a mixture can be cached.
    """
    found = mixtures.parts(dataclasses.replace(config, use_cached=False))
    if found is None:
        write(config, output_cache_dir, report=report, **options)
        return
    for name, part in found.items():
        if part.config.arrays is None and mixtures.can_be_cached(name, part.config.folder):
            write(part.config, output_cache_dir, report=report, **options)
        else:
            report(f"{name}: read as it is, with a cache of the others too")
    if config.mixture is None and not options.get("dry_run"):
        name = config.mixture_or_task_name
        folder = pathlib.Path(os.path.expanduser(output_cache_dir)) / cache_format.folder_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        rates = {task: part.rate for task, part in found.items()}
        cache_format.write_json(folder / cache_format.MIXTURE, {"mixture": name, "tasks": rates})
        report(f"{name}: a mixture of {len(rates)} cached tasks")


def write(
    config: ImageDatasetConfig,
    output_cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    num_shards: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    report: Report = print,
) -> None:
    """Caches the images that a configuration names, every one decoded once to see that it is one.
    A finished cache of the same images is left as it is.

    Args:
      config: with a folder, or the name of a SeqIO task; its split is not looked at. With a
        `shorter_side` scaled pixels are cached, else the files.
      output_cache_dir: the folder of all caches.
      splits: splits to cache, or None for all.
      num_shards: files of each split, or None for one in 10,000 images.
      overwrite: replace a cache, or an unfinished one, of something else.
      verify: compare the sha256 of every file of a cache that is there already.
      dry_run: only report what would be written.
      report: takes lines of progress.

    Raises:
      FileNotFoundError: there are no images.
      ValueError: an image is damaged, a split is missing, the folder holds something else, cannot
        be written, or another call is writing the same cache.
    """
    if "://" in os.fspath(output_cache_dir):
        raise ValueError(
            f"output_cache_dir is {os.fspath(output_cache_dir)!r}: ArrayRecord files are written to"
            " local or mounted folders only"
        )
    origin = _folder(config, splits) if config.folder is not None else _task(config, splits)
    parts = {
        split: max(1, min(num_shards or -(-count // _PART), count))
        for split, count in origin.counts.items()
    }
    name, side = config.mixture_or_task_name, scaling.shorter_side(config)
    if config.shorter_side == AUTOMATIC:
        report(_what_auto_is(config, side))
    if dry_run:
        for split, count in origin.counts.items():
            report(f"{name}: {count:,} images of the split {split} in {parts[split]} files")
        return
    folder = pathlib.Path(os.path.expanduser(output_cache_dir)) / cache_format.folder_name(name)
    plan = json.loads(json.dumps({"task": name, "identity": origin.identity, "parts": parts}))
    if side is not None:
        plan["shorter_side"] = side
    with leases.hold(
        folder.with_name(f".{folder.name}.lease.json"),
        what=f"the cache of {name!r} in {output_cache_dir}",
        remedy="choose another --output_cache_dir",
    ):
        if _is_there(folder, plan, overwrite=overwrite, verify=verify):
            report(f"{name}: cached already at {folder}")
            return
        try:
            _write(folder, origin, plan, overwrite=overwrite, report=report)
        except (OSError, RuntimeError) as error:  # RuntimeError: of the ArrayRecord writer
            raise ValueError(
                f"the cache of {name!r} cannot be written below {output_cache_dir} ({error}): free"
                " space or choose another --output_cache_dir; the same command goes on after the"
                " last whole file"
            ) from error


def _what_auto_is(config: ImageDatasetConfig, side: int | None) -> str:
    name = config.mixture_or_task_name
    if side is not None:
        return f"{name}: cached as pixels, scaled to a shorter side of {side} where it is longer"
    if IMAGE in config.task_feature_lengths:
        return f"{name}: cached as files, which are decoded when they are read"
    return (
        f"{name}: cached as files. For a model of small images set --gin.IMAGE_SIZE, or give its"
        " gin file first: pixels are then cached, which are read several times as fast"
    )


def _folder(config: ImageDatasetConfig, splits: Sequence[str] | None) -> _Origin:
    root = pathlib.Path(os.path.expanduser(str(config.folder)))
    wanted = splits
    if wanted is None:
        wanted = folders.splits(root) if root.is_dir() else [config.split]
    found = {
        split: folders.open_folder(dataclasses.replace(config, split=split)) for split in wanted
    }
    if not found:
        raise ValueError(f"{root} is empty: IMAGE_FOLDER holds <split>/<class>/<image>")

    def examples(split: str, first: int) -> Iterator[_Example]:
        source = found[split]
        for place in range(first, len(source.labels)):
            yield source.encoded(place), int(source.labels[place]), source.name(place)

    one = next(iter(found.values()))
    return _Origin(
        {split: source.identity for split, source in found.items()},
        max(source.num_classes for source in found.values()),
        one.classes,
        {split: len(source.labels) for split, source in found.items()},
        examples,
    )


def _task(config: ImageDatasetConfig, splits: Sequence[str] | None) -> _Origin:
    from upcycle_jax.data import fingerprints, resolve
    from upcycle_jax.data.images import seqio_images

    plain = dataclasses.replace(config, use_cached=False)
    provider: Any = resolve.task_or_mixture(plain)
    wanted = list(splits or sorted(map(str, resolve.splits(provider))))
    for split in wanted:
        task = seqio_images.find(dataclasses.replace(plain, split=split))
    counts = {}
    for split in wanted:
        count = task.num_input_examples(split)
        counts[split] = (
            count if count is not None else sum(1 for _ in seqio_images.examples(task, split))
        )

    def examples(split: str, first: int) -> Iterator[_Example]:
        for place, (file, label) in enumerate(seqio_images.examples(task, split)):
            if place >= first:
                seqio_images.check_labels(task, [label])
                yield file, label, f"{place} of {task.name}"

    identity = {
        "source": fingerprints.source(task.source),
        "steps": fingerprints.preprocessors(task),
    }
    return _Origin(identity, seqio_images.num_classes(task), None, counts, examples)


def _is_there(folder: pathlib.Path, plan: dict[str, Any], *, overwrite: bool, verify: bool) -> bool:
    """Whether a finished cache of the same images is there."""
    if not folder.exists() or overwrite:
        return False
    if not (folder / records.MANIFEST).exists():
        raise ValueError(
            f"{folder} is there and is no cache of images: choose another --output_cache_dir"
        )
    remedy = "start again with --overwrite"
    manifest = ImageManifest.read(folder, remedy=remedy)
    if manifest.identity != plan:
        raise ValueError(
            f"{folder} holds a cache of other images of that name, of other splits or of another"
            " IMAGE_SHORTER_SIDE: choose another --output_cache_dir, or replace it with --overwrite"
        )
    for split in manifest.splits if verify else ():
        records.open_split(folder, manifest, split, remedy=remedy).verify()
    return True


def _write(
    folder: pathlib.Path, origin: _Origin, plan: dict[str, Any], *, overwrite: bool, report: Report
) -> None:
    work = folder.with_name(folder.name + cache_format.UNFINISHED)
    note = work / _PLAN
    same = note.exists() and json.loads(note.read_text(encoding="utf-8")) == plan
    if work.exists() and not same:
        if note.exists() and not overwrite:
            raise ValueError(
                f"{work} is an unfinished cache of other images: choose another"
                " --output_cache_dir, or replace it with --overwrite"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    cache_format.write_json(note, plan)
    splits = {}
    side = plan.get("shorter_side")
    for split, count in plan["parts"].items():
        splits[split] = _split(work, origin, split, count, side, report)
    kind = records.FILES if side is None else records.PIXELS
    ImageManifest(plan["task"], plan, origin.num_classes, origin.classes, splits, kind, side).write(
        work
    )
    kept = {entry.name for one in splits.values() for entry in one.entries}
    for path in work.iterdir():
        if path.name not in kept | {records.MANIFEST}:
            path.unlink()
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # what a call that was killed here has left
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(work, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    for split, one in splits.items():
        written = sum(entry.bytes for entry in one.files)
        report(f"{plan['task']}, {split}: {one.count:,} images, {size(written)}")


def _split(
    work: pathlib.Path,
    origin: _Origin,
    split: str,
    parts: int,
    shorter_side: int | None,
    report: Report,
) -> ImageSplit:
    """Writes the files of a split that are not whole yet, and its labels."""
    total = origin.counts[split]
    bounds = [total * part // parts for part in range(parts + 1)]
    stems = [f"{split}-{part:05}-of-{parts:05}" for part in range(parts)]
    lacking = [part for part in range(parts) if not (work / f"{stems[part]}.json").exists()]
    meter = Meter(total, report, unit="images", done=bounds[lacking[0]] if lacking else total)
    kind = "array_record" if shorter_side is None else "pixels"
    if lacking:
        examples = origin.examples(split, bounds[lacking[0]])
        found = (_record(*example, shorter_side=shorter_side) for example in examples)
        for part in range(lacking[0], parts):
            written = _part(work, stems[part], kind, found, bounds[part], bounds[part + 1], meter)
            labels = [record.label for record in written]
            np.save(work / f"{stems[part]}.labels.npy", np.asarray(labels, np.int32))
            if shorter_side is not None:
                shapes = [record.shape for record in written]
                np.save(work / f"{stems[part]}.shapes.npy", np.asarray(shapes, np.int32))
            entry = _entry(work / f"{stems[part]}.{kind}", len(labels))
            cache_format.write_json(work / f"{stems[part]}.json", dataclasses.asdict(entry))
    meter.finish()
    files = [
        FileEntry(**json.loads((work / f"{stem}.json").read_text(encoding="utf-8")))
        for stem in stems
    ]
    shapes_entry = None if shorter_side is None else _together(work, split, stems, "shapes")
    return ImageSplit(tuple(files), _together(work, split, stems, "labels"), shapes_entry)


def _together(work: pathlib.Path, split: str, stems: Sequence[str], what: str) -> FileEntry:
    """Writes the array of a split from those of its files."""
    path = work / f"{split}.{what}.npy"
    np.save(path, np.concatenate([np.load(work / f"{stem}.{what}.npy") for stem in stems]))
    return _entry(path, 0)


def _entry(path: pathlib.Path, count: int) -> FileEntry:
    return FileEntry(path.name, count, path.stat().st_size, cache_format.sha256_of_file(path))


class _Record(NamedTuple):
    """What is written of an image.

    Attributes:
      content: a record, or pixels.
      label: the image's.
      shape: of pixels.
    """

    content: bytes
    label: int
    shape: tuple[int, ...] = ()


def _record(file: bytes, label: int, name: str, *, shorter_side: int | None) -> _Record:
    """What is written of an image, which is decoded in any case.

    Raises:
      ValueError: it is damaged.
    """
    if shorter_side is None:
        decoding.decode(file, what=name, channels=3, at_least=1)
        return _Record(msgpack.packb({IMAGE: file, LABEL: label}), label)
    decoded = decoding.decode(file, what=name, channels=None, at_least=shorter_side)
    pixels = np.atleast_3d(decoding.shrunk(decoded, shorter_side))  # [H, W, c]
    return _Record(pixels.tobytes(), label, pixels.shape)


def _part(
    work: pathlib.Path,
    stem: str,
    kind: str,
    found: Iterator[_Record],
    first: int,
    last: int,
    meter: Meter,
) -> list[_Record]:
    """Writes one file; returns its records without their content."""
    temporary = work / f"{stem}.writing"
    temporary.unlink(missing_ok=True)
    writer: Any = (
        array_record_module.ArrayRecordWriter(os.fspath(temporary), _OPTIONS)
        if kind == "array_record"
        else temporary.open("wb")
    )
    written = []
    try:
        for place in range(first, last):
            one = next(found, None)
            if one is None:
                raise ValueError(f"the split ends after {place} images, {last} were counted")
            writer.write(one.content)
            written.append(one._replace(content=b""))
            meter.reach(place + 1, stem)
    finally:
        writer.close()
    os.replace(temporary, work / f"{stem}.{kind}")
    return written
