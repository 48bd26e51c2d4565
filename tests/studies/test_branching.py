"""Branches: where cells start that leave another one before its end, and whether that keeps the
checkpoint.
"""

import pytest

from upcycle_jax.studies.branching import lost_starts
from upcycle_jax.studies.sweep import Stage, Sweep
from upcycle_jax.training.config import SaveCheckpointConfig

TRUNK = Stage(name="trunk", gin_files=["t.gin"], steps=30)


def sweep(start_after, *, trunk=TRUNK):
    branch = Stage(name="cooled", gin_files=["c.gin"], steps=5, start_from="trunk", axes=["point"])
    points = {f"{after}": {"start_after": after} for after in start_after}
    return Sweep(name="s", sweep_dir="/r", stages=[trunk, branch], axes={"point": points})


def test_each_branch_starts_from_a_checkpoint_of_the_trunk():
    trunk, *branches = sweep([10, 20, 30]).cells()
    assert (trunk.start_step, trunk.end_step) == (0, 30)
    assert [(cell.start_step, cell.end_step) for cell in branches] == [(10, 15), (20, 25), (30, 35)]
    assert all(cell.needs == ("trunk",) for cell in branches)
    assert branches[0].gin[1] == [
        "INITIAL_CHECKPOINT_PATH='/r/cells/trunk/checkpoint_10'",
        "MODEL_DIR='/r/cells/cooled-point=10'",
        "TRAIN_STEPS=15",
    ]


def test_branches_count_from_where_their_trunk_starts():
    dense = Stage(name="dense", gin_files=["d.gin"], steps=100)
    trunk = Stage(name="trunk", gin_files=["t.gin"], steps=30, start_from="dense")
    branch = Stage(name="cooled", gin_files=["c.gin"], steps=5, start_from="trunk", start_after=20)
    cells = Sweep(name="s", sweep_dir="/r", stages=[dense, trunk, branch]).cells()
    assert (cells[2].start_step, cells[2].end_step) == (120, 125)
    assert "INITIAL_CHECKPOINT_PATH='/r/cells/trunk/checkpoint_120'" in cells[2].gin[1]


@pytest.mark.parametrize("after", [0, 31, 2.5, "end"])
def test_a_branch_must_leave_while_the_trunk_runs(after):
    with pytest.raises(ValueError, match="does 30 updates: give a number from 1 to 30"):
        sweep([after]).cells()


def test_a_branch_needs_a_stage_that_it_leaves():
    with pytest.raises(ValueError, match="start_after of 'a' is 5, without a stage"):
        Stage(name="a", gin_files=["a.gin"], steps=1, start_after=5)


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        ({"period": 10}, None),
        ({"period": 8}, "saves every 8 steps"),
        # After step 20 come 25 and the last: with those, three are kept.
        ({"period": 5, "keep": 3}, None),
        ({"period": 5, "keep": 2}, "keeps its 2 latest checkpoints only"),
        ({"period": 5, "keep": 1, "keep_period": 20}, None),
        (None, "saves no checkpoints"),
    ],
)
def test_a_checkpoint_that_will_not_be_there_is_noticed_before(save, reason):
    saves = {"trunk": None if save is None else SaveCheckpointConfig(**save)}
    found = lost_starts(sweep([20]).cells(), saves)
    if reason is None:
        assert found == []
    else:
        assert found == [
            f"cell cooled-point=20 starts from step 20 of trunk, which {reason}: bind SAVING_PERIOD"
            " and KEEP_CHECKPOINTS of that stage so that this checkpoint is there"
        ]
