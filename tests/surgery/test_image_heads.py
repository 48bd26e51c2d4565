"""Conversions of vision transformers whose head, images or files are not the model's: another head
where that is asked for, else one clear error and nothing written.
"""

import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE, VitModel, in_big_vision, random_params
from upcycle_jax import upcycle, verify
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.vit.config import VitConfig


@pytest.fixture(scope="module")
def dense():
    """Arrays of a dense model under big_vision's names."""
    params = random_params(VitModel(VitConfig(**SHAPE)))
    return in_big_vision(params, SHAPE["num_heads"])


@pytest.fixture
def archive(dense, tmp_path):
    np.savez(tmp_path / "model.npz", **dense)
    return tmp_path / "model.npz"


def run(source, output, *more, command=upcycle.main, **changes):
    files = ["models/vit_tiny_upcycled.gin", "runs/upcycle.gin", "recipes/paper_vision.gin"]
    names = {"image_size": "IMAGE_SIZE", "num_classes": "NUM_CLASSES"}
    shape = {names.get(k, f"VitConfig.{k}"): v for k, v in SHAPE.items()}
    shape |= {"GROUP_SIZE": 18, "EVAL_EXPERT_CAPACITY_FACTOR": 4.0} | changes
    return command([
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{name}={value}" for name, value in shape.items()),
        f"--gin.INITIAL_CHECKPOINT_PATH='{source}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'",
        *more,
    ])  # fmt: skip


NEW_HEAD = "--gin.Recipe.zeroed='head/.*'"


def test_a_new_head_starts_at_zero(archive, tmp_path, capsys):
    assert run(archive, tmp_path / "sparse", NEW_HEAD, NUM_CLASSES=3) == 0
    said = capsys.readouterr().out
    assert "the recipe starts it at zero" in said and "proof: PASSED" in said
    assert "the source with head/bias, head/kernel at zero, too" in said
    assert "function check: PASSED; predicted: exact" in said
    head = open_checkpoint(tmp_path / "sparse").read("target/head/kernel")
    assert head.shape == (16, 3) and not head.any()
    assert run(archive, tmp_path / "sparse", NEW_HEAD, NUM_CLASSES=3, command=verify.main) == 0


@pytest.mark.slow
def test_a_head_is_left_out(archive, tmp_path, capsys):
    drop = "--gin.Recipe.drop='target/head/.*'"
    assert run(archive, tmp_path / "sparse", drop, NUM_CLASSES=0) == 0
    said = capsys.readouterr().out
    assert "named in Recipe.drop" in said and "function check: PASSED; predicted: exact" in said
    assert "target/head/kernel" not in open_checkpoint(tmp_path / "sparse").specs()


def without_head(arrays):
    return {name: value for name, value in arrays.items() if not name.startswith("head")}


REFUSED = {
    "other classes": (
        {"NUM_CLASSES": 3}, (), None,
        "the source's head has 7 classes, the model's 3: set NUM_CLASSES = 7, or Recipe.zeroed ="
        " 'head/.*' for a new head",
    ),
    "no head in the source": ({}, (), without_head, "the source has no head: set NUM_CLASSES = 0"),
    "no head in the model": ({"NUM_CLASSES": 0}, (), None, "name them in Recipe.drop if they may"),
    "another size of images": (
        {"IMAGE_SIZE": 16}, (), None, "set IMAGE_SIZE to the source's, or Recipe.position_interpo",
    ),
    "a patch that does not divide": (
        {"IMAGE_SIZE": 14}, (), None, "patch_size=4 does not divide image_size=14",
    ),
    "another patch": (
        {"VitConfig.patch_size": 6}, (), None, "float32[4,4,3,16] gives shape [4, 4, 3, 16], the",
    ),
    "nothing to start at zero": (
        {}, ("--gin.Recipe.zeroed='tail/.*'",), None, "'tail/.*' fits no parameter",
    ),
    "no regular expression": (
        {}, ("--gin.Recipe.zeroed='('",), None, "Recipe.zeroed: '(' is no regular expression",
    ),
    "another activation": (
        {"VitConfig.mlp_activations": "('gelu_exact',)"}, (), None,
        "states mlp_activations ('gelu',), the model of this run has ('gelu_exact',)",
    ),
    "another epsilon": (
        {"VitConfig.norm_epsilon": 1e-5}, (), None, "states norm_epsilon 1e-06, the model of this",
    ),
    "other heads": (
        {"VitConfig.num_heads": 2}, (), None, "states num_heads 4, the model of this run has 2",
    ),
    "another pooling": (
        {"VitConfig.pool": "'class_token'"}, (), None, "states pool 'mean', the model of this run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_once(why, dense, tmp_path, capsys):
    changes, words, edit, message = REFUSED[why]
    np.savez(tmp_path / "model.npz", **(edit(dense) if edit else dense))
    assert run(tmp_path / "model.npz", tmp_path / "sparse", *words, **changes) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]


def test_nan_in_the_source_is_refused(dense, tmp_path, capsys):
    kernel = dense["Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"].copy()
    kernel[2, 3] = np.nan
    changed = dense | {"Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel": kernel}
    np.savez(tmp_path / "model.npz", **changed)
    assert run(tmp_path / "model.npz", tmp_path / "sparse") == 2
    said = capsys.readouterr().err
    assert "encoder/layers_1/mlp/wi/kernel has 1 NaN or infinite values. Nothing was" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
