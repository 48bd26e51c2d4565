"""The checkpoints of a MODEL_DIR by their steps."""

import numpy as np
import pytest
from etils import epath

from upcycle_jax.checkpoints import CheckpointManager, latest_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.steps import check_name, checkpoint_steps, step_folders


def test_steps_are_found_by_name_and_names_are_compared_with_the_content(tmp_path, caplog):
    with CheckpointManager(tmp_path / "run") as manager:
        for step in (2, 12):
            manager.save(step, {"target": {"a": np.zeros(3)}, "state": {"step": np.int32(step)}})
    folder = epath.Path(tmp_path / "run")
    (folder / "checkpoint_2").rename(folder / "checkpoint_0002")
    assert {step: path.name for step, path in step_folders(folder).items()} == {
        2: "checkpoint_0002",
        12: "checkpoint_12",
    }
    check_name(open_checkpoint(folder / "checkpoint_0002"))
    (folder / "checkpoint_12").rename(folder / "checkpoint_120")
    with pytest.raises(ValueError, match=r"named for step 120, but it holds step 12: rename it"):
        check_name(open_checkpoint(folder))
    (folder / "checkpoint_120" / "state" / "_METADATA").unlink()
    assert latest_checkpoint(folder).name == "checkpoint_0002"
    assert "checkpoint_120 holds no array tree: it is damaged, and is passed over" in caplog.text
    (folder / "checkpoint_02").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint_0002 and checkpoint_02, which name the same"):
        checkpoint_steps(folder)
    assert step_folders(folder / "nowhere") == {}
