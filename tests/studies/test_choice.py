"""Settings chosen on validation."""

import json

import pytest

from upcycle_jax.studies.choice import choose, save_choices
from upcycle_jax.studies.state import Row
from upcycle_jax.studies.sweep import Stage, Sweep


def sweep(tmp_path, **settings):
    start = Stage(name="start", gin_files=["s.gin"], steps=3)
    tuned = Stage(
        name="tuned",
        gin_files=["t.gin"],
        steps=5,
        start_from="start",
        axes=["LEARNING_RATE", "size", "seed"],
    )
    axes = {"LEARNING_RATE": [0.1, 0.01], "size": {"small": {"N": 1}, "large": {"N": 2}}}
    return Sweep(
        name="s",
        sweep_dir=str(tmp_path),
        stages=[start, tuned],
        axes=axes,
        seeds=[0, 1],
        **{"chosen_over": ["LEARNING_RATE"]} | settings,
    )


# (rate, size, seed) -> accuracy: means are .50, .55 of small, .70, .65 of large.
ACCURACY = {
    ("0.1", "small", "0"): 0.6,
    ("0.1", "small", "1"): 0.4,
    ("0.01", "small", "0"): 0.5,
    ("0.01", "small", "1"): 0.6,
    ("0.1", "large", "0"): 0.7,
    ("0.1", "large", "1"): 0.7,
    ("0.01", "large", "0"): 0.8,
    ("0.01", "large", "1"): 0.5,
}


def rows(cells, without=()):
    """A loss that says the opposite of the accuracy."""
    for cell in cells:
        key = tuple(cell.labels.get(axis) for axis in ("LEARNING_RATE", "size", "seed"))
        if key in ACCURACY and key not in without:
            metrics = {"accuracy": ACCURACY[key], "cross_ent_loss": ACCURACY[key]}
            yield Row(cell.name, cell.stage, cell.labels, 8, {"task": metrics})


def test_the_best_of_all_seeds_is_chosen_for_each_other_setting(tmp_path):
    study = sweep(tmp_path)
    cells = study.cells()
    small, large = choose(study, cells, list(rows(cells)))
    assert (small.labels, small.chosen) == ({"size": "small"}, {"LEARNING_RATE": "0.01"})
    assert (large.labels, large.chosen) == ({"size": "large"}, {"LEARNING_RATE": "0.1"})
    assert (small.value, small.settings, small.of) == (pytest.approx(0.55), 2, 2)
    folder = f"{tmp_path}/cells/tuned-LEARNING_RATE=0.01-size=small-seed"
    assert small.checkpoints == (f"{folder}=0/checkpoint_8", f"{folder}=1/checkpoint_8")


def test_the_lowest_loss_is_chosen_where_that_is_asked_for(tmp_path):
    study = sweep(tmp_path, chosen_by="cross_ent_loss")
    cells = study.cells()
    small, large = choose(study, cells, list(rows(cells)))
    assert (small.chosen["LEARNING_RATE"], large.chosen["LEARNING_RATE"]) == ("0.1", "0.01")


def test_a_setting_counts_when_all_its_seeds_have_finished(tmp_path):
    study = sweep(tmp_path)
    cells = study.cells()
    found = list(rows(cells, without=[("0.01", "small", "1")]))
    small, _ = choose(study, cells, found)
    assert (small.chosen, small.settings, small.of) == ({"LEARNING_RATE": "0.1"}, 1, 2)
    text = save_choices(study, cells, found)
    assert "tuned, size=small  0.5000" in text and "1 of 2" in text
    entries = json.loads((tmp_path / "chosen.json").read_text())
    assert entries[0]["chosen"] == {"LEARNING_RATE": "0.1"}


def test_a_study_that_chooses_nothing_writes_nothing(tmp_path):
    study = sweep(tmp_path, chosen_over=())
    cells = study.cells()
    assert save_choices(study, cells, list(rows(cells))) == ""
    assert not (tmp_path / "chosen.json").exists()


def test_an_axis_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="chosen_over names 'rate'; the axes are"):
        sweep(tmp_path, chosen_over=["rate"])
