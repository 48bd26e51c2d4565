"""Command-line flags: T5X's, exactly. This module imports neither jax nor TensorFlow, so that
`--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Container, Sequence
from typing import NoReturn

_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")

BEFORE_PARSING = """\
gin values are Python literals: strings need quotes that survive the shell,
--gin.MODEL_DIR="'/data/run'".
Later --gin_file flags override earlier ones; --gin.NAME=VALUE comes last.
absl's logging flags (--alsologtostderr, --verbosity, ...) are accepted and change nothing."""

_ABSL_SWITCHES = frozenset(
    {
        "logtostderr",
        "alsologtostderr",
        "showprefixforinfo",
        "pdb",
        "pdb_post_mortem",
        "run_with_pdb",
        "run_with_profiling",
        "use_cprofile_for_profiling",
    }
)
_ABSL_VALUES = frozenset(
    {"log_dir", "verbosity", "v", "stderrthreshold", "logger_levels", "profile_file", "undefok"}
)
"""Flags that every absl program has, T5X's among them: on or off (`--name`, `--noname`,
`--name=true`), and with a value (`--name=value`, `--name value`).
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the command line said.

    Attributes:
      gin_file: gin files, in order.
      gin_bindings: `NAME=VALUE`, from `--gin.NAME=VALUE` and `--gin_bindings`, in order.
      gin_search_paths: folders to look for gin files in.
      tfds_data_dir: where TensorFlow Datasets keeps data, or None for its default.
      seqio_additional_cache_dirs: further folders with SeqIO's cached tasks.
      coordinator_address: `host:port` of process 0 of a multi-process run, or None.
      process_count: number of processes, or None.
      process_index: index of this process, or None.
      initialization_timeout: seconds to wait for the other processes, or None for jax's default.
      multiprocess_gpu: join the processes of a GPU cluster with the flags above (found by jax
        itself where not given).
      dry_run: parse, build shapes, print the plan and stop.
      extra: the command's own flags.
    """

    gin_file: tuple[str, ...] = ()
    gin_bindings: tuple[str, ...] = ()
    gin_search_paths: tuple[str, ...] = ()
    tfds_data_dir: str | None = None
    seqio_additional_cache_dirs: tuple[str, ...] = ()
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    initialization_timeout: int | None = None
    multiprocess_gpu: bool = False
    dry_run: bool = False
    extra: argparse.Namespace = dataclasses.field(default_factory=argparse.Namespace)


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag where one is unknown."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            known = [
                option
                for action in self._actions
                for option in action.option_strings
                if option.startswith("--")
            ]
            for word in message.removeprefix(prefix).split():
                if word.startswith("--jax_"):
                    name = word.partition("=")[0].removeprefix("--").upper()
                    message += f"; jax reads the environment variable {name}"
                    continue
                near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
                message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of T5X's flags for `python -m upcycle_jax.<command>`."""
    out = _Parser(
        prog=f"python -m upcycle_jax.{command}",
        description=description,
        epilog=BEFORE_PARSING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gin = out.add_argument_group("configuration")
    gin.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; repeat for more, later ones override",
    )
    gin.add_argument(
        "--gin.NAME",
        dest="shown_only",
        metavar="VALUE",
        help="bind a macro or a parameter, after all files",
    )
    gin.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the same as --gin.NAME=VALUE; repeat for more",
    )
    gin.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="DIR,DIR",
        help="folders to look for gin files in",
    )
    run = out.add_argument_group("run")
    run.add_argument(
        "--dry_run",
        nargs="?",
        const=True,
        default=False,
        type=_boolean,
        help="print the plan of the run and stop",
    )
    run.add_argument(
        "--nodry_run", dest="dry_run", action="store_const", const=False, help=argparse.SUPPRESS
    )
    data = out.add_argument_group("data")
    data.add_argument(
        "--tfds_data_dir", metavar="DIR", help="where TensorFlow Datasets keeps prepared data"
    )
    data.add_argument(
        "--seqio_additional_cache_dirs",
        action="append",
        default=[],
        metavar="DIR,DIR",
        help="more folders with cached tasks",
    )
    many = out.add_argument_group("several processes (on TPU pods jax finds these itself)")
    many.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    many.add_argument("--process_count", type=int, metavar="N", help="number of processes")
    many.add_argument("--process_index", type=int, metavar="I", help="index of this process")
    many.add_argument(
        "--initialization_timeout",
        type=int,
        metavar="SECONDS",
        help="how long to wait for the other processes",
    )
    many.add_argument(
        "--multiprocess_gpu",
        nargs="?",
        const=True,
        default=False,
        type=_boolean,
        help="join the processes of a GPU cluster",
    )
    many.add_argument(
        "--nomultiprocess_gpu",
        dest="multiprocess_gpu",
        action="store_const",
        const=False,
        help=argparse.SUPPRESS,
    )
    return out


def plain_words(argv: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` and `-flag` (absl accepts one dash) as argparse knows them."""
    out = []
    for word in argv:
        dashes, name = word[: len(word) - len(word.lstrip("-"))], word.lstrip("-")
        if dashes in ("-", "--") and name.startswith("gin.") and "=" in name:
            out.append(f"--gin_bindings={name.removeprefix('gin.')}")
        elif dashes == "-" and len(name.partition("=")[0]) > 1 and name[0].isalpha():
            out.append(f"--{name}")
        else:
            out.append(word)
    return out


def _without_absl(words: Sequence[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """What is left without absl's flags, and those as they were written. A flag that the command
    has itself, `known`, is its own.
    """
    rest: list[str] = []
    absl: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, _ = word.lstrip("-").partition("=")
        dashes = len(word) - len(word.lstrip("-"))
        if dashes not in (1, 2) or f"--{name}" in known or f"-{name}" in known:
            rest.append(word)
        elif name in _ABSL_SWITCHES or name.removeprefix("no") in _ABSL_SWITCHES:
            absl.append(word)
        elif name in _ABSL_VALUES:
            value = None if equals else next(remaining, None)
            absl.append(word if value is None else f"{word} {value}")
        else:
            rest.append(word)
    return rest, absl


def _split(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in value.split(",") if part)


def parse(
    command: str,
    argv: Sequence[str] | None,
    *,
    description: str,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Flags:
    """Parses a command line.

    Args:
      command: name of the command, for the usage line.
      argv: words after the command's name; None for the process's own.
      description: what `--help` says first.
      extra: adds the command's own flags to the parser; their values arrive in `Flags.extra`.

    Raises:
      SystemExit: `--help`, or a flag that does not exist (exit code 2, the nearest flag named).
    """
    builder = parser(command, description)
    if extra is not None:
        extra(builder)
    known = {option for action in builder._actions for option in action.option_strings}
    words, absl = _without_absl(sys.argv[1:] if argv is None else argv, known)
    words = plain_words(words)
    if any(word == "--gin.NAME" for word in words) or any(
        word.startswith("--gin.") for word in words
    ):
        builder.error("a binding is one word, --gin.NAME=VALUE")
    values = vars(builder.parse_args(words))
    del values["shown_only"]
    if absl:
        print(
            f"upcycle_jax.{command}: {', '.join(absl)}: flags of absl change nothing here. Progress"
            " goes to standard error, results to standard output or MODEL_DIR.",
            file=sys.stderr,
        )
    for name in ("gin_search_paths", "seqio_additional_cache_dirs"):
        values[name] = _split(values[name])
    for name in ("gin_file", "gin_bindings"):
        values[name] = tuple(values[name])
    fields = {field.name for field in dataclasses.fields(Flags)}
    own = {name: value for name, value in values.items() if name in fields}
    return Flags(
        **own,
        extra=argparse.Namespace(
            **{name: value for name, value in values.items() if name not in fields}
        ),
    )
