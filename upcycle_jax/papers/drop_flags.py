"""The flags of `paper` for what is computed from a dense checkpoint: parsed, measured, written.
Nothing heavy is imported before it is used.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_jax.papers.compare import Comparison
    from upcycle_jax.papers.initial_drop import Drops, InitialDrop


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    drop = parser.add_argument_group("at step 0 (figures 13 and 15)")
    drop.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a dense vision transformer's checkpoint or MODEL_DIR, to be upcycled in memory",
    )
    drop.add_argument(
        "--few_shot",
        action="store_true",
        help="10-shot accuracy as well, on classes that were not trained on",
    )
    drop.add_argument(
        "--output_dir", metavar="DIR", help="folder for <figure>.json, <figure>.md and <figure>.png"
    )
    drop.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="model and images (default: config.gin of the MODEL_DIR); repeat for more",
    )
    drop.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as --gin.NAME=VALUE, after all files",
    )


def measured(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, "Drops"]:
    """What is computed from a dense checkpoint, by exhibit.

    Raises:
      ValueError: flags without a checkpoint, an exhibit that is made by training, or see
        `InitialDrop`.
    """
    given = {
        "--few_shot": arguments.few_shot,
        "--output_dir": arguments.output_dir,
        "--gin_file": arguments.gin_file,
        "--gin.": arguments.gin_bindings,
    }
    if arguments.checkpoint is None:
        lonely = [name for name, value in given.items() if value]
        if lonely:
            raise ValueError(f"{lonely[0]} is for --checkpoint=PATH, which is not given")
        return {}
    from upcycle_jax.config.command import log_to_console
    from upcycle_jax.papers import initial_drop

    wanted = [name for name in names if name in initial_drop.EXHIBITS]
    if not wanted:
        raise ValueError(
            f"--checkpoint is for {' and '.join(initial_drop.EXHIBITS)}, which are computed without"
            f" training; {', '.join(names)} needs runs (--results=DIR)"
        )
    log_to_console()
    measure = _initial_drop(arguments)
    return {name: measure.measure(name) for name in wanted}


def _initial_drop(arguments: argparse.Namespace) -> "InitialDrop":
    """Model and images: from gin files, else those of the run that wrote the checkpoint."""
    from upcycle_jax import config
    from upcycle_jax.papers import initial_drop

    path = arguments.checkpoint
    if arguments.gin_file:
        loaded = config.load(arguments.gin_file, arguments.gin_bindings)
        made = loaded.build("initial_drop", checkpoint_path=path)()
    else:
        folder = pathlib.Path(path)
        places = [place / "config.gin" for place in (folder, folder.parent)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ValueError(
                f"{path} is no MODEL_DIR with a config.gin, which would name model and images:"
                " give --gin_file=models/vit_<size>.gin --gin_file=runs/initial_drop.gin"
            )
        loaded = config.load([str(found)], arguments.gin_bindings)
        run = loaded.build("train").keywords
        data = run.get("train_eval_dataset_cfg") or run["train_dataset_cfg"]
        made = initial_drop.InitialDrop(model=run["model"], dataset_cfg=data, checkpoint_path=path)
    if arguments.few_shot and made.few_shot_cfg is None:
        held_out = dataclasses.replace(made.dataset_cfg, split="held_out", num_classes=None)
        made = dataclasses.replace(made, few_shot_cfg=held_out)
    return made


def write(folder: str, comparison: "Comparison") -> None:
    """Writes an exhibit's files where something was computed for it: `<figure>.json`, `.md` and
    `.png`.
    """
    from upcycle_jax.files import replacing, write_whole
    from upcycle_jax.papers import initial_drop
    from upcycle_jax.papers.render import as_json, render
    from upcycle_jax.text import Format, json_text

    if comparison.drops is None:
        return
    stem = pathlib.Path(folder) / comparison.exhibit.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_whole(f"{stem}.json", json_text(as_json(comparison)) + "\n")
    write_whole(f"{stem}.md", render(comparison, Format.MARKDOWN))
    with replacing(f"{stem}.png", "wb") as stream:
        stream.write(initial_drop.figure(comparison.drops))
