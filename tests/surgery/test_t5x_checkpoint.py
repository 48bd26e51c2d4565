"""A checkpoint that T5X wrote: its tree is this library's own, slot for slot, and it is upcycled
like any other.
"""

import pathlib

import numpy as np
import pytest

from upcycle_jax import trees, upcycle
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.t5.from_specs import from_specs
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.train_state import state_specs

SOURCE = (
    pathlib.Path(__file__).parents[3]
    / "shared"
    / "reference"
    / "t5x_testdata"
    / "test_t5_tiny.checkpoint_0"
)

pytestmark = pytest.mark.skipif(
    not SOURCE.exists(), reason="the checkpoint that T5X wrote is not beside this repository"
)


def test_the_train_state_is_t5x_s_leaf_for_leaf():
    found = open_checkpoint(SOURCE).specs()
    ours = state_specs(EncoderDecoderModel(from_specs(found, {})), Adafactor())
    assert len(found) == 52 + 4 * 52 + 1  # Parameters, four slots of each, the step.
    assert not trees.diff(ours, found, compare_dtype=True)


def test_it_is_upcycled_by_the_command(tmp_path):
    paths = [
        f"--gin.INITIAL_CHECKPOINT_PATH='{SOURCE}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{tmp_path / 'checkpoint_0'}'",
    ]
    state = ["--gin.Recipe.optimizer_state='tiled'", "--gin.FUNCTION_CHECK='off'"]
    assert upcycle.main(["--gin_file=runs/upcycle.gin", *paths, *state]) == 0
    dense, sparse = open_checkpoint(SOURCE), open_checkpoint(tmp_path / "checkpoint_0")
    for name in (
        "target/decoder/layers_1/mlp/{}wo/kernel",
        "state/param_states/decoder/layers_1/mlp/{}wo/kernel/v",
    ):
        experts = sparse.read(name.format("expert/"))
        assert experts.shape[0] == 32
        np.testing.assert_array_equal(experts[17], dense.read(name.format("")))
