"""Several machines that start, freeze and die over one storage, in an order that a test chooses.
Not a test module.

Each actor is a thread, and one of them runs at a time: wherever an actor touches the storage or
sleeps, it waits until the world lets it go on. Time passes only when all of them sleep.
"""

import threading

from upcycle_jax.leases.lease import Clock
from upcycle_jax.leases.places import Stored


class Killed(BaseException):
    """Ends an actor's thread at the end of a test."""


class World:
    """The storage, the time and the actors."""

    def __init__(self, *, settle=2.0, exclusive=True):
        self.now, self.settle, self.exclusive = 1000.0, settle, exclusive
        self.actors = []
        self.lease = None  # text, number of the renewal, time
        self.renewals = 0
        self.events = []
        self.writes = []  # who wrote, in order
        self._turn = threading.Semaphore(0)

    def actor(self, name, script, *, start=0.0, skew=0.0):
        actor = Actor(self, name, script, start=start, skew=skew)
        self.actors.append(actor)
        return actor

    def run(self, choose, *, events=()):
        """Runs until every actor is done or dead.

        Args:
          choose: takes the names of those that can go on, returns the place of the one that does.
          events: (time, function of the world); `self.events` takes more of them meanwhile.
        """
        pending = self.events = list(events)
        try:
            for _ in range(100_000):
                pending.sort(key=lambda event: event[0])
                while pending and pending[0][0] <= self.now:
                    pending.pop(0)[1](self)
                active = [actor for actor in self.actors if not (actor.done or actor.dead)]
                if not active:
                    return
                ready = [a for a in active if a.wake <= self.now and not a.frozen]
                if not ready:
                    times = [a.wake for a in active if not a.frozen] + [at for at, _ in pending[:1]]
                    self.now = max(self.now, min(times))
                    continue
                actor = ready[choose([a.name for a in ready])]
                actor.go.release()
                self._turn.acquire()
            raise AssertionError("the world does not come to an end")
        finally:
            for actor in self.actors:
                while not actor.done:
                    actor.dead = True
                    actor.go.release()
                    self._turn.acquire()
                actor.thread.join()

    def by_name(self, name):
        return next(actor for actor in self.actors if actor.name == name)


class Actor:
    """One machine with one process: `script(actor)` is what it does."""

    def __init__(self, world, name, script, *, start, skew):
        self.world, self.name, self.skew = world, name, skew
        self.wake = world.now + start
        self.done = self.dead = self.frozen = False
        self.outcome = None
        self.go = threading.Semaphore(0)
        self.clock, self.place = ActorClock(self), ActorPlace(self)
        self.thread = threading.Thread(target=self._run, args=(script,), name=name, daemon=True)
        self.thread.start()

    def _run(self, script):
        self.go.acquire()
        try:
            if not self.dead:
                self.outcome = script(self)
        except Killed:
            pass
        except ValueError as error:
            self.outcome = error
        finally:
            self.done = True
            self.world._turn.release()

    def pause(self, seconds=0.0):
        """Lets the others go on."""
        self.wake = self.world.now + seconds
        self.world._turn.release()
        self.go.acquire()
        if self.dead:
            raise Killed


class ActorClock(Clock):
    """The time of a machine whose clock is wrong by `skew`."""

    def __init__(self, actor):
        self._actor = actor

    def now(self):
        return self._actor.world.now + self._actor.skew

    def steady(self):
        return self._actor.world.now + 7 * self._actor.skew

    def sleep(self, seconds):
        self._actor.pause(seconds)


class ActorPlace:
    """The storage as one machine sees it: without locks, as on a file system whose `flock` is each
    machine's own, and without exclusive creation, as in a bucket, where the world says so.
    """

    name, lock_decides = "the lease", False

    def __init__(self, actor):
        self._actor = actor
        self.settle, self.exclusive = actor.world.settle, actor.world.exclusive

    def lock(self):
        return None

    def break_lock(self):
        raise AssertionError("there is no lock")

    def unlock(self):
        pass

    def read(self):
        self._actor.pause()
        lease = self._actor.world.lease
        return None if lease is None else Stored(lease[0], str(lease[1]), lease[2])

    def create(self, text):
        self._actor.pause()
        if self._actor.world.lease is not None:
            return False
        if not self.exclusive:
            self._actor.pause()
        self._write(text)
        return True

    def replace(self, text):
        self._actor.pause()
        self._write(text)

    def renew(self, text):
        self._actor.pause()
        world = self._actor.world
        if self.exclusive and world.lease is not None:  # as utime: whatever is there keeps its text
            text = world.lease[0]
        self._write(text)

    def _write(self, text):
        world = self._actor.world
        world.renewals += 1
        world.lease = (text, world.renewals, self._actor.clock.now())

    def remove(self):
        self._actor.pause()
        self._actor.world.lease = None
