"""Prints what one accelerator reaches, as one table, and writes it as JSON (see device_check.sh).

    python scripts/device_check.py --out=device_check
    python scripts/device_check.py --out=device_check --parts layers steps --minutes=4

Times are medians of executions in turns in one process; ratios those of neighbouring executions.
Rows for which no time is left, or that fail (memory may be short), are named below the table.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import benchmarks
import jax
import jax.numpy as jnp
import numpy as np
from bench_moe import SIZES
from benchmarks import LayerShape, Program

from upcycle_jax import files, train, upcycle
from upcycle_jax.costs import hardware
from upcycle_jax.models.base import Model
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe import grouped_experts, grouped_matmul
from upcycle_jax.types import PyTree

LAYER_TARGET, MFU_TARGET = 1.10, 0.45
"""A layer's time over that of the FLOP-equal dense MLP at most; utilisation of a step at least."""

_TRITON = "jax_ragged_dot_use_gpu_pallas_triton_lowering"
"""The setting of jax under which `ragged_dot` is one grouped product on NVIDIA GPUs."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      part: 'layers', 'products', 'steps', 'decoding' or 'study'.
      what: was measured.
      milliseconds: of one execution, or of one training step.
      ratio: its time over that of the baseline (dense), None without one.
      share: model FLOP/s over the accelerator's peak (MFU), or on machines that the table of
        accelerators does not have over those of one large matrix product; None where not counted.
      tokens_per_second: or images.
      target: what is to be reached, or empty.
      reached: whether it is.
    """

    part: str
    what: str
    milliseconds: float
    ratio: float | None = None
    share: float | None = None
    tokens_per_second: float | None = None
    target: str = ""
    reached: bool | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What makes some rows.

    Attributes:
      part: of its rows.
      what: it measures.
      seconds: that it needs at most on an accelerator, compilation included; a guess.
      run: measures.
    """

    part: str
    what: str
    seconds: float
    run: Callable[[], list[Row]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      layers: name, shape, whether the backward pass is measured, whether one-hot dispatch is.
      steps: model, rows of a batch, GROUP_SIZE, and bindings.
      inputs: tokens of a row's first stack.
      targets: tokens of a row's second stack.
      dtype: of layers and steps.
      decoder: the model that decodes.
      rows: prompts.
      prompt: tokens of a prompt.
      new: tokens that are decoded of each.
      study_steps: steps of each run of a study's cell.
      rounds: executions of each program.
    """

    layers: Sequence[tuple[str, LayerShape, bool, bool]]
    steps: Sequence[tuple[str, int, int, tuple[str, ...]]]
    inputs: int = 512
    targets: int = 128
    dtype: str = "bfloat16"
    decoder: str = "smollm2_135m"
    rows: int = 64
    prompt: int = 128
    new: int = 128
    study_steps: int = 300
    rounds: int = 9


def _shape(size: str, num_experts: int) -> LayerShape:
    d, ff = SIZES[size]
    return LayerShape(d=d, ff=ff, num_experts=num_experts, groups=8, dtype="bfloat16")


_LOOP = ("SCAN_LAYERS=True",)
"""Loops over layers compile in a fraction of the time, which is short."""
_SMOKE = LayerShape(d=16, ff=32, num_experts=4, tokens=32, groups=2)

DEVICE = Sizes(
    layers=(
        ("base, E 32", _shape("base", 32), True, True),
        ("large, E 32", _shape("large", 32), True, False),
        ("base, E 32", _shape("base", 32), False, False),
        ("large, E 32", _shape("large", 32), False, False),
        ("base, E 8", _shape("base", 8), True, False),
    ),
    steps=(
        ("base", 64, 4096, _LOOP),
        ("smollm2_135m", 64, 4096, _LOOP),
        ("vit_b16", 256, 4096, _LOOP),
    ),
)
SMOKE = Sizes(
    layers=(("smoke", _SMOKE, True, True),),
    steps=(("tiny", 2, 32, _LOOP), ("tiny_lm", 2, 32, ()), ("vit_tiny", 4, 64, ())),
    inputs=16,
    targets=16,
    dtype="float32",
    decoder="tiny_lm",
    rows=2,
    prompt=4,
    new=3,
    study_steps=3,
    rounds=1,
)


def dropless_forms() -> list[grouped_experts.Dispatch]:
    """The forms of dropless layers that are no masked products here."""
    masked = grouped_matmul.ragged_dot_is_masked(jax.default_backend())
    return ["sorted"] if masked else ["sorted", "ragged_dot"]


def layer_rows(
    name: str, shape: LayerShape, *, backward: bool, one_hot: bool, rounds: int
) -> list[Row]:
    """An MoE layer in every form of dispatch."""
    measured = benchmarks.layer(
        shape, backward=backward, one_hot=one_hot, dropless=dropless_forms(), rounds=rounds
    )
    what = f"{name}, {'forward + backward' if backward else 'forward'}"
    rows = []
    for m in measured:
        row = Row("layers", f"{what}: {m.name}", m.seconds * 1e3, m.ratio)
        row = dataclasses.replace(row, tokens_per_second=m.tokens_per_second)
        judged = m.name.startswith(("experts choose", "tokens choose", "dropless"))
        if judged and "one-hot" not in m.name:
            row = _judged(row, m.ratio <= LAYER_TARGET, f"<= {LAYER_TARGET:.2f}x")
        rows.append(row)
    return rows


def _judged(row: Row, reached: bool, target: str) -> Row:
    return dataclasses.replace(row, target=target, reached=reached)


def product_rows(name: str, shape: LayerShape, *, rounds: int) -> list[Row]:
    """Rows that are sorted by expert times that expert's matrix, forward, against one dense product
    of as many rows: the core of dropless layers, also by tokamax where it is installed.
    """
    rows = shape.groups * shape.tokens * shape.capacity_factor
    dtype = jnp.dtype(shape.dtype)
    x = jax.random.normal(jax.random.key(0), (rows, shape.d), dtype)
    kernels = jax.random.normal(jax.random.key(1), (shape.num_experts, shape.d, shape.ff), dtype)
    sizes = jnp.full(shape.num_experts, rows // shape.num_experts, jnp.int32)
    forms: dict[str, Callable[..., jax.Array]] = {"sorted": grouped_matmul.block_dot}
    if "ragged_dot" in dropless_forms():
        forms["ragged_dot"] = grouped_matmul.ragged_dot
    if importlib.util.find_spec("tokamax") is not None:
        forms["tokamax.ragged_dot"] = importlib.import_module("tokamax").ragged_dot
    programs: dict[str, Program] = {
        "dense product": benchmarks.as_program(
            lambda x, kernels, _: x @ kernels[0], x, kernels, sizes
        )
    }
    for form, product in forms.items():
        programs[form] = benchmarks.as_program(product, x, kernels, sizes)
    measured = benchmarks.compare(programs, baseline="dense product", tokens=rows, rounds=rounds)
    return [
        Row(
            "products",
            f"{name}: {m.name}",
            m.seconds * 1e3,
            ratio=m.ratio,
            share=_share(2 * rows * shape.d * shape.ff / m.seconds, shape.dtype),
            tokens_per_second=m.tokens_per_second,
        )
        for m in measured
    ]


def _share(flops_per_second: float, dtype: str) -> float:
    """See `Row.share`."""
    chip = hardware.of_device(jax.devices()[0])
    peak = benchmarks.matmul_peak(dtype) if chip is None else chip.device_peak_flops
    return flops_per_second / peak


def step_models(
    name: str, group_size: int, bindings: Sequence[str], sizes: Sizes
) -> tuple[list[Model], dict[str, int]]:
    """See `benchmarks.model_pair`."""
    return benchmarks.model_pair(
        name,
        num_experts=8,
        group_size=group_size,
        inputs=sizes.inputs,
        targets=sizes.targets,
        dtype=sizes.dtype,
        bindings=bindings,
    )


def step_rows(
    name: str, batch_size: int, group_size: int, bindings: Sequence[str], sizes: Sizes
) -> list[Row]:
    """Train steps of a dense and of an upcycled model."""
    models, lengths = step_models(name, group_size, bindings, sizes)
    trainer = benchmarks.shipped_trainer(name)
    found = benchmarks.train_steps(
        name, models, trainer, batch_size=batch_size, lengths=lengths, rounds=sizes.rounds
    )
    rows = []
    for kind, m, flops in (
        ("dense", found.dense, found.model_flops[0]),
        ("upcycled", found.upcycled, found.model_flops[1]),
    ):
        share = _share(flops / m.seconds, sizes.dtype)
        what = f"{name}, {batch_size} rows: {kind}"
        row = Row("steps", what, m.seconds * 1e3, m.ratio, share, m.tokens_per_second)
        rows.append(_judged(row, share >= MFU_TARGET, f"MFU >= {MFU_TARGET:.0%}"))
    return rows


def _random_params(model: Model, dtype: str) -> PyTree:
    def make(key: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init_params(key))

    return jax.jit(make)(jax.random.key(0))


def decoding_rows(sizes: Sizes) -> list[Row]:
    """Cached greedy decoding, prompts included, by a dense and by an upcycled language model."""
    models, _ = benchmarks.model_pair(
        sizes.decoder,
        num_experts=8,
        group_size=4096,
        inputs=0,
        targets=sizes.prompt + sizes.new,
        dtype=sizes.dtype,
    )
    rng = np.random.default_rng(0)
    programs = {}
    for kind, model in zip(("dense", "upcycled"), models, strict=True):
        assert isinstance(model, DecoderModel)
        params = _random_params(model, sizes.dtype)
        prompts = rng.integers(1, model.vocab_size, (sizes.rows, sizes.prompt), dtype=np.int32)
        programs[kind] = benchmarks.decoding_program(model, params, prompts, new=sizes.new)
    measured = benchmarks.compare(
        programs, baseline="dense", tokens=sizes.rows * sizes.new, rounds=sizes.rounds
    )
    what = f"{sizes.decoder}, {sizes.rows} prompts of {sizes.prompt}, {sizes.new} new"
    return [
        Row("decoding", f"{what}: {m.name}", m.seconds * 1e3, m.ratio, None, m.tokens_per_second)
        for m in measured
    ]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a study: dense training, conversion, both continued.

    Attributes:
      name: of its rows.
      model: the dense model file.
      images: of images, not text.
      flags: of every command.
    """

    name: str
    model: str
    images: bool
    flags: tuple[str, ...]


def cells(cache: str | None) -> Iterator[Cell]:
    """Glyphs, which need no data, and text where it is cached."""
    yield Cell("glyphs", "vit_tiny", True, ("--gin_file=runs/vision_story.gin",))
    if cache is not None:
        flags = (
            "--gin_file=runs/tiny_t5.gin",
            "--gin.USE_CACHED_TASKS=True",
            f"--seqio_additional_cache_dirs={pathlib.Path(cache).resolve()}",
        )
        yield Cell("text", "t5_1_1_tiny", False, flags)


def study_rows(cell: Cell, folder: pathlib.Path, steps: int, more: Sequence[str]) -> list[Row]:
    """The commands of a cell, in this process. Losses are those of its last report."""
    place = folder / f"study_{cell.name}"
    shutil.rmtree(place, ignore_errors=True)
    kind = "_images" if cell.images else ""
    flags = [*cell.flags, "--gin.EVAL_PERIOD=1000000", "--gin.SAVING_PERIOD=1000000"]
    flags += ["--gin.train.train_eval_dataset_cfg=None", f"--gin.STATS_PERIOD={-(-steps // 3)}"]
    dense, sparse = place / "dense", place / f"upcycled/checkpoint_{steps}"

    def run(name: str, model: str, kind_of_run: str, last: int, *given: str) -> Row:
        began = time.monotonic()
        _command(
            train.main,
            f"--gin_file=models/{model}.gin",
            f"--gin_file=runs/{kind_of_run}{kind}.gin",
            *flags,
            f"--gin.MODEL_DIR='{place / name}'",
            f"--gin.TRAIN_STEPS={last}",
            *given,
            *more,
        )
        wall = time.monotonic() - began
        lines = (place / name / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        report = json.loads(lines[-1])
        rate = report["timing/steps_per_second"]
        what = f"{cell.name}, {name}: {steps} steps in {wall:.0f} s, loss {report['loss']:.3f}"
        return Row("study", what, 1e3 / rate)

    rows = [run("dense", cell.model, "pretrain", steps)]
    began = time.monotonic()
    source = f"--gin.INITIAL_CHECKPOINT_PATH='{dense / f'checkpoint_{steps}'}'"
    _command(
        upcycle.main,
        f"--gin_file=models/{cell.model}_upcycled.gin",
        "--gin_file=runs/upcycle.gin",
        cell.flags[0],
        source,
        f"--gin.OUTPUT_CHECKPOINT_PATH='{sparse}'",
        *more,
    )
    rows.append(
        Row("study", f"{cell.name}, conversion and proof", (time.monotonic() - began) * 1e3)
    )
    go_on = ("continue_pretrain", 2 * steps)
    rows.append(run("dense_continued", cell.model, *go_on, source))
    of_sparse = f"--gin.INITIAL_CHECKPOINT_PATH='{sparse}'"
    rows.append(run("upcycled_continued", f"{cell.model}_upcycled", *go_on, of_sparse))
    return rows


def _command(main: Callable[[Sequence[str]], int], *flags: str) -> None:
    code = main(list(flags))
    if code:
        raise RuntimeError(f"the command ended with {code}: {' '.join(flags)}")


def jobs(sizes: Sizes, args: argparse.Namespace) -> list[Job]:
    """In the order in which they are run: the first of each part before more of one."""
    found: list[Job] = []
    for place, (name, shape, backward, one_hot) in enumerate(sizes.layers):
        run = functools.partial(
            layer_rows, name, shape, backward=backward, one_hot=one_hot, rounds=sizes.rounds
        )
        found.append(Job("layers", f"{name}, backward {backward}", 60, run))
        if place == 0:
            products = functools.partial(product_rows, name, shape, rounds=sizes.rounds)
            found.append(Job("products", name, 30, products))
    for name, batch_size, group_size, bindings in sizes.steps:
        measure = functools.partial(step_rows, name, batch_size, group_size, bindings, sizes)
        found.append(Job("steps", name, 90, measure))
    found.append(Job("decoding", sizes.decoder, 60, functools.partial(decoding_rows, sizes)))
    more = ("--gin.BATCH_SIZE=8",) if args.smoke else ()
    for cell in cells(args.cache):
        study = functools.partial(
            study_rows, cell, pathlib.Path(args.out).resolve(), sizes.study_steps, more
        )
        found.append(Job("study", cell.name, 60, study))
    wanted = [job for job in found if job.part in args.parts]
    first = {job.part: job for job in reversed(wanted)}
    return [job for job in wanted if first[job.part] is job] + [
        job for job in wanted if first[job.part] is not job
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| part | what | ms | time / dense | share of the peak | tokens/s | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        verdict = {None: "", True: " reached", False: " missed"}[row.reached]
        cells = [
            row.part,
            row.what,
            f"{row.milliseconds:.3g}",
            "" if row.ratio is None else f"{row.ratio:.2f}x",
            "" if row.share is None else f"{row.share:.1%}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            f"{row.target}{verdict}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS = ("layers", "products", "steps", "decoding", "study")


def check(args: argparse.Namespace) -> dict[str, object]:
    """Runs the jobs; what is written is returned."""
    sizes = SMOKE if args.smoke else DEVICE
    ends = time.monotonic() + 60 * args.minutes
    result = pathlib.Path(args.out) / "device_check.json"
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    record: dict[str, object] = {}
    for job in jobs(sizes, args):
        remains = ends - time.monotonic()
        name = f"{job.part}: {job.what}"
        if remains < (0 if args.smoke else job.seconds):
            left_out[name] = f"{max(remains, 0):.0f} s remain of {args.minutes:g} minutes"
        else:
            print(f"... {name} ({remains:.0f} s remain)", flush=True)
            try:
                rows += job.run()
            except Exception as error:  # One that fails (out of memory) leaves the others.
                left_out[name] = f"{type(error).__name__}: {str(error)[:500]}"
            except KeyboardInterrupt:  # The time of device_check.sh is up.
                left_out[name] = "interrupted"
                ends = 0.0
        record = {
            "machine": benchmarks.hardware(),
            "smoke": args.smoke,
            "rows": [dataclasses.asdict(row) for row in rows],
            "left_out": left_out,
        }
        files.write_whole(result, json.dumps(record, indent=1) + "\n")
    print(f"\n{benchmarks.hardware()}\n\n{table(rows)}")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(f"\nwritten to {result}")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a job failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of device_check.json and of runs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--minutes", type=float, default=6.5, help="no job begins that needs more")
    parser.add_argument("--cache", help="a cache of the text, from device_check.sh --prepare")
    args = parser.parse_args(argv)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    if hasattr(jax.config, _TRITON) and jax.default_backend() == "gpu":
        jax.config.update(_TRITON, True)
    left_out = check(args)["left_out"]
    assert isinstance(left_out, dict)
    return int(any("remain of" not in why for why in left_out.values()))


if __name__ == "__main__":
    sys.exit(main())
