"""Plans an upcycling before any of it is run: memory, step time, FLOPs and device-days against the
two baselines, and what was published.

Example:

    python -m upcycle_jax.plan --gin_file=papers/sparse_upcycling/base_upcycled.gin \\
        --hardware=tpu_v5e:256 --dense_steps=1000000 --extra_steps=100000 \\
        --gin.NUM_EXPERT_PARTITIONS=32 --gin.GROUP_SIZE=512

The gin files are those of upcycle_jax.train for the upcycled model; what only a run needs
(MODEL_DIR, data, a checkpoint) may stay open. The same model without experts is the dense
continuation, the same MoE from step 0 the baseline from scratch. Where INITIAL_CHECKPOINT_PATH ends
in checkpoint_<step> and TRAIN_STEPS is set, both numbers of steps follow from them. Nothing is
compiled and no accelerator is needed. The exit code is 1 where the upcycled model does not fit.
docs/planning.md says how the numbers are made.

--scale=1024,8192 adds the same model on so many chips, each with the same work: what exchange and
sums of gradients take beside compute, and whether experts must stay inside a slice.

With --advise=RUNS, and nothing but --format beside it, the published scaling law of upcycling is
fitted to the runs below that folder: where upcycling passes dense continuation, and where MoE from
scratch passes upcycling, with intervals.

    python -m upcycle_jax.plan --advise=/data/runs
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from upcycle_jax.config import command, registry
from upcycle_jax.config.flags import Flags
from upcycle_jax.printing import printable_lines, show
from upcycle_jax.step_names import step_of

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _add_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("plan")
    own.add_argument(
        "--hardware",
        metavar="KIND:CHIPS",
        required=True,
        help="e.g. tpu_v5e:256, tpu_v5p:64, h100:8",
    )
    own.add_argument(
        "--extra_steps",
        type=int,
        metavar="N",
        help="steps of the upcycled model (default: TRAIN_STEPS - dense steps, else 100000)",
    )
    own.add_argument(
        "--dense_steps",
        type=int,
        metavar="N",
        help="steps of the dense checkpoint (default: from its path)",
    )
    own.add_argument(
        "--mfu",
        metavar="LOW,HIGH",
        help="model FLOPs utilisation of dense models (default 0.25,0.55)",
    )
    own.add_argument(
        "--advise",
        metavar="RUNS",
        help="instead of a plan: what the dense, upcycled and from-scratch runs below this folder"
        " say about when upcycling pays",
    )
    own.add_argument(
        "--scale",
        metavar="CHIPS,...",
        help="also on so many chips of the kind, e.g. 1024,8192, with the same work for each: times"
        " of exchanges and sums of gradients beside compute, inside of slices and between them",
    )
    own.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text", help="default text"
    )


def _literal(loaded: "Config", name: str) -> object:
    """A macro's value as written, None where it is open."""
    return loaded.bindings.macros[name].value if loaded.has_macro(name) else None


def _steps(flags: Flags, loaded: "Config") -> tuple[int | None, int | None]:
    """Extra steps and dense steps, from the flags or from the configuration; None where neither
    says.
    """
    extra, dense = flags.extra.extra_steps, flags.extra.dense_steps
    path, total = _literal(loaded, "INITIAL_CHECKPOINT_PATH"), _literal(loaded, "TRAIN_STEPS")
    if dense is None and isinstance(path, str):
        dense = step_of(PurePath(path).name) or None
    if extra is None and isinstance(total, int) and dense is not None and total > dense:
        extra = total - dense
    return extra, dense


def _mfu(text: str | None, default: tuple[float, float]) -> tuple[float, float]:
    if text is None:
        return default
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--mfu={text} is not LOW,HIGH, e.g. 0.3,0.5") from None
    return low, high


def _chips(text: str | None) -> list[int]:
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f"--scale={text} is not CHIPS,CHIPS,..., e.g. 1024,8192")
    return [int(part) for part in parts]


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.config.stand_ins import load_with_stand_ins
    from upcycle_jax.planning import estimate, scale
    from upcycle_jax.planning.compilation import Workload
    from upcycle_jax.planning.render import render
    from upcycle_jax.text import Format

    hardware = estimate.Hardware.parse(flags.extra.hardware)
    numbers_of_chips = _chips(flags.extra.scale)
    extra_steps, dense_steps = _steps(flags, loaded)
    opened = load_with_stand_ins(flags, loaded)
    work = Workload.of_run(opened.build("train", train_eval_dataset_cfg=None)())
    command.say_unused(opened, name="plan", other_functions=registry.FUNCTIONS)
    plan = estimate.make_plan(
        pathlib.PurePath((flags.gin_file or ("flags",))[0]).stem,
        work,
        hardware,
        extra_steps=extra_steps,
        dense_steps=dense_steps,
        mfu=_mfu(flags.extra.mfu, estimate.DEFAULT_MFU),
    )
    at_scale = [scale.scaled(plan, chips) for chips in numbers_of_chips]
    sys.stdout.write(render(plan, Format(flags.extra.format), at_scale))
    return (
        1 if plan.costs[estimate.Kind.UPCYCLED].memory.verdict is estimate.Fit.DOES_NOT_FIT else 0
    )


def _advise(argv: Sequence[str]) -> int:
    """Prints the advice; the words are --advise and --format."""
    parser = argparse.ArgumentParser(prog="python -m upcycle_jax.plan", allow_abbrev=False)
    parser.add_argument("--advise", metavar="RUNS", required=True)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args(argv)
    from upcycle_jax.studies import advice
    from upcycle_jax.text import json_text

    try:
        runs = advice.read(arguments.advise)
        found = advice.advise(runs)
    except (ValueError, FileNotFoundError) as error:
        print(f"upcycle_jax.plan: error: {printable_lines(error)}", file=sys.stderr)
        return 2
    as_text = advice.text(runs, found) if arguments.format == "text" else ""
    show(as_text.rstrip() or json_text(advice.as_json(runs, found)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word == "--advise" or word.startswith("--advise=") for word in words):
        return _advise(words)
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # only shapes are computed: do not take hold of an accelerator
    return command.run("plan", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())
