"""Runs without an end whose checkpoints are branched, each with a cool-down of its own."""

import json
import shutil

import numpy as np
import pytest

from upcycle_jax import train
from upcycle_jax.checkpoints import open_checkpoint

pytestmark = pytest.mark.usefixtures("drawn_parameters")
SHAPE = [
    "--gin.IMAGE_SIZE=8",
    "--gin.NUM_CLASSES=3",
    "--gin.VitConfig.patch_size=4",
    "--gin.VitConfig.emb_dim=32",
    "--gin.VitConfig.num_layers=1",
    "--gin.VitConfig.num_heads=2",
    "--gin.VitConfig.mlp_dim=32",
    "--gin.VitConfig.channels=1",
]
# From a peak of 0.01 after 2 steps, with a timescale of 4; cool-downs take 3.
SCHEDULE = [
    "--gin.LEARNING_RATE=0.01",
    "--gin.WARMUP_STEPS=2",
    "--gin.TIMESCALE=4",
    "--gin.COOLDOWN_STEPS=3",
]
OFTEN = ["--gin.SAVING_PERIOD=1", "--gin.STATS_PERIOD=1"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, 8, 8), np.uint8), np.arange(12) % 3
    path = tmp_path_factory.mktemp("images") / "images.npz"
    splits = ("train", "validation")
    named = {f"{split}_images": images for split in splits}
    np.savez(path, **named, **{f"{split}_labels": labels for split in splits})
    return path


@pytest.fixture(scope="module")
def run(arrays):
    """Trains; returns MODEL_DIR."""

    def run(folder, steps, *more, files=()):
        given = ["models/vit_tiny.gin", "runs/pretrain_images.gin"]
        given += ["runs/parts/vision_optimizer.gin", *files]
        flags = [
            *(f"--gin_file={file}" for file in given),
            *SHAPE,
            *SCHEDULE,
            *OFTEN,
            "--gin.MIXTURE_OR_TASK_NAME='mine'",
            f"--gin.IMAGE_ARRAYS='{arrays}'",
            f"--gin.MODEL_DIR='{folder}'",
            f"--gin.TRAIN_STEPS={steps}",
            "--gin.BATCH_SIZE=8",
            "--gin.train.train_eval_dataset_cfg=None",
            *more,
        ]
        assert train.main(flags) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def trunk(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "trunk", 8, "--gin.SAVING_PERIOD=6")


@pytest.fixture(scope="module")
def branch(run, trunk, tmp_path_factory):
    """The branch from step 6 to 9: begun, gone on with, or finished already."""
    folder = tmp_path_factory.mktemp("branches") / "cooled"
    start = f"--gin.INITIAL_CHECKPOINT_PATH='{trunk}/checkpoint_6'"
    return lambda: run(folder, 9, start, files=["runs/parts/cool_down.gin"])


def rows(folder):
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def test_a_branch_cools_down_from_the_trunk(trunk, branch):
    folder = branch()
    trunk_rows, cooled = rows(trunk), rows(folder)
    assert sorted(cooled) == [7, 8, 9]
    # The batch and the state after step 6 are the trunk's.
    assert cooled[7]["loss"] == trunk_rows[7]["loss"]
    # The update from step t on: t = 6 is where the cool-down begins, 0.01 / sqrt(1 + (6 - 2) / 4).
    first = 0.01 / 2**0.5
    rates = [cooled[step]["learning_rate"] for step in (7, 8, 9)]
    np.testing.assert_allclose(rates, [first, first * 2 / 3, first / 3], rtol=1e-5)
    np.testing.assert_allclose(trunk_rows[8]["learning_rate"], 0.01 / (1 + 5 / 4) ** 0.5, rtol=1e-5)


@pytest.mark.slow
def test_a_branch_is_resumed_with_its_own_end(branch):
    last = branch() / "checkpoint_9"
    reader = open_checkpoint(last)
    whole = {name: reader.read(name) for name in reader.specs()}
    for step in (8, 9):  # as if it had been killed after step 7
        shutil.rmtree(last.parent / f"checkpoint_{step}")
    branch()
    found = open_checkpoint(last)
    assert found.specs().keys() == whole.keys()
    for name, expected in whole.items():
        np.testing.assert_array_equal(found.read(name), expected, err_msg=name)
