"""One writer per folder: two starts, dead and frozen holders, any order of events."""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_jax import leases
from upcycle_jax.leases import lease as lease_lib
from upcycle_jax.leases import places
from upcycle_jax.leases.lease import InUseError, Lease, LeaseLostError
from upcycle_jax.leases.process_record import is_alive, this_process

_spec = importlib.util.spec_from_file_location(
    "worlds", pathlib.Path(__file__).with_name("worlds.py")
)
worlds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worlds)

HOLD = {"what": "MODEL_DIR run", "remedy": "choose another folder"}


@pytest.fixture
def each_actor_is_a_host(monkeypatch):
    monkeypatch.setattr(
        lease_lib, "this_process", lambda: {"host": threading.current_thread().name, "pid": 1}
    )


def training(seconds):
    """Holds the lease for some time, writes every 5 s, renews every 15 s."""

    def script(actor):
        lease = Lease(actor.place, clock=actor.clock, **HOLD)
        lease.take()
        for i in range(seconds // 5):
            lease.require()
            actor.world.writes.append(actor.name)
            actor.clock.sleep(5)
            if i % 3 == 2:
                lease.renew()
        lease.require(look=True)
        lease.release()
        return "done"

    return script


def writers(world):
    """Who wrote, each turn once."""
    return [name for i, name in enumerate(world.writes) if i == 0 or world.writes[i - 1] != name]


def first(names):
    return 0


# Any order of events.


def frozen(name, value):
    def event(world):
        world.by_name(name).frozen = value

    return event


def killed(name):
    def event(world):
        world.by_name(name).dead = True

    return event


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    exclusive=st.booleans(),
    starts=st.lists(st.sampled_from([0, 0, 1, 30, 61, 64, 90]), min_size=3, max_size=3),
    skews=st.lists(st.sampled_from([-3600, 0, 5]), min_size=3, max_size=3),
    stops=st.lists(
        st.tuples(
            st.integers(0, 100), st.sampled_from("abc"), st.sampled_from([2, 20, 50, 62, 100, 1e4])
        ),
        max_size=4,
    ),
)
def test_in_any_order_of_events_one_writes_at_a_time(seed, exclusive, starts, skews, stops):
    with pytest.MonkeyPatch.context() as patch:
        each_actor_is_a_host.__wrapped__(patch)
        world = worlds.World(exclusive=exclusive)
        for name, start, skew in zip("abc", starts, skews, strict=True):
            world.actor(name, training(120), start=start, skew=skew)
        events = []
        for at, name, duration in stops:
            if duration == 1e4:
                events.append((world.now + at, killed(name)))
            else:
                events.append((world.now + at, frozen(name, True)))
                events.append((world.now + at + duration, frozen(name, False)))
        random_ = random.Random(seed)
        world.run(lambda names: random_.randrange(len(names)), events=events)
    turns = writers(world)
    assert len(turns) == len(set(turns)), f"two wrote by turns: {turns}"
    for actor in world.actors:
        assert actor.dead or actor.outcome == "done" or "MODEL_DIR run" in str(actor.outcome)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_of_several_starts_at_once_exactly_one_goes_on(each_actor_is_a_host, exclusive, seed):
    world = worlds.World(exclusive=exclusive)
    for name in "abcd":
        world.actor(name, training(40))
    random_ = random.Random(seed)
    world.run(lambda names: random_.randrange(len(names)))
    outcomes = [actor.outcome for actor in world.actors]
    assert outcomes.count("done") == 1 and len(writers(world)) == 1
    refused = [outcome for outcome in outcomes if outcome != "done"]
    assert all(isinstance(outcome, InUseError) for outcome in refused)
    assert all(f"on host {writers(world)[0]}" in str(outcome) for outcome in refused)


@pytest.mark.parametrize("seconds", [3, 30])
@pytest.mark.parametrize("steps", range(1, 8))
def test_a_start_that_stands_still_between_looking_and_writing(
    each_actor_is_a_host, steps, seconds
):
    """In a bucket, where nothing else decides than who writes last."""
    world = worlds.World(exclusive=False)
    slow = world.actor("slow", training(60))
    world.actor("quick", training(60), start=0.5)
    picked = [0]

    def choose(names):
        picked[0] += names[0] == "slow"
        if picked[0] == steps and not slow.frozen and names[0] == "slow":
            slow.frozen = True  # after the step that it is allowed now
            world.events.append((world.now + seconds, frozen("slow", False)))
        return 0

    world.run(choose)
    assert writers(world) in (["quick"], ["slow"], ["quick", "slow"])
    assert [actor.outcome == "done" for actor in world.actors].count(True) == 1


def test_a_lease_of_a_dead_host_ends_and_one_of_two_that_wait_takes_over(each_actor_is_a_host):
    world = worlds.World()
    world.actor("a", training(100))
    world.actor("b", training(40), start=20, skew=-3600)  # the clocks of hosts may differ
    world.actor("c", training(40), start=21)
    world.run(first, events=[(world.now + 18, killed("a"))])
    done = [actor.name for actor in world.actors if actor.outcome == "done"]
    assert len(done) == 1 and writers(world) == ["a", *done]


def test_a_living_holder_on_another_host_is_found_out_by_its_heartbeat(each_actor_is_a_host):
    world = worlds.World()
    world.actor("a", training(100))
    late = world.actor("b", training(40), start=17, skew=86_400)  # by its clock a is long silent
    times = []
    world.actor("timer", lambda actor: actor.clock.sleep(200))
    world.run(lambda names: (times.append(world.now) if late.done else None) or 0)
    assert isinstance(late.outcome, InUseError) and writers(world) == ["a"]
    assert "process 1 on host a, since" in str(late.outcome)
    assert "takes over 60 s after its last heartbeat" in str(late.outcome)
    assert times[0] <= 1000 + 17 + lease_lib.HEARTBEAT_SECONDS + lease_lib.WATCH_SECONDS + 5


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_holder_that_was_frozen_stops_when_it_finds_its_lease_taken(
    each_actor_is_a_host, exclusive
):
    world = worlds.World(exclusive=exclusive)
    world.actor("a", training(100))
    world.actor("b", training(40), start=20)
    world.run(
        first, events=[(world.now + 18, frozen("a", True)), (world.now + 90, frozen("a", False))]
    )
    assert isinstance(world.by_name("a").outcome, LeaseLostError)
    assert "taken over by process 1 on host b" in str(world.by_name("a").outcome)
    assert world.by_name("b").outcome == "done" and writers(world) == ["a", "b"]


def test_a_holder_that_was_frozen_goes_on_where_nobody_else_came(each_actor_is_a_host):
    world = worlds.World()
    world.actor("a", training(100))
    world.run(
        first, events=[(world.now + 18, frozen("a", True)), (world.now + 500, frozen("a", False))]
    )
    assert world.by_name("a").outcome == "done"


# Real files and processes.


def test_while_it_is_held_others_are_refused_and_afterwards_no_trace_is_left(tmp_path):
    file = tmp_path / "new" / "run" / ".lease.json"
    with leases.hold(file, **HOLD) as lease:
        lease.require(look=True)
        before = {path: path.read_bytes() for path in file.parent.iterdir()}
        with (
            pytest.raises(InUseError, match=rf"MODEL_DIR run is in use: process {os.getpid()} on"),
            leases.hold(file, **HOLD),
        ):
            pass
        with pytest.raises(InUseError, match=r"Wait until it ends, stop it, or choose another"):
            leases.refuse_if_held(file, **HOLD)
        assert {path: path.read_bytes() for path in file.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == [] and leases.look(file) is None
    assert leases.refuse_if_held(file, **HOLD) is None


HOLDER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from upcycle_jax import leases
with leases.hold(sys.argv[2], what="MODEL_DIR run", remedy="choose another folder") as lease:
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lease in `tmp_path / 'lease.json'`."""
    root = str(pathlib.Path(leases.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, root, str(tmp_path / "lease.json")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("local", [True, False])
def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path, holder, monkeypatch, local):
    """On a shared file system the process decides, on a local one the lock does too."""
    monkeypatch.setattr(places, "file_system_type", lambda folder: "ext4" if local else "nfs4")
    monkeypatch.setattr(places, "SHARED_SETTLE_SECONDS", 0.01)
    file = tmp_path / "lease.json"
    with (
        pytest.raises(InUseError, match=f"process {holder.pid} on host"),
        leases.hold(file, **HOLD),
    ):
        pass
    holder.kill()
    holder.wait()
    assert is_alive(json.loads(file.read_text())) is False
    monkeypatch.setattr(Lease, "_watch", lambda *_: pytest.fail("it waited"))
    with leases.hold(file, **HOLD) as lease:
        lease.require(look=True)
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_on_a_local_disk_the_lock_tells_that_another_container_is_dead(tmp_path, monkeypatch):
    file = tmp_path / "lease.json"
    other = this_process() | {"pid_namespace": "pid:[1]", "host": "container", "token": "x"}
    file.write_text(json.dumps(other))
    monkeypatch.setattr(Lease, "_watch", lambda *_: pytest.fail("it waited"))
    monkeypatch.setattr(places, "file_system_type", lambda folder: "overlay")
    with leases.hold(file, **HOLD):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_lock_that_a_child_of_the_dead_holder_keeps_is_broken(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lease_lib, "LOCK_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(places, "SHARED_SETTLE_SECONDS", 0.01)
    file = tmp_path / "lease.json"
    record = file.read_text()
    child = places.FileSystem(file)
    holder.kill()
    holder.wait()
    assert child.lock()  # as a process that was forked from it would have it
    with leases.hold(file, **HOLD) as lease:
        assert file.read_text() != record
        lease.require(look=True)


def test_a_lease_that_was_stolen_stops_its_holder_and_stays_with_the_thief(tmp_path):
    file = tmp_path / "lease.json"
    with leases.hold(file, **HOLD) as lease:
        file.write_text(json.dumps({"host": "thief", "pid": 7, "since": "now", "token": "x"}))
        lease.require()  # between heartbeats it does not look
        with pytest.raises(LeaseLostError, match=r"taken over by process 7 on host thief, since"):
            lease.require(look=True)
        assert lease.is_lost
    assert json.loads(file.read_text())["host"] == "thief"


def test_a_lease_file_that_somebody_removed_comes_back(tmp_path):
    file = tmp_path / "lease.json"
    with leases.hold(file, **HOLD) as lease:
        file.unlink()
        lease.require(look=True)
        assert file.exists()


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b'{"pid": "x"}', b"[" * 10_000])
def test_a_damaged_lease_is_taken_over_on_a_local_disk(tmp_path, monkeypatch, content):
    monkeypatch.setattr(places, "file_system_type", lambda folder: "ext4")
    file = tmp_path / "lease.json"
    file.write_bytes(content)
    assert leases.look(file).is_alive() is None
    with leases.hold(file, **HOLD):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(ValueError, match=r"MODEL_DIR run cannot be written to .*choose another"),
        leases.hold(tmp_path / "file" / "run" / "lease.json", **HOLD),
    ):
        pass


def test_a_bucket_keeps_a_lease_too(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "BUCKET_SETTLE_SECONDS", 0.01)
    place = places.Bucket(tmp_path / "lease.json")
    lease = Lease(place, **HOLD)
    lease.take()
    before = place.read()
    lease.renew()
    assert place.read().text == before.text and place.read().stamp != before.stamp
    with pytest.raises(InUseError, match="is in use"):
        Lease(places.Bucket(tmp_path / "lease.json"), **HOLD).take()
    lease.release()
    assert not (tmp_path / "lease.json").exists()


def test_the_file_system_of_a_folder_that_is_not_there_is_that_of_its_parent(tmp_path):
    here = places.file_system_type(tmp_path)
    assert here is None or here == places.file_system_type(tmp_path / "a" / "b")
    assert places.file_system_type(pathlib.Path("/proc")) in ("proc", None)
