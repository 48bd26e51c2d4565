"""Two writers in one MODEL_DIR, disks that fill, and bad input."""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from kills import losses
from lab import CLEAN, Lab, Outcome
from subjects import STEPS, Subjects, reference

ROOT = pathlib.Path(__file__).resolve().parents[2]


def two_writers(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Starts a run twice at nearly the same time: one trains, the other is refused in one line.
    Every second time the first is killed, and a third start must take over.
    """
    expected = losses(subjects.dense)
    for trial in range(trials):
        model_dir = lab.fresh("shared_dir") / "run"
        words = subjects.train_words(model_dir)
        logs = [lab.folder / f"writer_{number}.txt" for number in range(2)]
        processes = [lab.start("train", words, logs[0])]
        time.sleep(lab.random.choice((0.0, 0.0, 0.5, 2.0, 4.0)))
        processes.append(lab.start("train", words, logs[1]))
        kills = trial % 2 == 1
        if kills:
            time.sleep(lab.random.uniform(3.0, 8.0))
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.killpg(process, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        texts = [log.read_text(errors="replace") for log in logs]
        problem = ""
        if any("Traceback" in text for text in texts):
            problem = f"exits {codes}, with a traceback"
        if kills:
            done = lab.run("train", *words)
            if done.code:
                problem = f"after a kill of both: exit {done.code}: {done.last_line}"
        elif sorted(codes) != [0, 2]:
            problem = f"exits {codes}: {[text.strip().splitlines()[-1:] for text in texts]}"
        if not problem and losses(model_dir) != expected:
            problem = "losses differ from those of one writer"
        yield Outcome(f"two writers, {'both killed' if kills else 'undisturbed'}", problem)


def full_disk(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Conversions and runs on a disk that fills; with more room the same command must finish."""
    mount = lab.fresh("small_disk")
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount]).returncode
    ):
        yield Outcome("full disk", note="skipped: small disks need root and tmpfs")
        return
    try:
        yield from _on_small_disks(lab, subjects, mount, trials)
    finally:
        subprocess.run(["umount", mount], check=False)


def _resize(mount: pathlib.Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}k", "tmpfs", mount], check=True)


def _on_small_disks(
    lab: Lab, subjects: Subjects, mount: pathlib.Path, trials: int
) -> Iterator[Outcome]:
    plenty = 512 << 10
    final = reference(lab, subjects.checkpoint)
    expected = losses(subjects.dense)
    converted = reference(lab, subjects.converted)
    for trial in range(trials):
        trains = trial % 2 == 0
        for path in mount.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        size = lab.random.randint(64, 4000)
        _resize(mount, size)
        output = mount / ("run" if trains else f"checkpoint_{STEPS}")
        command = "train" if trains else "upcycle"
        words = (
            subjects.train_words(output)
            if trains
            else subjects.upcycle_words(output, "--materialize")
        )
        small = lab.run(command, *words)
        label = f"{command} on a disk of {size} KiB"
        problem = ""
        if small.has_traceback or small.code not in CLEAN:
            problem = f"exit {small.code}: {small.last_line}"
        _resize(mount, plenty)
        done = lab.run(command, *words) if small.code else small
        if done.code and not problem:
            problem = f"with room, exit {done.code}: {done.last_line}"
        elif not problem and trains:
            same = reference(lab, output / f"checkpoint_{STEPS}") == final
            if losses(output) != expected or not same:
                problem = "with room the run ended otherwise"
        elif not problem and reference(lab, output) != converted:
            problem = "with room the conversion ended otherwise"
        yield Outcome(label, problem, note=f"first exit {small.code}: {small.last_line}")


def bad_inputs(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Rows drawn from tests/config/bad_inputs.py, run as commands: exit 2, one line that names the
    setting, nothing written.
    """
    spec = importlib.util.spec_from_file_location(
        "bad_inputs", ROOT / "tests" / "config" / "bad_inputs.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bad_inputs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    rows = list(module.rows())
    for row in lab.random.sample(rows, min(trials, len(rows))):
        root = lab.fresh("bad")
        done = lab.run(row.command, *row.flags, cwd=root)
        problem = ""
        if done.has_traceback:
            problem = f"a traceback: {done.last_line}"
        elif done.code != 2:
            problem = f"exit {done.code}: {done.last_line}"
        elif row.fragment.lower() not in done.text.lower():
            problem = f"{row.fragment} is not named: {done.last_line}"
        elif list(root.iterdir()):
            problem = f"wrote {[path.name for path in root.iterdir()]}"
        yield Outcome(f"{row.command} {row.bindings[-1][:80]}", problem, note=done.last_line)
