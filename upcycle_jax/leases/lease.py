"""One writer per folder, held by the living, on local and shared file systems and in buckets.

A writer takes a lease before it touches anything: a small file that says who it is, with a random
token, renewed by a thread every `HEARTBEAT_SECONDS`. Beside it lies a file that is locked with
`flock`. A second start is refused where the holder lives, and takes over where it does not:

* The lock is held: refused.
* The holder is a process that can be looked at from here (same host, boot and process namespace):
  its id and start time decide, at once.
* The file system belongs to this machine alone and the lock could be taken: the holder is dead,
  whatever container it ran in. Taken over at once.
* Otherwise (another host, a bucket) the lease is watched for `LEASE_SECONDS`: a heartbeat in that
  time means a living holder, none means a dead one. Only the watcher's own clock counts, so clocks
  that differ do no harm; the price is that a job that comes back on another host waits that long.

A take-over on a shared file system, and any start in a bucket, is decided by who writes last: each
writes its token, waits `settle` seconds and reads it back, so that of several starts at once one
remains. One that stood still between looking and writing waits long enough for every other holder
to look again. A holder that has not renewed for `DOUBT_SECONDS` (a paused machine, a network that
was away) looks before it writes, and stops with `LeaseLostError` where another has taken over.

What it guarantees: as long as storage shows to all what was written `settle` / 2 seconds ago, no
process begins a write after another one has got the lease, unless it stands still exactly between
`require` and the write. What it does not: a write that was handed to the storage earlier can still
arrive, since neither file systems nor `epath` can fence a process off; and a lease file that
somebody removes by hand protects nothing until the next heartbeat.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from upcycle_jax.leases.places import Place, Stored, place_of
from upcycle_jax.leases.process_record import is_alive, this_process

_log = logging.getLogger(__name__)

TRAINING_LEASE = ".training_lease.json"
"""The lease's file in MODEL_DIR, while a training runs."""

HEARTBEAT_SECONDS = 15.0
LEASE_SECONDS = 60.0
"""A lease without a heartbeat for this long has ended: four were missed."""
DOUBT_SECONDS = 1.5 * HEARTBEAT_SECONDS
"""A holder that has not renewed for this long looks before it writes."""
LOCK_PATIENCE_SECONDS = 3.0
"""How long a lock may outlive its holder, e.g. in child processes that are about to end."""
WATCH_SECONDS = 1.0


class InUseError(ValueError):
    """Another process that lives writes there."""


class LeaseLostError(ValueError):
    """The lease of this process was taken over: it must not write any more."""


class Clock:
    """The time, as far as leases need it."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def steady(self) -> float:
        """Seconds that go on while the machine sleeps."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease, as it was found.

    Attributes:
      record: host, pid, since, ...; empty where the lease cannot be read.
      stamp: changes with every heartbeat.
      renewed: seconds since the epoch of the last heartbeat.
    """

    record: Mapping[str, Any]
    stamp: str
    renewed: float

    @property
    def token(self) -> Any:
        """What tells this holder from every other."""
        return self.record.get("token")

    def is_alive(self) -> bool | None:
        """Whether its process runs; None where that cannot be seen from here."""
        return is_alive(self.record)

    def silence(self, now: float) -> float:
        """Seconds since the last heartbeat, by two clocks where it runs on another machine."""
        return max(0.0, now - self.renewed)

    def seems_alive(self, now: float) -> bool:
        """Whether its process runs or, where that cannot be seen, there was a heartbeat lately."""
        alive = self.is_alive()
        return abs(now - self.renewed) < LEASE_SECONDS if alive is None else alive

    def describe(self, now: float) -> str:
        """`process 4711 on host node7, since 2026-01-31T12:00:00+00:00, last heartbeat 4 s ago`."""
        if not self.record:
            return (
                "a process whose record cannot be read, last heartbeat"
                f" {self.silence(now):.0f} s ago"
            )
        return (
            f"process {self.record.get('pid')} on host {self.record.get('host')}, since"
            f" {self.record.get('since')}, last heartbeat {self.silence(now):.0f} s ago"
        )


def _holder(stored: Stored) -> Holder:
    try:
        record = json.loads(stored.text)
    except (ValueError, RecursionError):
        record = {}
    return Holder(record if isinstance(record, dict) else {}, stored.stamp, stored.renewed)


class Lease:
    """The right to write somewhere. Use `hold`.

    Args:
      place: where it is kept.
      what: what it is for, e.g. 'MODEL_DIR /data/run', for messages.
      remedy: what else the user can do than wait, e.g. 'choose another MODEL_DIR'.
      clock: the time.
    """

    def __init__(self, place: Place, *, what: str, remedy: str, clock: Clock | None = None):
        self._place, self._what, self._remedy = place, what, remedy
        self._clock = clock or Clock()
        self._token = secrets.token_hex(16)
        since = datetime.datetime.fromtimestamp(self._clock.now(), datetime.UTC)
        self._text = json.dumps(
            {
                **this_process(),
                "since": since.isoformat(timespec="seconds"),
                "token": self._token,
                "heartbeat_seconds": HEARTBEAT_SECONDS,
                "lease_seconds": LEASE_SECONDS,
            }
        )
        self._renewed = 0.0
        self._sure = False  # Nobody else can have it, for as long as the lock is held.
        self._lost: str | None = None
        self._one_at_a_time = threading.RLock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    # Taking.

    def take(self) -> None:
        """Takes the lease; waits where it must be seen whether the holder lives.

        Raises:
          InUseError: it does.
          OSError: the place cannot be written to.
        """
        try:
            self._take(self._lock())
        except BaseException:
            self._place.unlock()
            raise

    def _lock(self) -> bool:
        """Whether the lock is ours; False where there are none, or that of a dead process was
        broken.
        """
        began = self._clock.steady()
        while (locked := self._place.lock()) is False:
            found = self._found()
            alive = found.is_alive() if found is not None else None
            if alive:
                raise self._in_use(found)
            if self._clock.steady() - began > LOCK_PATIENCE_SECONDS:
                if alive is None:
                    raise self._in_use(found)
                self._place.break_lock()  # A child of the dead process has it.
                return False
            self._clock.sleep(0.2)
        return bool(locked)

    def _take(self, locked: bool) -> None:
        decided = locked and self._place.lock_decides
        while True:
            looked = self._clock.steady()
            found = self._found()
            if found is None:
                began = self._clock.steady()
                if not self._place.create(self._text):
                    continue
                decided_now = decided or self._place.exclusive
            else:
                alive = found.is_alive()
                if alive:
                    raise self._in_use(found)
                if alive is None and not decided:
                    if not self._watch(found):
                        continue
                    looked = self._clock.steady()
                    if not self._is_still(found):
                        continue
                _log.info("%s: taking over from %s", self._what, found.describe(self._clock.now()))
                began = self._clock.steady()
                self._place.replace(self._text)
                decided_now = decided
            if not decided_now:
                winner = self._settled(since=looked)
                if winner is None or winner.token != self._token:
                    raise self._in_use(winner)
            self._renewed, self._sure = began, decided
            return

    def _watch(self, found: Holder) -> bool:
        """Waits until the lease has ended; False where another process was faster.

        Raises:
          InUseError: there was a heartbeat.
        """
        _log.warning(
            "%s: held by %s, and whether that process lives cannot be seen from here: waiting for"
            " a heartbeat, at most %.0f s",
            self._what,
            found.describe(self._clock.now()),
            LEASE_SECONDS,
        )
        began = self._clock.steady()
        while self._clock.steady() - began <= LEASE_SECONDS:
            self._clock.sleep(WATCH_SECONDS)
            now = self._found()
            if now is None or now.token != found.token:
                return False
            if now.stamp != found.stamp:
                raise self._in_use(now)
        return True

    def _is_still(self, found: Holder) -> bool:
        now = self._found()
        return now is not None and (now.token, now.stamp) == (found.token, found.stamp)

    def _settled(self, *, since: float) -> Holder | None:
        """Who holds the lease when all that wrote at once have written.

        Args:
          since: when this process looked before it wrote. Where that is long ago another one may
            hold the lease since then: it gets the time to look again, and to stop.
        """
        settle = self._place.settle
        slow = self._clock.steady() - since > settle / 2
        self._clock.sleep(DOUBT_SECONDS + settle if slow else settle)
        return self._found()

    def _found(self) -> Holder | None:
        stored = self._place.read()
        return None if stored is None else _holder(stored)

    def _in_use(self, found: Holder | None) -> InUseError:
        who = (
            found.describe(self._clock.now())
            if found is not None
            else f"a process that has the lock {self._place.name}.lock"
        )
        elsewhere = found is not None and found.is_alive() is None
        return InUseError(
            f"{self._what} is in use: {who}. Nothing was changed. Wait until it ends, stop it, or"
            f" {self._remedy}"
            + (
                f"; if it is dead, the same command takes over {LEASE_SECONDS:.0f} s after its last"
                " heartbeat"
                if elsewhere
                else ""
            )
        )

    # Holding.

    def start(self) -> None:
        """Starts the heartbeat."""
        self._thread = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS) and self._lost is None:
            self.renew()

    def renew(self) -> None:
        """One heartbeat: looks whether the lease is still ours, and renews it. A place that cannot
        be reached is tried again by the next one.
        """
        with self._one_at_a_time:
            try:
                looked = self._clock.steady()
                found = self._found()
                if found is None and self._place.create(self._text):  # Somebody removed the file.
                    found = self._found()
                began = self._clock.steady()
                if found is not None and found.token == self._token:
                    self._place.renew(self._text)
                    if self._has_ended():  # Another start may be about to take over, or has.
                        found = self._settled(since=looked)
            except OSError as error:
                _log.warning("%s: the lease could not be renewed: %s", self._what, error)
                return
            if found is None or found.token != self._token:
                self._lose(found)
            else:
                self._renewed = began

    def _silence(self) -> float:
        return self._clock.steady() - self._renewed

    def _has_ended(self) -> bool:
        """Whether the lease was not renewed in time, so that others may take it."""
        return not self._sure and self._silence() > LEASE_SECONDS

    def _lose(self, found: Holder | None) -> None:
        who = found.describe(self._clock.now()) if found is not None else "nobody known"
        self._lost = (
            f"{self._what} was taken over by {who}, because this process (or its storage) stood"
            f" still for more than {LEASE_SECONDS:.0f} s, or its lease was removed: it stops, and"
            " writes nothing more"
        )

    @property
    def is_lost(self) -> bool:
        """Whether it is known that another process has taken over."""
        return self._lost is not None

    def require(self, *, look: bool = False) -> None:
        """Call this before writing.

        Args:
          look: read the lease now, instead of relying on the last heartbeat.

        Raises:
          LeaseLostError: another process has taken over, or may have.
        """
        if self._lost is None and (look or self._silence() > DOUBT_SECONDS):
            self.renew()
        if self._lost is None and self._has_ended():
            self._lost = (
                f"{self._what}: the lease could not be renewed for {self._silence():.0f} s, and"
                " another process may have taken over: this one stops, and writes nothing more"
            )
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Gives the lease back. One that was lost is left to its new holder."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            found = self._found()
            if found is not None and found.token == self._token and not self._has_ended():
                self._place.remove()
        self._place.unlock()


@contextlib.contextmanager
def hold(file: os.PathLike | str, *, what: str, remedy: str) -> Iterator[Lease]:
    """Holds the lease in `file` (local, shared or gs://) while entered; its folder is made.

    Args:
      file: of the lease; a file of that name and `.lock` lies beside it meanwhile. Both go when it
        is given back, and a folder that was made for them if nothing else is in it.
      what: what it is for, e.g. 'MODEL_DIR /data/run'.
      remedy: what else the user can do than wait, e.g. 'choose another MODEL_DIR'.

    Raises:
      InUseError: another process that lives holds it.
      ValueError: the folder cannot be written to.
    """
    try:
        lease = Lease(place_of(file), what=what, remedy=remedy)
        lease.take()
    except OSError as error:
        raise ValueError(f"{what} cannot be written to ({error}): {remedy} or free it") from error
    try:
        lease.start()
        yield lease
    finally:
        lease.release()


def look(file: os.PathLike | str) -> Holder | None:
    """Who holds the lease in `file`, if anybody does; writes nothing."""
    with contextlib.suppress(OSError):
        stored = place_of(file).read()
        return None if stored is None else _holder(stored)
    return None


def refuse_if_held(file: os.PathLike | str, *, what: str, remedy: str) -> str | None:
    """Looks whether a start would be refused; writes nothing and waits for nothing.

    Returns:
      What is known of a holder that cannot be seen to live from here, or None.

    Raises:
      InUseError: a process that lives holds the lease.
    """
    found = look(file)
    if found is None or found.is_alive() is False:
        return None
    who = found.describe(time.time())
    if found.seems_alive(time.time()):
        raise InUseError(f"{what} is in use: {who}. Wait until it ends, stop it, or {remedy}")
    return (
        f"the lease of {who} has ended: a start watches it for {LEASE_SECONDS:.0f} s and takes over"
    )
