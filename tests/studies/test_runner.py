"""Running the cells of a study, killed or not: each runs once."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from upcycle_jax import leases
from upcycle_jax.studies import runner, state
from upcycle_jax.studies.sweep import Stage, Sweep

ROOT = pathlib.Path(__file__).resolve().parents[2]


_spec = importlib.util.spec_from_file_location(
    "fake_sweep", pathlib.Path(__file__).with_name("fake_sweep.py")
)


fake_sweep = importlib.util.module_from_spec(_spec)


_spec.loader.exec_module(fake_sweep)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.02")
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def history(cell) -> list[str]:
    path = pathlib.Path(cell.folder) / "history.txt"
    return path.read_text().splitlines() if path.exists() else []


def events(folder, kind):
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def test_every_cell_runs_once_and_a_second_sweep_runs_none(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    outcome = fake_sweep.runner(sweep).run()
    assert (outcome.exit_code, len(outcome.finished), outcome.failures) == (0, 5, [])
    assert (
        next(event["cell"] for event in events(tmp_path, "start")) == "dense"
        and len(events(tmp_path, "start")) == 5
    )
    assert fake_sweep.runner(sweep).run().exit_code == 0
    assert len(events(tmp_path, "start")) == 5
    for cell in sweep.cells():
        assert history(cell) == [
            f"start at {cell.start_step}",
            *(f"step {n}" for n in range(cell.start_step + 1, cell.end_step + 1)),
        ]


def test_a_failed_cell_is_reported_with_log_and_command_and_the_rest_runs(tmp_path):
    sweep = fake_sweep.study(tmp_path, seeds=(0, 13))
    outcome = fake_sweep.runner(sweep, retries=1).run()
    assert outcome.exit_code == 1 and len(outcome.finished) == 3
    failure = next(
        failure for failure in outcome.failures if failure.cell.labels["FACTOR"] == "2.5"
    )
    text = failure.text()
    assert (
        "FAILED varied-FACTOR=2.5-seed=13: ended with code 1" in text
        and "the loss of step 3 is nan" in text
    )
    assert failure.cell.command_line(sys.executable) in text
    assert (
        sum(event["cell"] == failure.cell.name for event in events(tmp_path, "start")) == 2
    )  # one retry


def test_what_needs_a_failed_cell_is_not_run(tmp_path):
    dense = Stage(name="dense", gin_files=["d.gin"], steps=1, bindings={"RANDOM_SEED": 13})
    after = Stage(name="after", gin_files=["d.gin"], steps=1, start_from="dense")
    outcome = fake_sweep.runner(
        Sweep(name="s", sweep_dir=str(tmp_path), stages=[dense, after]), retries=0
    ).run()
    assert [failure.reason for failure in outcome.failures] == [
        "ended with code 1",
        "not run, because it needs dense, which failed",
    ]
    assert len(events(tmp_path, "start")) == 1


def start_sweep(folder, *seeds, parallel=2, seconds="0.05"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAKE_SECONDS": seconds}
    words = [sys.executable, fake_sweep.__file__, str(folder), str(parallel), *map(str, seeds)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_cells_of_other_tasks_get_a_table_of_their_own(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    cells = sweep.cells()
    assert fake_sweep.runner(sweep).run().exit_code == 0
    last = pathlib.Path(cells[-1].folder) / "training_eval"
    (last / "task").rename(last / "label")
    tables = state.save_table(sweep, cells).split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [len(cells), 2]
    assert "task/accuracy" in tables[0] and "label/accuracy" in tables[1].splitlines()[0]
    assert not any(" - " in table for table in tables)


def test_killed_half_way_and_restarted_no_cell_runs_twice(tmp_path):
    """SIGKILL of the sweep leaves its cells alive: the next sweep waits for them."""
    sweep = fake_sweep.study(tmp_path)
    cells = sweep.cells()
    first = start_sweep(tmp_path, 0, 1, seconds="0.3")
    wait_for(lambda: len(history(cells[1])) > 2)
    first.kill()
    first.wait()
    left_alive = [cell for cell in cells[1:] if history(cell) and not state.is_finished(cell)]
    assert left_alive, "the sweep was killed too late for this test"
    assert start_sweep(tmp_path, 0, 1).wait(60) == 0
    for cell in cells:  # each step of each cell once, by one process
        assert history(cell) == [
            f"start at {cell.start_step}",
            *(f"step {n}" for n in range(cell.start_step + 1, cell.end_step + 1)),
        ]
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == [cell.name for cell in cells]
    for row, cell in zip(rows, cells, strict=True):  # the table is what the cells' own lines say
        lines = (
            (pathlib.Path(cell.folder) / "training_eval/task/metrics.jsonl")
            .read_text()
            .splitlines()
        )
        last = json.loads(lines[-1])
        assert row["tasks"] == {
            "task": {"cross_ent_loss": last["cross_ent_loss"], "accuracy": last["accuracy"]}
        }
        assert row["step"] == last["step"] == cell.end_step
    # By hand: FACTOR + 1 / (step + seed) at step 4 + 6.
    by_name = {row["cell"]: row["tasks"]["task"]["cross_ent_loss"] for row in rows}
    assert by_name["varied-FACTOR=2.5-seed=1"] == pytest.approx(2.5 + 1 / 11)


def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    cells = fake_sweep.study(tmp_path).cells()
    both = [start_sweep(tmp_path, 0, 1, parallel=1), start_sweep(tmp_path, 0, 1, parallel=1)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert all(sum(line.startswith("start") for line in history(cell)) == 1 for cell in cells)


def test_sigterm_lets_cells_save_and_the_next_sweep_resumes_them(tmp_path):
    cells = fake_sweep.study(tmp_path).cells()
    process = start_sweep(tmp_path, 0, 1, seconds="0.2")
    wait_for(lambda: len(history(cells[1])) > 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == runner.INTERRUPTED
    assert start_sweep(tmp_path, 0, 1).wait(60) == 0
    lines = history(cells[1])
    assert sum(line.startswith("start") for line in lines) == 2
    steps = [line for line in lines if line.startswith("step")]
    assert steps == [f"step {n}" for n in range(5, 11)]  # nothing was trained twice


def test_a_cell_begun_with_other_settings_is_refused(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    state.save_plan(sweep, sweep.cells())
    pathlib.Path(sweep.cells()[0].folder).mkdir(parents=True)
    other = Sweep(
        name="study",
        sweep_dir=str(tmp_path),
        stages=[Stage(name="dense", gin_files=["dense.gin"], steps=5)],
    )
    with pytest.raises(ValueError, match="was begun with another command line"):
        state.save_plan(other, other.cells())


def test_a_cell_that_trains_elsewhere_is_waited_for(tmp_path):
    """On another machine, whose lock is not seen here; a lease that ended long ago is none."""
    dense, *_ = fake_sweep.study(tmp_path).cells()
    lease = pathlib.Path(dense.folder) / leases.TRAINING_LEASE
    assert not runner._trains_elsewhere(dense)
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start_ticks": 1}))
    assert runner._trains_elsewhere(dense)
    os.utime(lease, (time.time() - 90, time.time() - 90))
    assert not runner._trains_elsewhere(dense)
