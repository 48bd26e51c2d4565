"""Finished cells of another sweep, taken over where the command is the same."""

import json

import pytest

from upcycle_jax.studies import state
from upcycle_jax.studies.reuse import take_over
from upcycle_jax.studies.sweep import Stage, Sweep


def study(folder, steps=2):
    stages = [
        Stage(name="dense", gin_files=["d.gin"], steps=3),
        Stage(name="more", gin_files=["d.gin"], steps=steps, start_from="dense"),
    ]
    return Sweep(name="s", sweep_dir=str(folder), stages=stages)


def finish(cell):
    folder = state.Path(cell.folder)
    (folder / f"checkpoint_{cell.end_step}").mkdir(parents=True)
    manifest = {"status": "finished", "step": cell.end_step, "from": str(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / ".training_lease.json").write_text("{}")


def test_cells_with_the_same_command_are_copied_and_name_their_new_folder(tmp_path):
    first, second = study(tmp_path / "a"), study(tmp_path / "b", steps=4)
    state.save_plan(first, first.cells())
    for cell in first.cells():
        finish(cell)
    # The continuation is longer in the second study: it is run there.
    assert take_over(second.cells(), second.root, first.root) == ["dense"]
    dense, more = second.cells()
    assert state.is_finished(dense) and not state.Path(more.folder).exists()
    manifest = json.loads((state.Path(dense.folder) / "manifest.json").read_text())
    assert manifest["from"] == dense.folder
    assert not (state.Path(dense.folder) / ".training_lease.json").exists()
    assert take_over(second.cells(), second.root, first.root) == []  # It is here already.


def test_a_cell_that_has_not_finished_there_is_not_taken(tmp_path):
    first, second = study(tmp_path / "a"), study(tmp_path / "b")
    state.save_plan(first, first.cells())
    dense = first.cells()[0]
    (state.Path(dense.folder) / "checkpoint_1").mkdir(parents=True)
    assert take_over(second.cells(), second.root, first.root) == []
    assert not state.Path(second.cells()[0].folder).exists()
    with pytest.raises(FileNotFoundError, match="it is no sweep's folder"):
        take_over(second.cells(), second.root, tmp_path)
