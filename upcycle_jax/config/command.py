"""What every command does the same way: parse flags, join the other processes, load the configuration, say errors plainly.

def main(argv: Sequence[str] | None = None) -> int:
    return command.run("train", argv, description=__doc__, body=_run)

def _run(flags: Flags, loaded: Config) -> int:
    ...
"""

import argparse
import functools
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import upcycle_jax
from upcycle_jax.config import flags as flags_lib
from upcycle_jax.config.flags import Flags

TRACEBACK_VARIABLE = "UPCYCLE_JAX_TRACEBACK"


def join_processes(flags: Flags) -> None:
    """Starts jax's distributed system where the flags ask for it; must come before any use of a device.

    Raises:
      ValueError: the three flags of a multi-process run are not all there.
    """
    asked = {"coordinator_address": flags.coordinator_address, "process_count": flags.process_count, "process_index": flags.process_index}
    given = {name for name, value in asked.items() if value is not None}
    if not given and not flags.multiprocess_gpu:
        return
    if given and given != asked.keys():
        absent = ", ".join(f"--{name}" for name in asked if name not in given)
        raise ValueError(f"a run of several processes needs all of --{', --'.join(asked)}; missing: {absent}")
    import jax

    join = functools.partial(
        jax.distributed.initialize,
        coordinator_address=flags.coordinator_address,
        num_processes=flags.process_count,
        process_id=flags.process_index,
    )
    if flags.initialization_timeout is None:
        join()
    else:
        join(initialization_timeout=flags.initialization_timeout)


def _is_ours(error: BaseException) -> bool:
    """Whether the library itself raised the error, so that its message is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    package = pathlib.Path(upcycle_jax.__file__).resolve().parent
    tasks = package.parent / "tasks"
    return bool(frames) and any(folder in pathlib.Path(frames[-1].filename).resolve().parents for folder in (package, tasks))


def run(
    name: str,
    argv: Sequence[str] | None,
    *,
    description: str,
    body: Callable[..., int | None],
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Runs a command: `body(flags, loaded_configuration)`.

    A bad configuration, a missing file and any other value that the library refuses are one message on standard error and exit code
    2; the environment variable UPCYCLE_JAX_TRACEBACK=1 shows the traceback instead. Other errors always show it.

    Args:
      name: the command's name.
      argv: words after the command's name; None for the process's own.
      description: what `--help` says first.
      body: does the work and returns the exit code, None standing for 0.
      extra: adds the command's own flags (see `flags.parse`).
    """
    flags = flags_lib.parse(name, argv, description=description, extra=extra)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow reads text only; what it says of missing GPUs is noise
    try:
        join_processes(flags)
        from upcycle_jax import config  # imports the rest of the library: after --help has answered

        loaded = config.load(flags.gin_file, flags.gin_bindings, flags.gin_search_paths)
        return body(flags, loaded) or 0
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not _is_ours(error):
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"upcycle_jax.{name}: error: {error}{notes}", file=sys.stderr)
        return 2
