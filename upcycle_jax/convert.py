"""Converts checkpoints between formats without changing the model: anything readable to Orbax,
dense T5 to Hugging Face.

Examples:

    python -m upcycle_jax.convert ~/flan-t5-base /runs/flan --optimizer_state adafactor
    python -m upcycle_jax.convert gs://bucket/t5/checkpoint_1000000 /runs/t5
    python -m upcycle_jax.convert /runs/t5/checkpoint_5000 ~/t5-hf --to huggingface --dtype bfloat16

The source is only read. The output appears when it is complete; a command that was interrupted is
finished by running it again.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from upcycle_jax import byte_sizes
from upcycle_jax.printing import printable, printable_lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help=(
            "checkpoint_<step>, MODEL_DIR, legacy T5X folder or msgpack file, or Hugging Face T5"
            " folder"
        ),
    )
    parser.add_argument(
        "output",
        help="checkpoint_<step> or the MODEL_DIR to hold it; a new folder for --to huggingface",
    )
    parser.add_argument(
        "--to",
        choices=("orbax", "huggingface"),
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
    parser.add_argument(
        "--max_memory",
        type=byte_sizes.flag,
        default="1GiB",
        help="about how much to hold at a time (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    return parser


def _convert(arguments: argparse.Namespace) -> str:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
    import numpy as np

    from upcycle_jax.checkpoints.formats import open_checkpoint
    from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
    from upcycle_jax.checkpoints.to_orbax import convert_to_orbax
    from upcycle_jax.state_tree import PARAM_STATES, TARGET

    reader = open_checkpoint(arguments.source)
    dtype = np.dtype(arguments.dtype) if arguments.dtype else None

    def progress(name: str) -> None:
        if not arguments.quiet:
            print(printable(name), file=sys.stderr)

    if arguments.to == "huggingface":
        if arguments.step is not None or arguments.optimizer_state == "adafactor":
            raise ValueError(
                "a Hugging Face folder holds neither a step nor optimizer state: leave out --step"
                " and --optimizer_state"
            )
        return str(
            write_huggingface(
                reader,
                arguments.output,
                dtype=dtype,
                shard_bytes=arguments.max_memory,
                progress=progress,
            )
        )
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
        max_memory=arguments.max_memory,
        progress=progress,
    )
    return str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; 2 when nothing could be converted."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # Only files are copied: do not take hold of an accelerator.
    try:
        print(f"wrote {_convert(arguments)}")
    except (ValueError, OSError) as error:
        print(f"convert: {printable_lines(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
