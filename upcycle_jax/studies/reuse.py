"""Cells of another sweep taken over instead of run again: studies of one model share its dense
pre-training, its continuation and the cache of its data.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from upcycle_jax.files import write_whole
from upcycle_jax.leases import TRAINING_LEASE
from upcycle_jax.studies import state
from upcycle_jax.studies.sweep import ROOT_MARK, Cell

TEXTS = (".json", ".gin", ".txt")
"""Files of a run that may name the folder of its sweep."""
COPYING = ".taken_over"


def take_over(cells: Sequence[Cell], root: str, folder: str | Path) -> list[str]:
    """Copies finished cells of another sweep's folder that this sweep would run with the same
    command; names of those that were copied.

    A cell that has begun here already is left alone.

    Args:
      cells: of this sweep.
      root: its folder, absolute.
      folder: the other sweep's.

    Raises:
      FileNotFoundError: it is no sweep's folder.
    """
    other = Path(folder).resolve()
    if not (other / state.SWEEP_FILE).is_file():
        raise FileNotFoundError(f"{other} holds no {state.SWEEP_FILE}: it is no sweep's folder")
    plan = json.loads((other / state.SWEEP_FILE).read_text())
    commands = {cell["name"]: cell["command"] for cell in plan["cells"]}
    taken = []
    for cell in cells:
        same = commands.get(cell.name) == state.portable(cell.command_line(), root)
        source = other / Path(cell.folder).relative_to(root)
        if not same or Path(cell.folder).exists() or not source.is_dir():
            continue
        half = Path(f"{cell.folder}{COPYING}")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(source, half, ignore=shutil.ignore_patterns(TRAINING_LEASE))
        for path in half.iterdir():  # Those below are checkpoints and metrics, which name nothing.
            if path.suffix in TEXTS and path.is_file():
                _move_text(path, str(other), root)
        half.rename(cell.folder)
        if state.is_finished(cell):
            taken.append(cell.name)
        else:
            Path(cell.folder).rename(half)  # A kill leaves no half of a cell under its name.
            shutil.rmtree(half)
    return taken


def _move_text(path: Path, before: str, now: str) -> None:
    """Names the new folder where the old one is named."""
    text = path.read_text()
    moved = state.portable(text, before).replace(ROOT_MARK, now)
    if moved != text:
        write_whole(path, moved)
