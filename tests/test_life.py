"""scripts/life.sh at its smallest, and that its checks can fail."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, memory = script("life_check"), script("measure_memory")


def run_of(folder, losses, **manifest):
    (folder / "train").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses]
    (folder / "train" / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"step": 99, "lo'])
    )  # torn by a kill
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def test_equal_losses_and_unequal_ones(tmp_path):
    """Step 2 was done twice: the later line counts."""
    run = run_of(tmp_path / "run", [(1, 2.0), (2, 9.0), (2, 1.5), (3, 1.0)])
    same = run_of(tmp_path / "same", [(1, 2.0), (2, 1.5), (3, 1.0)])
    assert "all 3 steps" in check.same_losses(run, same)
    with pytest.raises(
        check.Failed, match=r"1 of 3 steps differ, first 3: 1.0 here, 1.0000001 there"
    ):
        check.same_losses(run, run_of(tmp_path / "other", [(1, 2.0), (2, 1.5), (3, 1.0000001)]))
    with pytest.raises(check.Failed, match=r"first 3: 1.0 here, None there"):
        check.same_losses(run, run_of(tmp_path / "short", [(1, 2.0), (2, 1.5)]))


def test_falling_losses_and_rising_ones(tmp_path):
    assert "3.000 -> 1.000" in check.falls(
        run_of(tmp_path / "falls", [(1, 3.0), (2, 2.0), (3, 1.0)])
    )
    with pytest.raises(check.Failed, match=r"from 1.000 to 1.000"):
        check.falls(run_of(tmp_path / "flat", [(1, 1.0), (2, 1.0)]))
    with pytest.raises(check.Failed, match=r"has no training metrics"):
        check.falls(run_of(tmp_path / "none", []))


def test_restarts_proofs_and_starts(tmp_path):
    good = run_of(
        tmp_path / "a", [(1, 1.0)], starts=[{"step": 0}, {"step": 8}], status="finished", step=48
    )
    assert "resumed at step 8" in check.restarted(good, "8")
    for name, starts in (("b", [0]), ("c", [0, 0]), ("d", [0, 9])):
        run = run_of(
            tmp_path / name,
            [(1, 1.0)],
            starts=[{"step": step} for step in starts],
            status="finished",
            step=48,
        )
        with pytest.raises(check.Failed, match="expected a second start at a multiple of 8"):
            check.restarted(run, "8")
    (tmp_path / "proof.json").write_text(json.dumps({"ok": False, "leaves": [{}]}))
    with pytest.raises(check.Failed, match="does not hold"):
        check.proof(str(tmp_path))
    origin = run_of(
        tmp_path / "e", [(1, 1.0)], start_step=5, restored_from={"path": "/x/checkpoint_5"}, step=9
    )
    assert check.continued(origin, "/y/checkpoint_5") == "began at step 5, at step 9 now"
    with pytest.raises(check.Failed, match="started at 5"):
        check.continued(origin, "/y/checkpoint_6")


def test_parts_of_an_inference(tmp_path):
    for name, lines in (("whole", "abcde"), ("first", "ace"), ("second", "bd"), ("wrong", "bx")):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    whole, first, second, wrong = (
        str(tmp_path / name) for name in ("whole", "first", "second", "wrong")
    )
    assert "5 examples in 2 parts" in check.interleaved(whole, first, second)
    with pytest.raises(check.Failed, match=r"are not the 5 of"):
        check.interleaved(whole, first, wrong)


def test_a_failed_check_is_an_exit_status(tmp_path):
    words = [sys.executable, str(SCRIPTS / "life_check.py"), "falls", str(tmp_path / "nowhere")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FAILED falls" in done.stderr


def test_memory_of_a_growing_and_of_a_flat_run():
    # 600 MiB after 5 minutes, 1 MiB a minute: 60 MiB per hour.
    growing = [(float(minute), 595.0 + minute) for minute in range(61)]
    assert memory.slope(growing) == pytest.approx(60.0)
    assert "slope +60.0 MiB per hour" in memory.summary(growing, warmup_minutes=5)
    assert "slope +0.0" in memory.summary(
        [(float(minute), 600.0) for minute in range(61)], warmup_minutes=5
    )
    mine = memory.memory(os.getpid())
    assert mine.resident >= mine.anonymous > 1


@pytest.mark.slow
def test_the_whole_life(tmp_path):
    environ = {**os.environ, "LIFE_DIR": str(tmp_path / "life"), "LIFE_PYTHON": sys.executable}
    environ.pop("XLA_FLAGS", None)
    command = [str(SCRIPTS / "life.sh"), "--smoke"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = done.stdout.partition("=== ")[2].rpartition("Verified")[2]
    for said in (
        "bit for bit",
        "resumed at step",
        "leaves of the conversion",
        "accuracy",
        "examples in 2 parts, each once",
    ):
        assert said in summary, summary
    again = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0 and again.stdout.count("done before") == 8
