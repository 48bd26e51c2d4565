"""The command `upcycle` from an archive of parameters: plan, proof and function check on images."""

import json

import numpy as np
import pytest

from tests.models.vit import kinds
from tests.models.vit.kinds import VitModel, in_big_vision, random_params
from upcycle_jax import upcycle, verify
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.vit.config import VitConfig

SHAPE = kinds.SHAPE | {"num_layers": 2}


@pytest.fixture
def archive(tmp_path):
    """A dense model under big_vision's names."""
    params = random_params(VitModel(VitConfig(**SHAPE)))
    np.savez(tmp_path / "model.npz", **in_big_vision(params, SHAPE["num_heads"]))
    return tmp_path / "model.npz"


def words(archive, output, *more, size=12):
    files = ["models/vit_tiny_upcycled.gin", "runs/upcycle.gin", "recipes/paper_vision.gin"]
    shape = {"IMAGE_SIZE": size, "NUM_CLASSES": 7, "GROUP_SIZE": 2 * (size // 4) ** 2}
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
    kernel = result.read("target/encoder/layers_1/mlp/expert/wi/kernel")
    bias = result.read("target/encoder/layers_1/mlp/expert/wi/bias")
    source = open_checkpoint(archive)
    for expert in range(4):
        dense = "target/encoder/layers_1/mlp/wi"
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


BILINEAR = "--gin.Recipe.position_interpolation='bilinear'"


def test_images_of_another_size_take_interpolated_positions(archive, tmp_path, capsys):
    """3 x 3 positions become 5 x 5; with them the source is the function that copies keep."""
    output = tmp_path / "sparse"
    room = "--gin.EVAL_EXPERT_CAPACITY_FACTOR=4.0"
    assert upcycle.main(words(archive, output, room, BILINEAR, size=20)) == 0
    said = capsys.readouterr().out
    assert "bilinear 3 x 3 -> 5 x 5" in said and "proof: PASSED" in said
    assert "2 images of 20 x 20" in said and "function check: PASSED; predicted: exact" in said
    plan = json.loads((output / "plan.json").read_text())
    assert plan["recipe"]["position_interpolation"] == "bilinear"
    result, source = open_checkpoint(output), open_checkpoint(archive)
    grid = source.read("target/pos_embedding").reshape(3, 3, -1)
    found = result.read("target/pos_embedding").reshape(5, 5, -1)
    # Corners stay; the third of five lies on the second of three, the second half way before it.
    np.testing.assert_array_equal(found[::4, ::4], grid[::2, ::2])
    np.testing.assert_allclose(found[2, 1], (grid[1, 0] + grid[1, 1]) / 2, rtol=1e-6)

    assert "bilinear 3 x 3 -> 5 x 5" in (output / "proof.json").read_text()

    # The record says how, whatever is asked for later.
    cubic = BILINEAR.replace("bilinear", "bicubic")
    assert verify.main(words(archive, output, room, cubic, size=20)) == 0
    assert "position_interpolation is 'bicubic', recorded 'bilinear'" in capsys.readouterr().out


def test_without_the_setting_another_size_is_refused(archive, tmp_path, capsys):
    assert upcycle.main(words(archive, tmp_path / "sparse", size=20)) == 2
    said = capsys.readouterr().err
    assert "target/pos_embedding: copy of float32[1,9,16] gives shape [1, 9, 16]" in said
    assert "Recipe.position_interpolation = 'bilinear'" in said
    assert not (tmp_path / "sparse").exists()


def test_experts_are_carried_to_another_size(archive, tmp_path, capsys):
    first, second = tmp_path / "small", tmp_path / "large"
    assert upcycle.main(words(archive, first, "--gin.upcycle.function_check='off'")) == 0
    assert upcycle.main(words(first, second, BILINEAR, size=20)) == 0
    said = capsys.readouterr().out
    assert "the source's experts are carried over as they are" in said and "PASSED" in said
    before, after = open_checkpoint(first), open_checkpoint(second)
    for name, spec in after.specs().items():
        if "pos_embedding" not in name:
            np.testing.assert_array_equal(after.read(name), before.read(name))
        else:
            assert spec.shape == (1, 25, 16)


def test_a_head_for_other_classes_starts_at_zero(archive, tmp_path, capsys):
    """The rest is compared with the source, whose head is at zero too; the experts are carried to
    yet other classes.
    """
    first, second = tmp_path / "three", tmp_path / "four"
    head = "--gin.Recipe.zeroed='head/.*'"
    room = "--gin.EVAL_EXPERT_CAPACITY_FACTOR=4.0"
    assert upcycle.main(words(archive, first, head, room, "--gin.NUM_CLASSES=3")) == 0
    said = capsys.readouterr().out
    assert "function check: PASSED; predicted: exact" in said
    assert "the source with head/bias, head/kernel at zero, too" in said
    assert (open_checkpoint(first).read("target/head/kernel") == np.zeros((16, 3))).all()

    assert upcycle.main(words(first, second, "--gin.NUM_CLASSES=4")) == 2
    assert upcycle.main(words(first, second, head, "--gin.NUM_CLASSES=4")) == 0
    before, after = open_checkpoint(first), open_checkpoint(second)
    assert after.spec("target/head/kernel").shape == (16, 4)
    for name in after.specs():
        if "head/" not in name:
            np.testing.assert_array_equal(after.read(name), before.read(name))
