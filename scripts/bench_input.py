"""Prints how many examples a second the input gives, from a cache and on the fly, against those
that train steps consume on this machine.

    # tiny and small, as runs/pretrain.gin feeds them but for the batch
    python scripts/bench_input.py
    python scripts/bench_input.py --sizes tiny --inputs 128 --targets 40 --batch_size 32
    python scripts/bench_input.py --images --batch_size 64   # tiny and s32, images, below

With --images: views of glyphs; and of photographs (noise of 256 x 256 pixels as JPEG files),
cropped at random and mirrored, against the steps of vision transformers. "folder" and "default
cache" are what a user gets who leaves IMAGE_SHORTER_SIDE as it is. Where that scales images, beside
them stand "folder on disk", the images of a large folder that find no room in memory; folder and
cache with None, which keeps files as they are; and caches of pixels with other shorter sides
(--shorter_sides). Before its first step a run decodes what it keeps of a folder: so does this
script. Inputs and steps take turns: ratios are medians over the rounds, each of what was
measured in one of them. Beside the rates stands the processor time that an image takes, all threads
together, which other jobs on the machine change little.

A step and its input share the processors of a CPU machine; on an accelerator's host the input has
them to itself. The cache is written to a temporary folder first.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import benchmarks
import jax
import numpy as np
from PIL import Image

from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.images import (
    ImageDataset,
    ImageDatasetConfig,
    decoding,
    records_writing,
    scaling,
)
from upcycle_jax.data.images.held import HeldImages
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.features.images import ImageFeatures

ASKED = 50
"""Times the examples of the fastest step that the input should give."""


def rate(batches: Iterator[Any], batch_size: int, *, seconds: float) -> float:
    """Examples a second over `seconds`, after the first batches have filled what reads ahead."""
    for _ in range(4):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - began)


def inputs(
    task: str, lengths: dict[str, int], batch_size: int, *, seconds: float
) -> dict[str, float]:
    """Examples a second of each way to read the task."""
    from upcycle_jax.data.cache.writer import CacheOptions, write_caches

    on_the_fly = DatasetConfig(task, lengths, batch_size=batch_size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        written = write_caches(
            on_the_fly,
            CacheOptions(output_cache_dir=pathlib.Path(folder), report=lambda line: None),
        )
        records = sum(
            split.records for cache in written for split in cache.manifest.splits.values()
        )
        print(
            f"caching: {records / (time.perf_counter() - began):,.0f} documents/s, {records:,}"
            " documents"
        )
        configure(cache_dirs=[folder])
        cached = DatasetConfig(task, lengths, batch_size=batch_size, seed=0, use_cached=True)
        return {
            name: rate(
                open_dataset(config, EncoderDecoderFeatures()).train_iterator(),
                batch_size,
                seconds=seconds,
            )
            for name, config in (("cached", cached), ("on the fly", on_the_fly))
        }


@contextlib.contextmanager
def image_inputs(
    side: int, batch_size: int, *, files: int, shorter_sides: Sequence[int]
) -> Iterator[dict[str, Iterator[Any]]]:
    """The ways to read images: endless batches by name."""
    features = ImageFeatures(side)
    given: dict[str, Any] = {
        "task_feature_lengths": {"image": side},
        "batch_size": batch_size,
        "seed": 0,
    }
    augmented = {**given, "crop": "inception", "flip": True}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        for number in range(files):
            path = root / "photographs" / "train" / str(number % 10) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(path)
        folder = ImageDatasetConfig(
            "noise", folder=str(root / "photographs"), shorter_side="auto", **augmented
        )
        chosen = scaling.shorter_side(folder)
        off = dataclasses.replace(folder, shorter_side=None)
        configs = {"glyphs": ImageDatasetConfig(**given), "folder": folder}
        cached = {"default cache": folder}
        if chosen is not None:
            configs["folder None"] = cached["cached None"] = off
        for pixels in shorter_sides:
            if pixels >= side and pixels != chosen:
                cached[f"cached {pixels}"] = dataclasses.replace(folder, shorter_side=pixels)
        streams = {
            name: open_dataset(config, features).train_iterator()
            for name, config in configs.items()
        }
        if chosen is not None:
            on_disk = ImageDataset(folder, features, HeldImages(most_bytes=0))
            streams["folder on disk"] = on_disk.train_iterator()
            for name in ("folder", "folder on disk"):
                streams[name].prepare(0, files)
        for name, source in cached.items():
            cache = root / name.replace(" ", "_")
            records_writing.write(source, cache, report=lambda line: None)
            configure(cache_dirs=[str(cache)])
            config = dataclasses.replace(source, folder=None, use_cached=True)
            streams[name] = open_dataset(config, features).train_iterator()
        yield dict(streams)


class Turn(NamedTuple):
    """One turn of something that is repeated: a second's executions, and the processor's seconds of
    each.
    """

    rate: float
    processor: float


def in_turns(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: int
) -> dict[str, list[Turn]]:
    """Repeats each call for its share of `seconds` in every round. The one before has filled what
    it reads ahead by then, and what was made ahead before a turn is taken out first.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait_until_idle()
            for _ in range(4):
                call()
            count, began, processor = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - began < seconds / rounds:
                call()
                count += 1
            processor = time.process_time() - processor
            turns[name].append(Turn(count / (time.perf_counter() - began), processor / count))
    return turns


def _wait_until_idle(most: float = 10.0) -> None:
    """Waits until no thread of this process works, for so many seconds at most."""
    began = time.perf_counter()
    while time.perf_counter() - began < most:
        worked, asleep = time.process_time(), time.perf_counter()
        time.sleep(0.05)
        if time.process_time() - worked < 0.02 * (time.perf_counter() - asleep):
            return


def decoding_rate(side: int, *, seconds: float) -> float:
    """Photographs a second that one thread decodes to at least `side` pixels: what limits the ways
    to read that start from files.
    """
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    held = io.BytesIO()
    coarse.resize((256, 256), Image.Resampling.BICUBIC).save(held, "JPEG")
    encoded = held.getvalue()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        decoding.decode(encoded, what="noise", channels=3, at_least=side)
        count += 1
    return count / (time.perf_counter() - began)


def bench_images(args: argparse.Namespace) -> None:
    """Input and steps of vision transformers."""
    for size in args.sizes:
        models, lengths = benchmarks.model_pair(
            f"vit_{size}",
            num_experts=8,
            group_size=args.group_size,
            inputs=0,
            targets=0,
            dtype="float32",
        )
        side = lengths["image"]
        steps = benchmarks.step_programs(
            models,
            benchmarks.shipped_trainer(f"vit_{size}"),
            batch_size=args.batch_size,
            lengths=lengths,
        )
        with image_inputs(
            side, args.batch_size, files=args.files, shorter_sides=args.shorter_sides
        ) as streams:
            calls: dict[str, Callable[[], Any]] = {
                **{name: functools.partial(next, stream) for name, stream in streams.items()},
                **{kind: _waited(step) for kind, step in steps.items()},
            }
            turns = in_turns(calls, seconds=args.seconds, rounds=args.rounds)
        print(f"{size}, {side} x {side} pixels")
        for name, each in turns.items():
            images = args.batch_size * statistics.median(turn.rate for turn in each)
            processor = statistics.median(turn.processor for turn in each) / args.batch_size
            what = "step" if name in steps else "input"
            print(f"{what:<5} {name:<14} {images:>12,.1f} images/s, {processor * 1e6:>10,.1f} us")
        decoded = decoding_rate(side, seconds=args.seconds)
        print(f"of this decoding alone {decoded:>6,.1f} images/s of 256 x 256 pixels, one thread")
        for kind in steps:
            pairs = {name: list(zip(turns[name], turns[kind], strict=True)) for name in streams}
            ratios = {
                name: statistics.median(one.rate / step.rate for one, step in each)
                for name, each in pairs.items()
            }
            listed = ", ".join(f"{name} {ratio:.3g} times" for name, ratio in ratios.items())
            print(f"step {size} {kind:<9} is fed {listed}")
            shares = {
                name: statistics.median(one.processor / step.processor for one, step in each)
                for name, each in pairs.items()
            }
            listed = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
            print(f"     processor time of an input over that of its step: {listed}")
            slow = [name for name, ratio in ratios.items() if ratio < 1]
            if slow:
                print(f"     is limited by: {', '.join(slow)}")


def _waited(step: benchmarks.Program) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(step.call())


def _compared(size: str, steps: Any, batch_size: int, given: dict[str, float]) -> None:
    for kind, measured in (("dense", steps.dense), ("upcycled", steps.upcycled)):
        needed = batch_size / measured.seconds
        ratios = ", ".join(
            f"{name} {examples / needed:,.3g} times that" for name, examples in given.items()
        )
        print(
            f"step {size} {kind:<9} {needed:>12,.1f} examples/s ({1 / measured.seconds:.2f}"
            f" steps/s): {ratios}"
        )
        slow = [name for name, examples in given.items() if examples < ASKED * needed]
        if slow:
            print(f"     below {ASKED} times that: {', '.join(slow)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="embedded_text_span_corruption")
    parser.add_argument("--sizes", nargs="+", help="tiny and small, or tiny and s32 of images")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=512)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each way to read, and step of images"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", action="store_true", help="of vision transformers")
    parser.add_argument("--files", type=int, default=256, help="photographs, with --images")
    parser.add_argument(
        "--shorter_sides",
        type=int,
        nargs="+",
        default=[256, 128],
        help="of photographs cached as pixels, with --images; those below the model's are left out",
    )
    args = parser.parse_args()
    args.sizes = args.sizes or ["tiny", "s32" if args.images else "small"]
    if args.images:
        print(f"{benchmarks.hardware()}; batches of {args.batch_size} images")
        bench_images(args)
        return
    lengths = {"inputs": args.inputs, "targets": args.targets}
    print(f"{benchmarks.hardware()}; {args.batch_size} rows of {args.inputs} + {args.targets}")
    given = inputs(args.task, lengths, args.batch_size, seconds=args.seconds)
    for name, examples in given.items():
        print(f"input {name:<12} {examples:>12,.1f} examples/s")
    for size in args.sizes:
        models, lengths = benchmarks.model_pair(
            size,
            num_experts=8,
            group_size=args.group_size,
            inputs=args.inputs,
            targets=args.targets,
            dtype="float32",
        )
        steps = benchmarks.train_steps(
            size,
            models,
            benchmarks.shipped_trainer(size),
            batch_size=args.batch_size,
            lengths=lengths,
            rounds=args.rounds,
        )
        _compared(size, steps, args.batch_size, given)


if __name__ == "__main__":
    main()
