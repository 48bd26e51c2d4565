"""Damage to files: bits flipped, ends cut off, blocks zeroed, files removed or swapped.

What a trial asks does not depend on the command under test: the leaves are read by themselves and
compared with those before the damage. Where a value changed or cannot be read, the command must say
so; where none did, it may pass.
"""

import pathlib
import shutil
from collections.abc import Iterator

from kills import losses
from lab import CLEAN, Lab, Outcome, files_below, leaves
from subjects import PERIOD, STEPS, Subjects, reference

KINDS = ("bit", "cut", "zeros", "removed", "empty", "byte appended")


def damage(lab: Lab, path: pathlib.Path, kind: str) -> None:
    """Damages a file in place; the copy that others may share by a hard link stays whole."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind == "removed":
        return
    if kind == "bit" and data:
        data[lab.random.randrange(len(data))] ^= 1 << lab.random.randrange(8)
    elif kind == "cut":
        del data[lab.random.randrange(len(data) + 1) :]
    elif kind == "zeros" and data:
        start = lab.random.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif kind == "empty":
        data.clear()
    elif kind == "byte appended":
        data.append(lab.random.randrange(256))
    path.write_bytes(data)


def _read(lab: Lab, path: pathlib.Path) -> dict[str, str] | None:
    """Checksums of the leaves; None where they cannot be read."""

    def attempt() -> dict[str, str] | None:
        try:
            return leaves(path)
        except Exception:
            return None

    return lab.in_child(attempt)


def results(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Damages a converted checkpoint, or the files that it shares with its source."""
    root = lab.folder / "mutated"
    pristine = {
        "result": reference(lab, subjects.converted),
        "source": reference(lab, subjects.checkpoint),
    }
    for _ in range(trials):
        shutil.rmtree(root, ignore_errors=True)
        source = root / "dense" / f"checkpoint_{STEPS}"
        result = root / "converted" / f"checkpoint_{STEPS}"
        # A conversion by reference shares files by hard links: the copies must share them too.
        _copy_together(subjects, source, result)
        side = lab.random.choice(("result", "source"))
        folder = {"result": result, "source": source}[side]
        path = lab.random.choice(files_below(folder))
        kind = lab.random.choice(KINDS)
        shared = path.stat().st_nlink > 1
        if shared:  # Rot in a shared file shows on both sides.
            twins = [
                twin
                for twin in (*files_below(source), *files_below(result))
                if twin.stat().st_ino == path.stat().st_ino
            ]
            damage(lab, path, kind)
            for twin in twins:
                if twin != path:
                    twin.unlink()
                    if path.exists():
                        twin.hardlink_to(path)
        else:
            damage(lab, path, kind)
        name = path.relative_to(root)
        label = f"{kind} in {name}{' (shared)' if shared else ''}"
        moved = {"result": _read(lab, result), "source": _read(lab, source)}
        changed = [where for where, found in moved.items() if found != pristine[where]]
        words = [
            word.replace(str(subjects.checkpoint), str(source))
            for word in subjects.upcycle_words(result)
        ]
        done = lab.run("verify", *words)
        problem = ""
        if done.has_traceback or done.code not in (0, 1, 2):
            problem = f"exit {done.code}, {done.last_line}"
        elif "result" in changed and done.code == 0:
            problem = "leaves of the result changed, and verify passed"
        elif "source" in changed and done.code == 0:
            problem = "leaves of the source changed, and verify passed"
        yield Outcome(label, problem, note=f"verify {done.code}, changed: {changed}")


def _copy_together(subjects: Subjects, source: pathlib.Path, result: pathlib.Path) -> None:
    """Copies source and result; files that were one are one again."""
    made: dict[int, pathlib.Path] = {}
    for old, new in ((subjects.checkpoint, source), (subjects.converted, result)):
        for path in files_below(old):
            target = new / path.relative_to(old)
            target.parent.mkdir(parents=True, exist_ok=True)
            number = path.stat().st_ino
            if number in made:
                target.hardlink_to(made[number])
            else:
                shutil.copy2(path, target)
                made[number] = target


def training(lab: Lab, subjects: Subjects, trials: int) -> Iterator[Outcome]:
    """Damages the latest checkpoint of a run and lets it go on.

    The run must end as if nothing had happened (it fell back, or the damage was harmless), or stop
    with one line.
    """
    expected = losses(subjects.dense)
    latest = STEPS - PERIOD
    model_dir = lab.folder / "damaged_run"
    for _ in range(trials):
        shutil.rmtree(model_dir, ignore_errors=True)
        shutil.copytree(subjects.dense, model_dir)
        shutil.rmtree(model_dir / f"checkpoint_{STEPS}")
        path = lab.random.choice(files_below(model_dir / f"checkpoint_{latest}"))
        kind = lab.random.choice(KINDS)
        damage(lab, path, kind)
        done = lab.run("train", *subjects.train_words(model_dir))
        problem = ""
        if done.has_traceback or done.code not in CLEAN:
            problem = f"exit {done.code}: {done.last_line}"
        elif done.code == 0 and losses(model_dir) != expected:
            problem = "trained on with other losses than the undamaged run"
        yield Outcome(
            f"{kind} in {path.relative_to(model_dir)}", problem, note=f"train {done.code}"
        )
