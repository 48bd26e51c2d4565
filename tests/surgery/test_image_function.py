"""What a conversion of a vision transformer does to its function, compared on glyphs and noise."""

import json

import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE, VitModel, in_big_vision, random_params
from upcycle_jax import upcycle, verify
from upcycle_jax.models.vit.config import VitConfig


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A dense model under big_vision's names."""
    path = tmp_path_factory.mktemp("dense") / "model.npz"
    params = random_params(VitModel(VitConfig(**SHAPE)))
    np.savez(path, **in_big_vision(params, SHAPE["num_heads"]))
    return path


def words(archive, output, recipe, images):
    files = ["models/vit_tiny_upcycled.gin", f"runs/{images}.gin", f"recipes/{recipe}.gin"]
    shape = {"IMAGE_SIZE": 12, "NUM_CLASSES": 7, "GROUP_SIZE": 18, "OPTIMIZER": None}
    shape |= {f"VitConfig.{name}": SHAPE[name] for name in SHAPE if name not in (
        "image_size", "num_classes")}  # fmt: skip
    return [
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{name}={value}" for name, value in shape.items()),
        "--gin.Recipe.step='reset'",
        # 18 tokens of two images, C = 4 * 18 / 4: room for all.
        "--gin.EVAL_EXPERT_CAPACITY_FACTOR=4.0",
        f"--gin.INITIAL_CHECKPOINT_PATH='{archive}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'",
    ]


SEEN = {
    "upcycle_images": "first batch of glyphs, split validation",
    "upcycle": "2 images of 12 x 12",
}


@pytest.mark.parametrize(
    "images", ["upcycle_images", pytest.param("upcycle", marks=pytest.mark.slow)]
)
def test_renormalised_copies_keep_the_function(images, archive, tmp_path, capsys):
    given = words(archive, tmp_path / "sparse", "paper_vision", images)
    assert upcycle.main(given) == 0
    said = capsys.readouterr().out
    assert "its function, as predicted: exact" in said
    assert "function check: PASSED; predicted: exact" in said and SEEN[images] in said
    assert verify.main(given) == 0


def test_new_experts_change_it_and_that_is_foreseen(archive, tmp_path, capsys):
    output = tmp_path / "sparse"
    assert upcycle.main(words(archive, output, "random_experts", "upcycle_images")) == 0
    said = capsys.readouterr().out
    assert "its function, as predicted: not preserved (FreshExperts changes the experts)" in said
    assert "function check: PASSED; predicted: not preserved" in said
    function = json.loads((output / "proof.json").read_text())["function"]
    assert function["prediction"]["verdict"] == "not preserved"
