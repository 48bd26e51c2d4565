"""Cells that leave another one before its end: whether that keeps what they start from."""

from collections.abc import Mapping, Sequence

from upcycle_jax.studies.sweep import Cell
from upcycle_jax.training.config import SaveCheckpointConfig


def lost_starts(
    cells: Sequence[Cell], saves: Mapping[str, SaveCheckpointConfig | None]
) -> list[str]:
    """What keeps cells from starting where they shall, one line for each; empty where nothing does.

    Args:
      cells: of a sweep, or some of them.
      saves: name of a cell that trains -> when it saves checkpoints, and which stay.
    """
    by_name = {cell.name: cell for cell in cells}
    problems = []
    for cell in cells:
        for parent in (by_name[name] for name in cell.needs if name in saves):
            reason = _lost(cell.start_step, parent.end_step, saves[parent.name])
            if reason is not None:
                problems.append(
                    f"cell {cell.name} starts from step {cell.start_step} of {parent.name}, which"
                    f" {reason}: bind SAVING_PERIOD and KEEP_CHECKPOINTS of that stage so that this"
                    " checkpoint is there"
                )
    return problems


def _lost(step: int, end: int, save: SaveCheckpointConfig | None) -> str | None:
    """Why a checkpoint of a run that ends at a step is not there afterwards."""
    if save is None:
        return "saves no checkpoints"
    if step == end:
        return None
    if step % save.period:
        return f"saves every {save.period} steps"
    later = (end - 1) // save.period - step // save.period + 1  # the last step's too
    by_period = save.keep_period is not None and step % save.keep_period == 0
    if save.keep is not None and later >= save.keep and not by_period:
        return f"keeps its {save.keep} latest checkpoints only"
    return None
