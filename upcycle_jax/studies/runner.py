"""Runs the cells of a sweep on this machine, several at a time, each as a process of its own."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from upcycle_jax import leases
from upcycle_jax.progress import Meter
from upcycle_jax.studies import state
from upcycle_jax.studies.sweep import Cell, Sweep

_log = logging.getLogger(__name__)

INTERRUPTED = state.INTERRUPTED
BAD_CONFIGURATION = 2
POLL_SECONDS = 0.2
LOG_LINES = 15


@dataclasses.dataclass(frozen=True)
class Failure:
    """A cell that did not finish.

    Attributes:
      cell: the cell.
      reason: in a few words.
      log: its log file, or None where it never started.
    """

    cell: Cell
    reason: str
    log: Path | None = None

    def text(self) -> str:
        """What a user needs: the reason, the last lines of the log, the command."""
        lines = [f"FAILED {self.cell.name}: {self.reason}"]
        if self.log is not None and self.log.is_file():
            tail = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            lines += [
                f"  last lines of {self.log}:",
                *(f"    {line}" for line in tail),
                f"  command: {self.cell.command_line(sys.executable)}",
            ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
      finished: cells that are finished, whoever ran them.
      failures: the others that were tried, or that wait for one that failed.
      interrupted: a signal ended the sweep.
    """

    finished: list[Cell]
    failures: list[Failure]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0, 1 where a cell failed, 75 where a signal ended the sweep."""
        return INTERRUPTED if self.interrupted else int(bool(self.failures))


@dataclasses.dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen
    log: IO[bytes]
    lock: int
    started: float


def try_lock(path: Path) -> int | None:
    """Takes the lock file, or returns None where somebody has it.

    The descriptor is handed to the cell's process: should the sweep be killed and the cell live on,
    the cell still has the lock, and a sweep that is started again waits for it instead of running
    it twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _trains_elsewhere(cell: Cell) -> bool:
    """Whether a training in the cell's folder seems to live: of a sweep on another machine, whose
    locks may not be seen here, or started by hand. A second one would be refused.
    """
    holder = leases.look(Path(cell.folder) / leases.TRAINING_LEASE)
    return cell.command == "train" and holder is not None and holder.seems_alive(time.time())


class Runner:
    """Runs cells in order, each after those that it needs.

    Args:
      sweep: the study.
      cells: those to run; what they need must be finished or among them.
      num_parallel: processes at a time.
      retries: how often a cell that dies is started again; it resumes from its checkpoint.
      environment: of the processes.
      further_flags: of every command, e.g. search paths of gin files.
      program: what runs a command's module.
      progress_period: seconds between lines of progress.
    """

    def __init__(
        self,
        sweep: Sweep,
        cells: Sequence[Cell],
        *,
        num_parallel: int = 1,
        retries: int = 1,
        environment: Mapping[str, str] | None = None,
        further_flags: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-m"),
        progress_period: float = 60.0,
    ):
        if num_parallel < 1:
            raise ValueError(
                f"num_parallel is {num_parallel}: at least one cell must run at a time"
            )
        self._sweep, self._root = sweep, Path(sweep.root)
        self._cells = {cell.name: cell for cell in cells}
        self._pending = list(cells)
        self._num_parallel, self._retries, self._period = num_parallel, retries, progress_period
        self._environment = dict(os.environ if environment is None else environment)
        self._environment.setdefault(
            "JAX_COMPILATION_CACHE_DIR", str(self._root / "compilation_cache")
        )
        self._environment |= {
            "UPCYCLE_JAX_INTERRUPTED_CODE": str(INTERRUPTED),
            "PYTHONUNBUFFERED": "1",
        }
        self._program, self._further = tuple(program), tuple(further_flags)
        self._running: dict[str, _Running] = {}
        self._finished: dict[str, Cell] = {}
        self._failures: dict[str, Failure] = {}
        self._tries: dict[str, int] = {}
        self._stop: str | None = None

    def run(self) -> Outcome:
        """Runs until every cell is finished, failed or blocked by one that failed.

        SIGINT and SIGTERM are handed to the cells, which save and end; then this returns.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        state.note(
            str(self._root),
            "sweep",
            machine=state.machine(),
            num_parallel=self._num_parallel,
        )
        meter = Meter(0, verb="trained", unit="steps", done=_trained(self._cells.values()))
        with self._signals():
            next_line = time.monotonic() + self._period
            while self._pending or self._running:
                self._collect()
                if self._stop and not self._running:
                    break
                if not self._stop:
                    self._start_what_can()
                if time.monotonic() >= next_line:
                    next_line = time.monotonic() + self._period
                    state.note(str(self._root), "load")
                    _log.info("%s", self._progress(meter))
                time.sleep(POLL_SECONDS)
        _log.info("%s", self._progress(meter))
        return Outcome(
            list(self._finished.values()),
            list(self._failures.values()),
            interrupted=bool(self._stop),
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        previous: dict[int, Any] = {}

        def hand_on(number: int, frame: Any) -> None:
            first = self._stop is None
            self._stop = signal.Signals(number).name
            _log.warning(
                "%s: the cells %s",
                self._stop,
                "save and end; once more ends them at once" if first else "are killed",
            )
            for running in self._running.values():
                running.process.send_signal(signal.SIGTERM if first else signal.SIGKILL)

        if threading.current_thread() is threading.main_thread():
            previous = {
                number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)
            }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_what_can(self) -> None:
        for cell in list(self._pending):
            if len(self._running) >= self._num_parallel:
                return
            lost = [name for name in cell.needs if name in self._failures]
            if lost:
                self._pending.remove(cell)
                self._failures[cell.name] = Failure(
                    cell, f"not run, because it needs {lost[0]}, which failed"
                )
                continue
            if any(name in self._cells and name not in self._finished for name in cell.needs):
                continue
            lock = try_lock(self._root / "locks" / cell.name)
            if lock is not None and _trains_elsewhere(cell):
                os.close(lock)
                lock = None
            if lock is None:
                continue  # another sweep, or what an earlier one left, runs it: look again later
            if state.is_finished(cell):
                os.close(lock)
                self._pending.remove(cell)
                self._finished[cell.name] = cell
                continue
            self._start(cell, lock)

    def _start(self, cell: Cell, lock: int) -> None:
        path = self._log_path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        line = [*self._program, f"upcycle_jax.{cell.command}", *cell.words, *self._further]
        log.write(f"$ {shlex.join(line)}\n".encode())
        log.flush()
        state.note(str(self._root), "start", cell=cell.name, from_step=state.step_reached(cell))
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment,
            pass_fds=(lock,),
            start_new_session=True,
        )
        self._pending.remove(cell)
        self._running[cell.name] = _Running(cell, process, log, lock, time.monotonic())
        _log.info("start %s", cell.name)

    def _collect(self) -> None:
        for name, running in list(self._running.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self._running[name]
            running.log.close()
            seconds = time.monotonic() - running.started
            state.note(str(self._root), "end", cell=name, code=code, seconds=round(seconds, 1))
            self._judge(running.cell, code)
            os.close(running.lock)

    def _judge(self, cell: Cell, code: int) -> None:
        if code == 0:
            state.mark_finished(cell)
        if code == 0 and state.is_finished(cell):
            self._finished[cell.name] = cell
            _log.info("done %s", cell.name)
            return
        if self._stop:
            self._pending.append(cell)
            return
        self._tries[cell.name] = self._tries.get(cell.name, 0) + 1
        reason = f"ended with code {code}" if code else "ended without its last checkpoint"
        again = code != BAD_CONFIGURATION and self._tries[cell.name] <= self._retries
        _log.warning(
            "%s %s%s", cell.name, reason, "; starting it again from its checkpoint" if again else ""
        )
        if again:
            self._pending.insert(0, cell)
        else:
            self._failures[cell.name] = Failure(cell, reason, self._log_path(cell))

    def _log_path(self, cell: Cell) -> Path:
        return self._root / "logs" / f"{cell.name}.log"

    def _progress(self, meter: Meter) -> str:
        counts = (
            f"{len(self._finished)}/{len(self._cells)} cells done, {len(self._running)} running"
        )
        if self._failures:
            counts += f", {len(self._failures)} failed"
        elsewhere = len(self._pending) if not self._running and not self._stop else 0
        if elsewhere:
            counts += f", {elsewhere} waiting for another process that runs them"
        cells = [cell for cell in self._cells.values() if cell.name not in self._failures]
        meter.total = sum(cell.end_step - cell.start_step for cell in cells)
        meter.reach(_trained(cells))
        return f"{counts}, {meter.text()}"


def _trained(cells: Iterable[Cell]) -> int:
    return sum(state.step_reached(cell) - cell.start_step for cell in cells)
