"""`python -m upcycle_jax.runs`: the state of runs, judged from their files."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from upcycle_jax import runs
from upcycle_jax.leases import process_record
from upcycle_jax.studies import run_list

NOW = 1_800_000_000.0


def make_run(
    folder,
    *,
    status="running",
    step=0,
    total=100,
    seconds_ago=5.0,
    gap=10.0,
    process=None,
    error=None,
    reports=(10, 20, 30),
):
    """A MODEL_DIR as training leaves it; the last report and every file are `seconds_ago` old at
    NOW.
    """
    (folder / "train").mkdir(parents=True)
    manifest = {
        "status": status,
        "step": step,
        "start_step": 0,
        "total_steps": total,
        "parameters": 1234,
        "starts": [{"process": process}],
    }
    (folder / "manifest.json").write_text(
        json.dumps(manifest | ({"error": error} if error else {}))
    )
    last = NOW - seconds_ago
    rows = [
        {
            "step": at,
            "wall_time": last - gap * (len(reports) - 1 - i),
            "loss": 5.0 - at / 100,
            "timing/steps_per_second": 2.5,
        }
        for i, at in enumerate(reports)
    ]
    (folder / "train" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for path in (folder / "manifest.json", folder):
        os.utime(path, (last, last))
    return folder


def status_of(folder):
    (status,) = run_list.list_runs(folder, now=NOW)
    return status


def test_a_finished_run_with_its_metrics(tmp_path):
    folder = make_run(tmp_path / "a" / "run", status="finished", step=100, reports=(50, 100))
    for task, loss in (("one", 2.0), ("two", 3.0)):
        (folder / "training_eval" / task).mkdir(parents=True)
        line = {"step": 100, "wall_time": NOW - 60, "cross_ent_loss": loss, "accuracy": 0.5}
        (folder / "training_eval" / task / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for step in (50, 100):
        (folder / f"checkpoint_{step}").mkdir()
        (folder / f"checkpoint_{step}" / "data").write_bytes(b"x" * 1000)
        os.utime(folder / f"checkpoint_{step}", (NOW - 99, NOW - 99))
    os.link(
        folder / "checkpoint_50" / "data", folder / "checkpoint_100" / "shared"
    )  # one file under two names: 1000 bytes once
    (folder / "checkpoint_150.orbax-checkpoint-tmp").mkdir()
    (status,) = run_list.list_runs(tmp_path, now=NOW)
    assert (status.name, status.state, status.step, status.total_steps) == (
        "a/run",
        "finished",
        100,
        100,
    )
    assert status.training == {"loss": 4.0, "steps_per_second": 2.5}
    assert status.evaluations["two"] == {"cross_ent_loss": 3.0, "accuracy": 0.5}
    assert (status.checkpoint_steps, status.checkpoint_bytes, status.last_sign) == (
        [50, 100],
        2000,
        NOW - 5,
    )
    text = run_list.table([status], now=NOW)
    assert (
        "100/100 (100%)" in text and "2.5 (mean of 2)" in text and "2, latest 100, 2.0 KiB" in text
    )


def test_a_run_of_this_machine_is_judged_by_its_process(tmp_path):
    mine = process_record.this_process()
    assert process_record.is_alive(mine)
    # An hour of silence does not matter while the process is there: it may be evaluating.
    assert (
        status_of(make_run(tmp_path / "alive", process=mine, seconds_ago=3600)).state == "running"
    )
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        ticks = process_record._start_ticks(child.pid)
        child.kill()
    gone = status_of(
        make_run(
            tmp_path / "gone",
            process=mine | {"pid": child.pid, "start_ticks": ticks},
            seconds_ago=1,
        )
    )
    assert gone.state == "stopped" and f"process {child.pid} is gone" in gone.why
    # Another process has the id now: it started at another time.
    assert (
        status_of(make_run(tmp_path / "reused", process=mine | {"start_ticks": 1})).state
        == "stopped"
    )


@pytest.mark.parametrize(
    ("seconds_ago", "gap", "state"),
    # Ten reporting periods of 10 s are less than ten minutes: 600 s count. Ten of 120 s are 1200 s.
    [(590, 10, "running"), (610, 10, "stopped"), (1190, 120, "running"), (1210, 120, "stopped")],
)
def test_a_run_of_another_machine_is_judged_by_its_silence(tmp_path, seconds_ago, gap, state):
    elsewhere = {"host": "another", "pid": os.getpid(), "start_ticks": 1}
    status = status_of(
        make_run(tmp_path / "run", process=elsewhere, seconds_ago=seconds_ago, gap=gap)
    )
    assert status.state == state, status.why


def test_signals_errors_and_damaged_files(tmp_path):
    make_run(tmp_path / "cut", status="interrupted by SIGTERM", step=30)
    make_run(
        tmp_path / "nan",
        status="failed",
        step=30,
        error="NonFiniteLossError: step 31: the loss is nan",
    )
    (make_run(tmp_path / "torn") / "manifest.json").write_text('{"status": ')
    with (tmp_path / "nan" / "train" / "metrics.jsonl").open("a") as out:
        out.write('{"step": 40, "lo')  # killed while it wrote
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text('{"task": "not a run"}')
    found = {status.name: status for status in run_list.list_runs(tmp_path, now=NOW)}
    assert set(found) == {"cut", "nan", "torn"}
    assert (found["cut"].state, found["cut"].why) == ("stopped", "interrupted by SIGTERM")
    assert (found["nan"].state, found["nan"].step) == ("failed", 30) and "loss is nan" in found[
        "nan"
    ].why
    assert (
        found["torn"].state == "failed"
        and "manifest.json is damaged" in found["torn"].why
        and found["torn"].step == 30
    )
    text = run_list.table(list(found.values()), now=NOW)
    assert "nan: NonFiniteLossError: step 31" in text and "cut: interrupted by SIGTERM" in text


def test_the_command(tmp_path, capsys):
    make_run(tmp_path / "run", status="finished", step=100)
    assert runs.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("run  finished  100/100 (100%)")
    assert runs.main([str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["parameters"]) == ("run", "finished", 1234) and row[
        "last_sign"
    ].startswith("20")
    assert runs.main([str(tmp_path / "nowhere")]) == 2
    assert "is no folder: name one with MODEL_DIRs in it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert runs.main([str(tmp_path / "empty")]) == 0 and "no runs below" in capsys.readouterr().out


def test_it_answers_without_jax(tmp_path):
    code = (
        f"import sys\nfrom upcycle_jax import runs\nruns.main([{str(tmp_path)!r}])\nsys.exit('jax'"
        " in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=pathlib.Path(runs.__file__).parents[1], check=False
        ).returncode
        == 0
    )


def test_names_and_texts_of_runs_are_escaped(tmp_path, capsys):
    make_run(tmp_path / "\x1b[31mred\u202e", status="failed", error="\x1b]0;owned\x07 no room")
    assert runs.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert r"\x1b[31mred\u202e: \x1b]0;owned\x07 no room" in text


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "3",
        "[" * 10**5,
        "9" * 6000,
        '{"status": [], "start_step": {}, "step": "x", "total_steps": -1, "parameters": 1e999}',
        '{"status": "running", "start_step": 0, "starts": 3, "step": true, "total_steps": [1]}',
        '{"status": "running", "start_step": 0, "starts": [{"process": {"pid": "x"}}]}',
        '{"status": "running", "start_step": 0, "starts": [3], "error": {}}',
    ],
)
def test_manifests_and_metrics_of_wrong_types_are_listed_or_left_out(tmp_path, manifest, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "manifest.json").write_text(manifest)
    rows = [
        "[]",
        "3",
        "{}",
        '{"step": "x"}',
        '{"step": 5, "loss": "x", "wall_time": "now"}',
        "\xff",
    ]
    rows += ['{"step": 6, "loss": 1' + "0" * 400 + ', "wall_time": 1e300}', '{"step": 6, "lo']
    (folder / "train" / "metrics.jsonl").write_text("\n".join(rows), encoding="latin-1")
    assert runs.main([str(tmp_path)]) == 0
    assert runs.main([str(tmp_path), "--json"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("seconds_ago", "state"), [(290, "running"), (310, "stopped")])
def test_a_run_of_another_machine_is_judged_by_its_heartbeat(tmp_path, seconds_ago, state):
    """Its last report is long ago: it may be evaluating."""
    elsewhere = {"host": "elsewhere", "pid": 1, "start_ticks": 1}
    folder = make_run(tmp_path / "run", process=elsewhere, seconds_ago=7200, gap=3600)
    lease = folder / ".training_lease.json"
    lease.write_text(json.dumps(elsewhere))
    os.utime(lease, (NOW - seconds_ago, NOW - seconds_ago))
    status = status_of(folder)
    assert status.state == state and status.last_sign == NOW - seconds_ago
