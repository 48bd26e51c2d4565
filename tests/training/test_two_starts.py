"""Two starts in one MODEL_DIR, a start after another run's, and a disk that fills."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import time

import pytest
from etils import epath

from upcycle_jax import leases
from upcycle_jax.checkpoints import manager as manager_lib
from upcycle_jax.studies import run_list
from upcycle_jax.training import holding, manifest, metric_writers, prepare, set_aside
from upcycle_jax.training.config import CheckpointConfig, SaveCheckpointConfig
from upcycle_jax.training.full_disk import DiskFullError, reason_of
from upcycle_jax.training.train import Train


def starter(bags, folder):
    """`train` of a few steps in `folder`, with a save every two."""

    def run(name="run", *, steps=4, dry_run=False, **kwargs):
        arguments = {
            "model": bags.Model(),
            "model_dir": folder / name,
            "train_dataset_cfg": bags.Dataset(),
            "checkpoint_cfg": CheckpointConfig(save=SaveCheckpointConfig(period=2)),
            "partitioner": bags.one_device,
            "trainer": bags.trainer(),
            "total_steps": steps,
            "stats_period": 1,
        }
        return Train(**arguments | kwargs).run(dry_run=dry_run)

    return run


@pytest.fixture
def start(bags, tmp_path):
    return starter(bags, tmp_path)


@pytest.fixture(scope="module")
def begun(bags, tmp_path_factory):
    """MODEL_DIR of a run of two steps. Only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    starter(bags, folder)(steps=2)
    return folder / "run"


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# One writer.


def test_a_second_start_is_refused_before_it_touches_anything(start, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    half = folder / "checkpoint_4.orbax-checkpoint-tmp-7"  # the save under way of the first
    half.mkdir()
    (half / "data").write_text("half")
    with holding.hold_model_dir(folder):
        before = content(folder)
        with pytest.raises(leases.InUseError, match=rf"is in use: process {os.getpid()} on host"):
            start()
        with pytest.raises(ValueError, match="is in use: process"):
            holding.training_in(folder)
        assert content(folder) == before
        assert start(dry_run=True).step == 2
        (status,) = run_list.list_runs(folder)
        assert status.state == "finished"
    assert holding.training_in(folder) is None
    assert start().step == 4 and not half.exists()
    assert not list(folder.glob(".training_lease*"))


def test_a_run_that_went_on_while_this_one_waited_is_looked_at_again(
    start, begun, tmp_path, monkeypatch
):
    shutil.copytree(begun, tmp_path / "other")
    real = holding.hold_model_dir

    def slow_hold(folder):
        (tmp_path / "other").rename(tmp_path / "run")  # what another host wrote in that time
        return real(folder)

    monkeypatch.setattr(holding, "hold_model_dir", slow_hold)
    result = start()
    assert (result.start, result.step) == ("resume", 4)
    assert steps_of(tmp_path / "run" / "train" / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_run_whose_lease_is_stolen_writes_nothing_more(start, tmp_path, bags):
    folder = tmp_path / "run"
    seen = []

    class Stolen(bags.Dataset):
        def batch(self, k):
            if k == 3:
                thief = {"host": "thief", "pid": 7, "since": "now", "token": "x"}
                (folder / leases.TRAINING_LEASE).write_text(json.dumps(thief))
                time.sleep(0.2)  # for the save of step 2
                seen.append(content(folder))
            return super().batch(k)

    with pytest.raises(leases.LeaseLostError, match=r"taken over by process 7 on host thief"):
        start(steps=8, train_dataset_cfg=Stolen(), stats_period=100)
    after = content(folder)
    assert {path for path in after if "checkpoint_4" in str(path)} == set()
    assert after[folder / "manifest.json"] == seen[0][folder / "manifest.json"]  # not 'failed'
    assert json.loads((folder / leases.TRAINING_LEASE).read_text())["host"] == "thief"


# A start after another run's.


def test_rows_of_a_run_whose_checkpoints_are_gone_are_set_aside(start, tmp_path, caplog):
    start(steps=6)
    folder = tmp_path / "run"
    for path in folder.glob("checkpoint_*"):
        epath.Path(path).rmtree()
    (folder / "wandb_run_id.txt").write_text("old")
    start(steps=4)
    assert "HOLDS AN EARLIER RUN WITHOUT A CHECKPOINT" in caplog.text
    train_folder = folder / "train"
    assert steps_of(train_folder / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(train_folder / set_aside.ROWS_FILE) == [1, 2, 3, 4, 5, 6]
    assert len(list(train_folder.glob("*tfevents*"))) == 1
    assert len(list(train_folder.glob("events_set_aside.*"))) == 1
    assert len(manifest.read(folder)["starts"]) == 1
    entry = json.loads((folder / set_aside.MANIFESTS_FILE).read_text())
    assert entry["manifest"]["step"] == 6 and entry["wandb_run_id"] == "old"
    (status,) = run_list.list_runs(folder)
    assert (status.step, status.total_steps) == (4, 4)


def test_a_run_that_falls_back_shows_no_step_twice(start, tmp_path):
    start(steps=6)
    folder = tmp_path / "run"
    epath.Path(folder / "checkpoint_6").rmtree()
    with (folder / "train" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "wall_ti')  # torn
    result = start(steps=8)
    assert result.start == "resume"
    assert steps_of(folder / "train" / "metrics.jsonl") == list(range(1, 9))
    aside = (folder / "train" / set_aside.ROWS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside[:-1]] == [5, 6] and "wall_ti" in aside[-1]
    assert [entry["step"] for entry in manifest.read(folder)["starts"]] == [0, 4]


def test_nothing_is_set_aside_where_a_run_goes_on_from_its_end(start, tmp_path):
    start(steps=4)
    start(steps=6)
    assert not list((tmp_path / "run").rglob("*set_aside*"))


# A disk that fills.


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_in_a_save_in_the_background(start, tmp_path, monkeypatch, bags):
    """Orbax's own thread fails at the second save; the first checkpoint stays and is gone on
    from.
    """
    real = manager_lib.ocp.CheckpointManager.check_for_errors

    def check(self):
        real(self)
        if self.latest_step() == 4:
            raise RuntimeError("Error writing ... No space left on device")

    monkeypatch.setattr(manager_lib.ocp.CheckpointManager, "check_for_errors", check)
    with pytest.raises(
        DiskFullError, match=r"MODEL_DIR .*run: writing failed, No space left .*mak"
    ):
        start(steps=8)
    folder = tmp_path / "run"
    assert manifest.read(folder)["status"] == "failed" and (folder / "checkpoint_2").exists()
    monkeypatch.undo()
    assert start(steps=8).start == "resume"
    assert steps_of(folder / "train" / "metrics.jsonl") == list(range(1, 9))


@pytest.mark.parametrize("where", ["metrics", "manifest", "set_aside"])
def test_no_room_for_small_files(start, begun, tmp_path, monkeypatch, where):
    folder = shutil.copytree(begun, tmp_path / "run")
    before = (folder / "manifest.json").read_bytes()
    (folder / "train" / "metrics.jsonl").open("a").write('{"step": 3}\n')
    with monkeypatch.context() as patch:
        if where == "metrics":

            def torn(self, line):
                with (self.folder / "metrics.jsonl").open("a") as stream:
                    stream.write(line[:20])
                full()

            patch.setattr(metric_writers.MetricWriter, "_append", torn)
        elif where == "manifest":
            patch.setattr(manifest, "write", full)
        else:
            patch.setattr(set_aside, "_append", full)
        with pytest.raises(DiskFullError, match="No space left on device"):
            start()
    if where != "metrics":
        assert (folder / "manifest.json").read_bytes() == before
    assert start().step == 4
    assert steps_of(folder / "train" / "metrics.jsonl") == [1, 2, 3, 4]


def test_what_counts_as_a_full_disk():
    assert reason_of(OSError(errno.ENOSPC, "x", "/a/file")) == "No space left on device (/a/file)"
    assert reason_of(ValueError("...: Disk quota exceeded [source ...]")) == "Disk quota exceeded"
    assert reason_of(OSError(errno.ENOENT, "No space left in this name")) is None
    outer = ValueError("outer")
    outer.__cause__ = OSError(errno.EFBIG, "x")
    assert reason_of(outer) == "File too large"
    outer.__cause__.__context__ = outer
    assert reason_of(outer.__cause__) == "File too large" and reason_of(KeyError("x")) is None


def test_a_save_that_was_cut_short_counts_as_room(tmp_path, monkeypatch):
    """The next start removes it, and would otherwise be refused for what it takes."""
    half = tmp_path / "checkpoint_4.orbax-checkpoint-tmp-7" / "state"
    half.mkdir(parents=True)
    (half / "data").write_bytes(b"x" * 1000)
    free = type("usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    prepare.check_model_dir(epath.Path(tmp_path), checkpoint_bytes=1000)
    with pytest.raises(ValueError, match="free space"):
        prepare.check_model_dir(epath.Path(tmp_path), checkpoint_bytes=1200)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk"
)
def test_a_real_disk_that_fills_during_a_save(start, tmp_path, capfd, bags):
    """A file system of 2 MiB, which other data fill between two saves."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:

        class Filling(bags.Dataset):
            def batch(self, k):
                if k == 3:
                    time.sleep(0.5)  # for the save of step 2
                    room = os.statvfs(disk)
                    with contextlib.suppress(OSError):
                        (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize))
                return super().batch(k)

        arguments = {"model_dir": disk / "run", "steps": 8, "train_dataset_cfg": Filling()}
        with pytest.raises(DiskFullError, match="No space left on device"):
            start(**arguments)
        assert "Traceback" not in capfd.readouterr().err
        assert (disk / "run" / "checkpoint_2").exists()
        with pytest.raises(ValueError, match="free space"):
            start(**arguments)
        (disk / "ballast").unlink()
        assert start(**arguments | {"train_dataset_cfg": bags.Dataset()}).start == "resume"
        assert steps_of(disk / "run" / "train" / "metrics.jsonl") == list(range(1, 9))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
