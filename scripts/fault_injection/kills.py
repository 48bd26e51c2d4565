"""Kills at any moment: of conversions and of training. The same command afterwards must end with
the bits of a run that was never killed, and leave nothing behind.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator

from lab import Lab, Outcome, files_below
from subjects import STEPS, Subjects, reference

LEFTOVERS = (
    ".upcycle-probe",
    ".partial",
    ".lock",
    "resume.json",
    ".unfinished",
    "orbax-checkpoint-tmp",
)
MODES = {
    "by reference": (),
    "materialised": ("--materialize",),
    "with noise": ("--gin.Recipe.expert_init=@NoisyCopies()", "--gin.NoisyCopies.std=0.01"),
}


def _leftovers(folder: pathlib.Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if any(mark in path.name for mark in LEFTOVERS)
    ]


def upcycle(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Kills conversions, up to three times each, then lets the same command finish."""
    whole = {}
    for mode, flags in MODES.items():
        output = lab.fresh("whole") / f"checkpoint_{STEPS}"
        done = lab.run("upcycle", *subjects.upcycle_words(output, *flags))
        if done.code:
            yield Outcome(f"upcycle, {mode}, undisturbed", f"exit {done.code}: {done.last_line}")
            continue
        whole[mode] = (done.seconds, reference(lab, output), len(files_below(output)))
    source_before = reference(lab, subjects.checkpoint)
    killed = 0
    while killed < trials and whole:
        mode = lab.random.choice(sorted(whole))
        seconds, expected, _ = whole[mode]
        output = lab.fresh("killed") / f"checkpoint_{STEPS}"
        words = subjects.upcycle_words(output, *MODES[mode])
        moments = []
        for _ in range(min(lab.random.randint(1, 3), trials - killed)):
            moments.append(lab.random.uniform(0.02, 1.0) * seconds)
            done = lab.run("upcycle", *words, kill_after=moments[-1])
            killed += 1
            if done.code not in (-9, 0):
                yield Outcome(f"upcycle, {mode}", f"exit {done.code}: {done.last_line}")
            if (output / "proof.json").exists():
                break  # This kill came too late.
        label = f"upcycle, {mode}, killed after {', '.join(f'{m:.2f}' for m in moments)} s"
        done = lab.run("upcycle", *words)
        problem = ""
        if done.code == 2 and "exists already" in done.text and (output / "proof.json").exists():
            done = lab.run("verify", str(output))  # The last kill came too late.
        if done.code:
            problem = f"exit {done.code}: {done.last_line}"
        elif reference(lab, output) != expected:
            problem = "the result differs from that of an undisturbed conversion"
        elif _leftovers(output.parent):
            problem = f"left behind: {_leftovers(output.parent)}"
        for _ in moments[1:]:
            yield Outcome(f"{label}, earlier kill")
        yield Outcome(label, problem)
    if reference(lab, subjects.checkpoint) != source_before:
        yield Outcome("upcycle: the source after all kills", "changed")


def losses(model_dir: pathlib.Path) -> dict[int, float]:
    """The loss of every step as last written."""
    rows = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    whole = [json.loads(row) for row in rows if row.endswith("}")]
    return {row["step"]: row["loss"] for row in whole if "loss" in row}


def train(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Kills a training run again and again; it must resume and end with the same losses."""
    expected = losses(subjects.dense)
    final = reference(lab, subjects.checkpoint)
    model_dir = lab.folder / "killed_run"
    whole = lab.run("train", *subjects.train_words(lab.fresh("timed_run")))
    killed = 0
    while killed < trials:
        shutil.rmtree(model_dir, ignore_errors=True)
        words = subjects.train_words(model_dir)
        moments: list[float] = []
        problem = ""
        for _ in range(min(lab.random.randint(2, 5), trials - killed)):
            moments.append(lab.random.uniform(0.05, 1.0) * whole.seconds)
            done = lab.run("train", *words, kill_after=moments[-1])
            killed += 1
            if done.code not in (-9, 0):
                problem = f"exit {done.code}: {done.last_line}"
        done = lab.run("train", *words)
        if done.code:
            problem = f"exit {done.code}: {done.last_line}"
        elif losses(model_dir) != expected:
            problem = "losses differ from those of a run that was never killed"
        elif reference(lab, model_dir / f"checkpoint_{STEPS}") != final:
            problem = "the last checkpoint differs"
        elif _leftovers(model_dir):
            problem = f"left behind: {_leftovers(model_dir)}"
        label = f"train, killed after {', '.join(f'{m:.1f}' for m in moments)} s"
        for _ in moments[1:]:
            yield Outcome(f"{label}, earlier kill")
        yield Outcome(label, problem)
