"""Checks a converted checkpoint against its source: every leaf from disk, then both models on the
same tokens.

Examples:

    python -m upcycle_jax.verify /data/sparse/checkpoint_1000000
    python -m upcycle_jax.verify --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin \\
        --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" \\
        --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

    python -m upcycle_jax.verify /data/llama-8x1b --served=/models/llama-8x1b
    python -m upcycle_jax.verify /data/llama-8x1b --endpoint=http://localhost:8000

A path alone is enough: the checkpoint records its source, recipe and model. Where the source is
gone, the result is proved against the checksums that were recorded at the conversion. With gin
files, the bindings of `upcycle` apply; the recorded recipe is used even then, and a configured one
that differs is reported. Damage is reported by side: source, result or record.

With --served or --endpoint, what is compared instead is the checkpoint's own language model with a
Hugging Face folder that was written from it (what it states, its tensors, and what transformers
computes from it, layer by layer: the first part that differs is named), or with a server's
log-probabilities of a prompt (OpenAI-style completions with echo). Exit status: 0 when
the proof holds, 1 when it does not, 2 when it could not be tried.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config
    from upcycle_jax.models.base import Model


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        help="a converted checkpoint, instead of OUTPUT_CHECKPOINT_PATH: its source, recipe and"
        " model are those that it records, unless bindings say otherwise",
    )
    command.add_max_memory(parser)
    served = parser.add_argument_group("what is served")
    served.add_argument("--served", metavar="FOLDER", help="compare with this Hugging Face folder")
    served.add_argument("--endpoint", metavar="URL", help="compare with this server")
    served.add_argument(
        "--endpoint_model", metavar="NAME", help="its model; default: the first that it lists"
    )
    served.add_argument(
        "--tokens",
        metavar="FILE",
        help="token ids to compare on: a JSON list of whole numbers, or of such lists of one"
        " length; default: random ones",
    )
    served.add_argument("--length", type=int, metavar="TOKENS", help="length of random prompts")


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.models.base import Model

    given = command.given_to_conversion(flags, loaded, Model)
    if flags.extra.served is not None or flags.extra.endpoint is not None:
        return _served(flags, given.get("model"))
    if flags.extra.path is not None:
        given["output_checkpoint_path"] = flags.extra.path
    built = loaded.build("verify", **given)
    command.say_unused(loaded, name="verify", other_functions=("upcycle",))
    return 0 if built().run().ok else 1


def _served(flags: Flags, model: "Model | None") -> int:
    from upcycle_jax.surgery.served.verify_served import ServedCheck

    extra = flags.extra
    if extra.path is None:
        raise ValueError(
            "--served and --endpoint compare with a checkpoint: name it, as in verify PATH"
            " --served=FOLDER"
        )
    if extra.length is not None and extra.length < 2:
        raise ValueError(f"--length must be at least 2, got {extra.length}")
    check = ServedCheck(
        path=extra.path,
        folder=pathlib.Path(extra.served) if extra.served is not None else None,
        endpoint=extra.endpoint,
        endpoint_model=extra.endpoint_model,
        model=model.config if model is not None else None,
        tokens=pathlib.Path(extra.tokens) if extra.tokens is not None else None,
        length=extra.length,
    )
    return 0 if check.run() else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return command.run("verify", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())
