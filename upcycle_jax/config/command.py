"""What every command does the same way: parse flags, join the other processes, load the
configuration, say errors plainly.

def main(argv: Sequence[str] | None = None) -> int:
    return command.run("train", argv, description=__doc__, body=_run)

def _run(flags: Flags, loaded: Config) -> int:
    ...
"""

import argparse
import errno
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import upcycle_jax
from upcycle_jax import byte_sizes, data_folders
from upcycle_jax.config import flags as flags_lib
from upcycle_jax.config.flags import Flags
from upcycle_jax.printing import PrintableFormatter, printable_lines

if TYPE_CHECKING:
    from upcycle_jax.config.build import Config

TRACEBACK_VARIABLE = "UPCYCLE_JAX_TRACEBACK"


# Commands that compute on all devices of a pod. The others run on one machine of it, unless flags
# say otherwise.
LOOK_FOR_CLUSTER = frozenset({"train", "eval", "infer", "few_shot"})


USERS_TO_MEND = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What the operating system refuses because of the path given, its rights, or a full disk."""


_REMOTE = frozenset(
    {
        "FailedPreconditionError",
        "PermissionDeniedError",
        "UnauthenticatedError",
        "UnavailableError",
        "UnimplementedError",
    }
)
"""TensorFlow's errors, by name, where storage such as gs:// is not reached."""


def _refusal_of_storage(error: Exception) -> str | None:
    """An error of the operating system or of remote storage that the user can mend, in one line,
    its path shortened; None for every other error.
    """
    if type(error).__module__.startswith("tensorflow.") and type(error).__name__ in _REMOTE:
        return f"storage cannot be reached: {' '.join(str(error).split())[:400]}"
    if not isinstance(error, OSError) or error.errno not in USERS_TO_MEND:
        return None
    path = str(error.filename) if error.filename is not None else ""
    if len(path) > 200:
        path = f"{path[:200]}... ({len(path)} characters)"
    return f"{path}: {error.strerror}" if path and error.strerror else str(error)


def join_processes(name: str, flags: Flags) -> None:
    """Joins the other processes of the run, where the flags or the cluster say that there are any
    (`distributed.join`).

    Must come before any use of a device.

    Args:
      name: the command's name.
      flags: its flags.

    Raises:
      ValueError: flags are missing or out of range.
      TimeoutError: the other processes did not come; the message names them.
    """
    asked = (flags.coordinator_address, flags.process_count, flags.process_index)
    look_for_cluster = flags.multiprocess_gpu or (name in LOOK_FOR_CLUSTER and not flags.dry_run)
    if look_for_cluster or any(value is not None for value in asked):
        from upcycle_jax import distributed  # imports jax: after --help has answered

        distributed.join(
            coordinator_address=flags.coordinator_address,
            process_count=flags.process_count,
            process_index=flags.process_index,
            initialization_timeout=flags.initialization_timeout,
            look_for_cluster=look_for_cluster,
        )


def _is_ours(error: BaseException) -> bool:
    """Whether the library itself raised the error, so that its message is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    package = pathlib.Path(upcycle_jax.__file__).resolve().parent
    tasks = package.parent / "tasks"
    return bool(frames) and any(
        folder in pathlib.Path(frames[-1].filename).resolve().parents for folder in (package, tasks)
    )


def is_first() -> bool:
    """Whether this is process 0 of the run: the one that prints results."""
    from upcycle_jax import distributed

    return distributed.is_first()


def log_to_console() -> None:
    """Progress goes to standard error, one line each; of other libraries only warnings do."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log = logging.getLogger("upcycle_jax")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def say_unused(loaded: "Config", *, name: str, other_functions: Sequence[str] = ()) -> None:
    """Says on standard error which bindings nothing has used, but for those of shipped files: they
    are defaults, not the user's mistake. To be called once all is built.

    Args:
      loaded: the `Config`.
      name: the command's name.
      other_functions: names of the registry for which bindings may stand in the files too.
    """
    from upcycle_jax.config import search

    shipped = f"{search.shipped_folder()}/"
    for binding in loaded.unused(other_functions=other_functions) if is_first() else ():
        if binding.startswith(shipped):
            continue
        print(f"upcycle_jax.{name}: warning: {binding} is not used by {name}", file=sys.stderr)


def call(function: str, flags: Flags, loaded: "Config", *, name: str) -> Any:
    """Builds what a command runs, says which bindings nothing uses, and runs it.

    It has a field `files`, the operative configuration, to be left beside the results, and
    `run(dry_run=...)`.

    Args:
      function: its name in gin files.
      flags: of the command.
      loaded: the `Config`.
      name: the command's name.
    """
    log_to_console()
    built = loaded.build(function)
    say_unused(loaded, name=name)
    return built(files={"config.gin": loaded.operative_text()}).run(dry_run=flags.dry_run)


def add_max_memory(parser: argparse.ArgumentParser) -> None:
    """Adds `--max_memory`, which commands on checkpoints share."""
    parser.add_argument(
        "--max_memory",
        type=byte_sizes.flag,
        metavar="SIZE",
        help="how much of the arrays to hold at a time: 2GiB (the default), 512MiB, 1000000",
    )


def given_to_conversion(flags: Flags, loaded: "Config", kind: type) -> dict[str, Any]:
    """What `upcycle` and `verify` are given beside their bindings: `--max_memory`, and the model
    where a file defines one.

    Args:
      flags: of the command.
      loaded: the configuration.
      kind: what a model is.
    """
    given: dict[str, Any] = {}
    if flags.extra.max_memory is not None:
        given["max_memory"] = flags.extra.max_memory
    if loaded.has_macro("MODEL"):
        given["model"] = loaded.macro("MODEL", kind)
    return given


def _say_outside(modules: list[str]) -> None:
    print(f"imports from outside the project: {', '.join(modules)}", flush=True)


def run(
    name: str,
    argv: Sequence[str] | None,
    *,
    description: str,
    body: Callable[..., int | None],
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
    function: Callable[[Flags], str] | None = None,
) -> int:
    """Runs a command: `body(flags, loaded_configuration)`.

    A bad configuration, a missing file, any other value that the library refuses, and what the
    operating system refuses for reasons that the user can mend (`USERS_TO_MEND`) are one message on
    standard error and exit code 2; the environment variable UPCYCLE_JAX_TRACEBACK=1 shows the
    traceback instead. Other errors always show it.

    Args:
      name: the command's name.
      argv: words after the command's name; None for the process's own.
      description: what `--help` says first.
      body: does the work and returns the exit code, None standing for 0.
      extra: adds the command's own flags (see `flags.parse`).
      function: what the command builds: errors about names then list the values that are missing
        too (see `config.load`).
    """
    flags = flags_lib.parse(name, argv, description=description, extra=extra)
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # TensorFlow reads text only; what it says of missing GPUs is noise
    try:
        join_processes(name, flags)
        from upcycle_jax import config  # imports the rest of the library: after --help has answered

        if flags.tfds_data_dir or flags.seqio_additional_cache_dirs:
            data_folders.configure(
                tfds_data_dir=flags.tfds_data_dir, cache_dirs=flags.seqio_additional_cache_dirs
            )
        loaded = config.load(
            flags.gin_file,
            flags.gin_bindings,
            flags.gin_search_paths,
            function=function(flags) if function is not None else None,
            before_imports=_say_outside if name == "check" or flags.dry_run else None,
        )
        return body(flags, loaded) or 0
    except (ValueError, FileNotFoundError, TimeoutError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not _is_ours(error):
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"upcycle_jax.{name}: error: {printable_lines(f'{error}{notes}')}", file=sys.stderr)
        return 2
    except Exception as error:
        text = _refusal_of_storage(error)
        if os.environ.get(TRACEBACK_VARIABLE) or text is None:
            raise
        print(f"upcycle_jax.{name}: error: {text}", file=sys.stderr)
        return 2
