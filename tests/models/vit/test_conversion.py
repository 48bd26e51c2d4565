"""The command `upcycle` from an archive of parameters: plan, proof and function check on images."""

import json

import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE, VitModel, in_big_vision, random_params
from upcycle_jax import upcycle, verify
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.vit.config import VitConfig


@pytest.fixture
def archive(tmp_path):
    """A dense model under big_vision's names."""
    params = random_params(VitModel(VitConfig(**SHAPE)))
    np.savez(tmp_path / "model.npz", **in_big_vision(params, SHAPE["num_heads"]))
    return tmp_path / "model.npz"


def words(archive, output, *more):
    files = ["models/vit_tiny_upcycled.gin", "runs/upcycle.gin", "recipes/paper_vision.gin"]
    shape = {"IMAGE_SIZE": 12, "NUM_CLASSES": 7, "GROUP_SIZE": 18}
    shape |= {f"VitConfig.{name}": SHAPE[name] for name in SHAPE if name not in (
        "image_size", "num_classes")}  # fmt: skip
    return [
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{name}={value}" for name, value in shape.items()),
        f"--gin.INITIAL_CHECKPOINT_PATH='{archive}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'",
        *more,
    ]


def test_an_archive_becomes_experts_and_is_proved(archive, tmp_path, capsys):
    output = tmp_path / "sparse"
    # 18 tokens, C = 4 * 18 / 4: room for all, so that copies compute what the dense model does.
    room = "--gin.EVAL_EXPERT_CAPACITY_FACTOR=4.0"
    assert upcycle.main(words(archive, output, room)) == 0
    said = capsys.readouterr().out
    assert "proof: PASSED" in said and "2 images of 12 x 12" in said
    assert "function check: PASSED; predicted: exact" in said
    result = open_checkpoint(output)
    kernel = result.read("target/encoder/layers_3/mlp/expert/wi/kernel")
    bias = result.read("target/encoder/layers_3/mlp/expert/wi/bias")
    source = open_checkpoint(archive)
    for expert in range(4):
        dense = "target/encoder/layers_3/mlp/wi"
        np.testing.assert_array_equal(kernel[expert], source.read(f"{dense}/kernel"))
        np.testing.assert_array_equal(bias[expert], source.read(f"{dense}/bias"))
    assert verify.main(words(archive, output, room)) == 0


def test_the_drop_at_a_small_capacity_is_told(archive, tmp_path, capsys):
    output = tmp_path / "sparse"
    assert upcycle.main(words(archive, output, "--gin.EVAL_EXPERT_CAPACITY_FACTOR=1.0")) == 0
    said = capsys.readouterr().out
    assert "proof: PASSED" in said and "predicted: scaled by the gate sum" in said
    proof = json.loads((output / "proof.json").read_text())
    assert proof
