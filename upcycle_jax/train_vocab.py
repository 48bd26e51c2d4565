"""Trains a SentencePiece vocabulary on your own text, for VOCABULARY in gin.

Example:

    python -m upcycle_jax.train_vocab --text_files='corpus/*.jsonl' --vocab_size=8192 \\
        --output=corpus.model
    python -m upcycle_jax.train_vocab --embedded_text --output=embedded.model
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.train_vocab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text_files",
        action="append",
        metavar="PATTERN",
        help="files (.txt, .jsonl, .gz, .parquet); repeat for more patterns",
    )
    source.add_argument(
        "--embedded_text",
        action="store_true",
        help="train on the text that this Python environment holds",
    )
    parser.add_argument(
        "--text_field",
        default="text",
        metavar="NAME",
        help="field of .jsonl and .parquet that holds the text",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=8192,
        metavar="N",
        help="pieces, without a task's sentinels (default 8192)",
    )
    parser.add_argument(
        "--max_characters",
        type=int,
        default=20_000_000,
        metavar="N",
        help="of more text an even sample is used",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="model to write; must not be there yet",
    )
    return parser


def _texts(arguments: argparse.Namespace) -> list[str]:
    if arguments.embedded_text:
        from upcycle_jax.tasks import python_environment

        corpora = (python_environment.python_source(), python_environment.documentation_prose())
        return [passage.decode() for corpus in corpora for passage in corpus.splits["train"]]
    from upcycle_jax.data.text import vocabulary_training

    return vocabulary_training.read_texts(arguments.text_files, field=arguments.text_field)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model, prints what to set, and returns the exit code."""
    arguments = _parser().parse_args(argv)
    from upcycle_jax.data.text import vocabulary_training

    try:
        trained = vocabulary_training.train_vocabulary(
            _texts(arguments),
            arguments.output,
            size=arguments.vocab_size,
            max_characters=arguments.max_characters,
        )
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"train_vocab: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {trained.path}: {trained.pieces} pieces, trained on {trained.characters:,}"
        " characters"
    )
    print(f"{trained.characters_per_token:.2f} characters a token")
    print(
        f"set VOCABULARY = {str(trained.path)!r}; a model needs vocab_size of at least"
        f" {trained.pieces + 100} (with 100 sentinels)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
