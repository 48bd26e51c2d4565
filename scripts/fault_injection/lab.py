"""Where faults are injected: commands run in forked children, killed at a drawn moment, and judged.

A child is forked from a parent that has imported the library, so that a trial costs what the
command does and not what Python's imports do. The parent never starts a JAX backend.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CLEAN = (0, 2)
"""Exit codes of a command that did its work, or refused it in one line."""
LIMIT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
      code: exit code; -9 for a kill.
      text: what it printed, both streams.
      seconds: how long it ran.
    """

    code: int
    text: str
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1][:300]

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One trial: what was done, and what went wrong, if anything did."""

    trial: str
    problem: str = ""
    note: str = ""


class Lab:
    """A folder for trials, a random generator, and the way to run commands.

    Args:
      folder: everything is written below it.
      seed: of all draws.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("upcycle", "verify", "train", "eval", "infer", "convert", "check", "inspect"):
            importlib.import_module(f"upcycle_jax.{name}")
        # What the commands import late, so that children find it imported.
        for name in (
            "upcycle_jax.config",
            "upcycle_jax.surgery.convert_and_prove",
            "upcycle_jax.training.train",
            "upcycle_jax.data.cache.batches",
            "upcycle_jax.checkpoints.huggingface.writer",
        ):
            importlib.import_module(name)

    def start(
        self, command: str, argv: Sequence[str], log: pathlib.Path, cwd: pathlib.Path | None = None
    ) -> int:
        """Forks a child that runs `upcycle_jax.<command>` in a folder; returns its process id."""
        process = os.fork()
        if process:
            return process
        try:
            os.setsid()
            os.chdir(cwd or self.folder)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = _run(command, argv)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            code = 99
        os._exit(code)

    def run(
        self,
        command: str,
        *argv: str,
        kill_after: float | None = None,
        name: str = "log",
        cwd: pathlib.Path | None = None,
    ) -> Done:
        """Runs a command to its end, or kills it (SIGKILL) after so many seconds."""
        log = self.folder / f"{name}.txt"
        started = time.monotonic()
        process = self.start(command, argv, log, cwd)
        deadline = started + (LIMIT_SECONDS if kill_after is None else kill_after)
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            if time.monotonic() >= deadline:
                os.killpg(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                break
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        done = Done(code, log.read_text(errors="replace"), time.monotonic() - started)
        if done.has_traceback:  # The next trial writes over the log.
            shutil.copy2(log, self.folder / f"traceback-{time.time_ns()}.txt")
        return done

    def in_child(self, function: Callable[[], Any]) -> Any:
        """The result of a function that may start a JAX backend, computed in a child; JSON types.

        Raises:
          RuntimeError: the function failed; with its traceback.
        """
        read, write = os.pipe()
        process = os.fork()
        if not process:
            os.close(read)
            with os.fdopen(write, "w") as stream:
                try:
                    json.dump({"value": function()}, stream)
                except BaseException as error:
                    import traceback

                    traceback.print_exc()
                    json.dump({"error": f"{type(error).__name__}: {error}"}, stream)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            text = stream.read()
        os.waitpid(process, 0)
        answer = json.loads(text or '{"error": "the child died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def fresh(self, name: str) -> pathlib.Path:
        """An empty folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def _run(command: str, argv: Sequence[str]) -> int:
    """The command's exit code, as its process would have it."""
    try:
        return int(importlib.import_module(f"upcycle_jax.{command}").main(list(argv)) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def leaves(path: str | os.PathLike) -> dict[str, str]:
    """The checksum of every leaf of a checkpoint, by name: what a trial compares."""
    from upcycle_jax.checkpoints import open_checkpoint
    from upcycle_jax.checkpoints.checksums import checksum

    reader = open_checkpoint(path)
    return {name: checksum(reader.read(name)) for name in sorted(reader.specs())}


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def judged(outcomes: Iterator[Outcome], report: Callable[[str], None]) -> list[Outcome]:
    """Runs trials, reporting each problem at once and the rate now and then."""
    done: list[Outcome] = []
    started = time.monotonic()
    for outcome in outcomes:
        done.append(outcome)
        if outcome.problem:
            report(f"  PROBLEM {outcome.trial}: {outcome.problem}")
        if len(done) % 20 == 0:
            report(f"  {len(done)} trials, {(time.monotonic() - started) / len(done):.1f} s each")
    return done
