"""Prints how many examples a second the input gives, from a cache and on the fly, against those
that train steps consume on this machine.

    python scripts/bench_input.py                                   # tiny and small, as
    runs/pretrain.gin feeds them but for the batch python scripts/bench_input.py --sizes tiny
    --inputs 128 --targets 40 --batch_size 32

A step and its input share the processors of a CPU machine; on an accelerator's host the input has
them to itself. The cache is written to a temporary folder first.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import benchmarks

from upcycle_jax import config
from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.trainer import Trainer


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="embedded_text_span_corruption")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way to read")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lengths = {"inputs": args.inputs, "targets": args.targets}
    print(f"{benchmarks.hardware()}; {args.batch_size} rows of {args.inputs} + {args.targets}")
    given = inputs(args.task, lengths, args.batch_size, seconds=args.seconds)
    for name, examples in given.items():
        print(f"input {name:<12} {examples:>12,.1f} examples/s")
    trainer = Trainer(optimizer=Adafactor(), learning_rate_fn=create_learning_rate_scheduler())
    for size in args.sizes:
        names: tuple[tuple[str, list[str]], ...] = (
            (f"models/t5_1_1_{size}.gin", []),
            (
                f"models/t5_1_1_{size}_upcycled.gin",
                ["NUM_EXPERTS=8", f"GROUP_SIZE={args.group_size}"],
            ),
        )
        models = [
            config.load([name], ["DROPOUT_RATE=0.0", *bindings]).macro("MODEL")
            for name, bindings in names
        ]
        steps = benchmarks.train_steps(
            size,
            models,
            trainer,
            batch_size=args.batch_size,
            lengths=lengths,
            rounds=args.rounds,
        )
        for kind, measured in (("dense", steps.dense), ("upcycled", steps.upcycled)):
            needed = args.batch_size / measured.seconds
            ratios = ", ".join(
                f"{name} {examples / needed:,.0f} times that" for name, examples in given.items()
            )
            print(
                f"step {size} {kind:<9} {needed:>12,.1f} examples/s ({1 / measured.seconds:.2f}"
                f" steps/s): {ratios}"
            )


if __name__ == "__main__":
    main()
