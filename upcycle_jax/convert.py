"""Converts checkpoints between formats without changing the model: anything readable to Orbax;
dense T5 and vision transformers, and decoder-only language models with experts or without, to
Hugging Face; vision transformers to NumPy archives, and with experts or without to V-MoE's files.

Examples:

    python -m upcycle_jax.convert ~/flan-t5-base /runs/flan --optimizer_state adafactor
    python -m upcycle_jax.convert gs://bucket/t5/checkpoint_1000000 /runs/t5
    python -m upcycle_jax.convert /runs/t5/checkpoint_5000 ~/t5-hf --to huggingface --dtype bfloat16
    python -m upcycle_jax.convert /runs/llama-8x1b ~/llama-8x1b --to huggingface --reader vllm \\
        --tokenizer ~/Llama-3.2-1B
    python -m upcycle_jax.convert /runs/vit-b16-32x ~/vit-b16-32x --to vmoe
    python -m upcycle_jax.convert /runs/vit-b16 ~/vit-b16.npz --to npz --dtype bfloat16

Before a language model is written, it is said what each reader of the folder makes of it:
transformers 5 and 4.57, vLLM, SGLang, llama.cpp. `--reader` refuses what that one cannot read.

The source is only read. The output appears when it is complete; a command that was interrupted is
finished by running it again.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax import byte_sizes
from upcycle_jax.config.flags import plain_words
from upcycle_jax.printing import printable, printable_lines

if TYPE_CHECKING:
    import numpy as np

    from upcycle_jax.checkpoints.huggingface.base import WritingOptions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help=(
            "checkpoint_<step>, MODEL_DIR, legacy T5X folder or msgpack file, Hugging Face folder,"
            " GGUF file, NumPy archive or folder of big_vision's, or prefix of V-MoE's files"
        ),
    )
    parser.add_argument(
        "output",
        help=(
            "checkpoint_<step> or the MODEL_DIR to hold it; a new folder for --to huggingface, a"
            " file for --to npz, the prefix of files for --to vmoe"
        ),
    )
    parser.add_argument(
        "--to",
        choices=("orbax", "huggingface", "npz", "vmoe"),
        default="orbax",
        help="format to write (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters; default: as they are stored",
    )
    parser.add_argument(
        "--optimizer_state",
        choices=("keep", "drop", "adafactor"),
        default="keep",
        help=(
            "copy the source's, leave it out, or write a fresh Adafactor state of zeros, which T5X"
            " wants to find (orbax only)"
        ),
    )
    parser.add_argument(
        "--step", type=int, help="step to record; default: the source's (orbax only)"
    )
    parser.add_argument("--image_size", type=int, help="of a vision transformer, if another one")
    how = "how positions are taken over to it: bilinear (big_vision), bicubic (Hugging Face)"
    parser.add_argument("--position_interpolation", help=f"{how}, bicubic_antialiased (timm)")
    parser.add_argument(
        "--max_memory",
        type=byte_sizes.flag,
        default="1GiB",
        help="about how much to hold at a time (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    _add_huggingface(parser)
    return parser


def _add_huggingface(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for --to huggingface")
    group.add_argument(
        "--model_type",
        help=(
            "type to write, such as mixtral, qwen3_moe or vit; default: chosen, and the choice is"
            " said. For --to npz whose names arrays have: big_vision (the default) or vit_jax"
        ),
    )
    group.add_argument(
        "--reader",
        action="append",
        default=[],
        help="transformers5, transformers4, vllm, sglang or llama.cpp: refuse what it cannot read"
        " as this model; may be repeated",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="copy tokenizer and generation files from here, or write the tokenizer of this GGUF"
        " file; default: what the checkpoint was made from, where it is still there",
    )
    group.add_argument(
        "--max_position_embeddings",
        type=int,
        metavar="POSITIONS",
        help="context that engines prepare for; default: that of the tokenizer's folder",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="say what readers would make of it, write nothing"
    )
    for flag, what in (
        ("--gin_file", "a file that defines MODEL, where the checkpoint does not state it"),
        ("--gin_bindings", "NAME=VALUE; also as --gin.NAME=VALUE"),
    ):
        group.add_argument(flag, action="append", default=[], help=f"{what}; may be repeated")


def _convert(arguments: argparse.Namespace) -> str:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
    import numpy as np

    from upcycle_jax.checkpoints import other_formats
    from upcycle_jax.checkpoints.formats import open_checkpoint
    from upcycle_jax.checkpoints.regridded import with_image_size
    from upcycle_jax.checkpoints.to_orbax import convert_to_orbax
    from upcycle_jax.state_tree import PARAM_STATES, TARGET

    reader = open_checkpoint(arguments.source)
    dtype = np.dtype(arguments.dtype) if arguments.dtype else None

    def progress(name: str) -> None:
        if not arguments.quiet:
            print(printable(name), file=sys.stderr)

    given = [name for name in other_formats.FLAGS["huggingface"] if getattr(arguments, name)]
    given += ["step"] if arguments.step is not None else []
    given += ["optimizer_state"] if arguments.optimizer_state == "adafactor" else []
    other_formats.check_flags(arguments.to, given)
    options = _options(arguments, dtype)
    size, how = arguments.image_size, arguments.position_interpolation
    keeps = arguments.to == "orbax" and arguments.optimizer_state == "keep"
    reader, more = with_image_size(reader, size, how, keeps, model=options.model, say=progress)
    if arguments.to != "orbax":
        path = other_formats.write(
            reader,
            arguments.output,
            to=arguments.to,
            options=options,
            file_bytes=arguments.max_memory,
            dry_run=arguments.dry_run,
            progress=progress,
        )
        return f"dry run: nothing was written to {path}" if arguments.dry_run else f"wrote {path}"
    fresh = None
    if arguments.optimizer_state == "adafactor":
        from upcycle_jax import state_tree
        from upcycle_jax.training.optimizers import Adafactor

        parameters = {
            name.removeprefix(TARGET): spec
            for name, spec in reader.specs().items()
            if name.startswith(TARGET)
        }
        whole = state_tree.specs(parameters, Adafactor().state_specs(parameters))
        fresh = {name: spec for name, spec in whole.items() if name.startswith(PARAM_STATES)}
    path = convert_to_orbax(
        reader,
        arguments.output,
        step=arguments.step,
        dtype=dtype,
        keep_optimizer=arguments.optimizer_state == "keep",
        fresh_state=fresh,
        metadata=more,
        max_memory=arguments.max_memory,
        progress=progress,
    )
    return f"wrote {path}"


def _options(arguments: argparse.Namespace, dtype: "np.dtype | None") -> "WritingOptions":
    from upcycle_jax.checkpoints.huggingface.base import WritingOptions

    model = None
    if arguments.gin_file or arguments.gin_bindings:
        from upcycle_jax import config
        from upcycle_jax.models.base import Model

        loaded = config.load(arguments.gin_file, arguments.gin_bindings)
        model = loaded.macro("MODEL", Model).config
    positions = arguments.max_position_embeddings
    if positions is not None and positions < 1:
        raise ValueError(f"--max_position_embeddings must be at least 1, got {positions}")
    return WritingOptions(
        dtype=dtype,
        model=model,
        model_type=arguments.model_type,
        readers=tuple(arguments.reader),
        tokenizer=pathlib.Path(arguments.tokenizer) if arguments.tokenizer else None,
        max_positions=positions,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; 2 when nothing could be converted."""
    words = plain_words(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # Only files are copied: do not take hold of an accelerator.
    try:
        print(_convert(arguments))
    except (ValueError, OSError) as error:
        print(f"convert: {printable_lines(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
