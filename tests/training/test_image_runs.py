"""Runs of vision transformers: trained, stopped and resumed, upcycled while they restore."""

import json
import shutil

import numpy as np
import pytest

from upcycle_jax import eval as evaluate
from upcycle_jax import train, trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.layers.position_grids import interpolate

pytestmark = pytest.mark.usefixtures("drawn_parameters")
SHAPE = [
    "--gin.IMAGE_SIZE=8",
    "--gin.NUM_CLASSES=3",
    "--gin.VitConfig.patch_size=4",
    "--gin.VitConfig.emb_dim=8",
    "--gin.VitConfig.num_layers=2",
    "--gin.VitConfig.num_heads=2",
    "--gin.VitConfig.mlp_dim=16",
    "--gin.VitConfig.channels=1",
]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 8, 8), np.uint8)
    labels = np.arange(12) % 3
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        validation_images=images,
        validation_labels=labels,
    )
    return path


def flags(arrays, folder, steps, *more, model="vit_tiny", run="pretrain_images"):
    return [
        f"--gin_file=models/{model}.gin",
        f"--gin_file=runs/{run}.gin",
        *SHAPE,
        "--gin.MIXTURE_OR_TASK_NAME='mine'",
        f"--gin.IMAGE_ARRAYS='{arrays}'",
        f"--gin.MODEL_DIR='{folder}'",
        f"--gin.TRAIN_STEPS={steps}",
        "--gin.BATCH_SIZE=8",
        "--gin.EVAL_PERIOD=100",
        "--gin.EVAL_STEPS=1",
        "--gin.STATS_PERIOD=1",
        *more,
    ]


def losses(folder):
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def dense(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert train.main(flags(arrays, folder, 4, "--gin.SAVING_PERIOD=2")) == 0
    return folder


def test_a_resumed_run_is_the_uninterrupted_one(arrays, dense, tmp_path):
    """Killed after step 2."""
    parts = shutil.copytree(dense, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint_4")
    assert train.main(flags(arrays, parts, 4)) == 0
    starts = json.loads((parts / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    assert losses(parts) == losses(dense)
    found, expected = (open_checkpoint(run / "checkpoint_4") for run in (parts, dense))
    assert not trees.diff(found.specs(), expected.specs())
    for name in expected.specs():
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)


@pytest.mark.slow
def test_a_resumed_run_of_a_mixture_is_the_uninterrupted_one(arrays, tmp_path):
    """Glyphs and images, one to three, killed after step 2."""
    mixture = f"--gin.IMAGE_MIXTURE={{'mine': ('{arrays}', 3), 'glyphs': 1}}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [mixture, "--gin.MIXTURE_OR_TASK_NAME='both'", "--gin.GLYPH_CLASSES=3"]
    more.append("--gin.IMAGE_ARRAYS=None")  # Refused beside a mixture.
    assert train.main(flags(arrays, whole, 4, "--gin.SAVING_PERIOD=2", *more)) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint_4")
    assert train.main(flags(arrays, parts, 4, *more)) == 0
    assert losses(parts) == losses(whole)
    assert (whole / "training_eval" / "glyphs").is_dir()
    assert (whole / "training_eval" / "mine").is_dir()


def test_a_checkpoint_is_evaluated_as_its_run_was(arrays, dense, tmp_path):
    command = [
        "--gin_file=models/vit_tiny.gin",
        "--gin_file=runs/eval_images.gin",
        *SHAPE,
        "--gin.MIXTURE_OR_TASK_NAME='mine'",
        f"--gin.IMAGE_ARRAYS='{arrays}'",
        f"--gin.CHECKPOINT_PATH='{dense}'",
        f"--gin.EVAL_OUTPUT_DIR='{tmp_path}'",
        "--gin.BATCH_SIZE=8",
        "--gin.EVAL_STEPS=1",
    ]
    assert evaluate.main(command) == 0
    lines = (tmp_path / "inference_eval" / "mine" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    lines = (dense / "training_eval" / "mine" / "metrics.jsonl").read_text().splitlines()
    wanted = json.loads(lines[-1])
    assert found["step"] == wanted["step"] == 4
    for name in ("accuracy", "cross_ent_loss"):
        assert found[f"teacher_forced/{name}"] == pytest.approx(wanted[name], rel=1e-5)
    assert evaluate.main([*command, "--gin.TEACHER_FORCED=False"]) == 2


def test_a_dense_run_goes_on_with_experts(arrays, dense, tmp_path):
    """With room for all and renormalised weights, the sparse model's first loss is the dense one's
    next.
    """
    sparse = tmp_path / "sparse"
    room = ["--gin.NUM_EXPERTS=2", "--gin.GROUP_SIZE=16", "--gin.TRAIN_EXPERT_CAPACITY_FACTOR=2.0"]
    more = [
        *room,
        f"--gin.INITIAL_CHECKPOINT_PATH='{dense}/checkpoint_2'",
        "--gin.RECIPE=@Recipe()",
    ]
    settings = {"model": "vit_tiny_upcycled", "run": "continue_pretrain_images"}
    assert train.main(flags(arrays, sparse, 3, *more, **settings)) == 0
    assert losses(sparse)[3] == pytest.approx(losses(dense)[3], rel=1e-5)
    kernel = open_checkpoint(sparse).read("target/encoder/layers_1/mlp/expert/wi/kernel")
    assert kernel.shape == (2, 8, 16)


def test_a_run_goes_on_with_larger_images(arrays, dense, tmp_path, capsys):
    """2 x 2 positions become 4 x 4 while they restore; their optimizer slots start afresh."""
    wide = tmp_path / "wide.npz"
    with np.load(arrays) as small:
        images = {name: values for name, values in small.items() if "labels" in name}
        for name in ("train_images", "validation_images"):
            images[name] = small[name].repeat(2, axis=1).repeat(2, axis=2)
    np.savez(wide, **images)
    more = [
        f"--gin.INITIAL_CHECKPOINT_PATH='{dense}/checkpoint_4'",
        "--gin.IMAGE_SIZE=16",
        "--gin.LEARNING_RATE=1e-9",
    ]
    words = flags(wide, tmp_path / "run", 5, *more, run="continue_pretrain_images")
    assert train.main(words) == 2
    assert "of images of another size: set RestoreCheckpointConfig" in capsys.readouterr().err
    recipe = [
        "--gin.RECIPE=@Recipe()",
        "--gin.Recipe.position_interpolation='bicubic'",
        "--gin.Recipe.optimizer_state='tiled'",
    ]
    assert train.main([*words, *recipe]) == 0
    before = open_checkpoint(dense / "checkpoint_4").read("target/pos_embedding")
    after = open_checkpoint(tmp_path / "run/checkpoint_5").read("target/pos_embedding")
    np.testing.assert_allclose(after, interpolate(before, 4, "bicubic"), atol=1e-6)
