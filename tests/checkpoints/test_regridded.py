"""The command `convert` with images of another size."""

import json

import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE, in_big_vision, model, random_params
from upcycle_jax import convert
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.layers.position_grids import interpolate
from upcycle_jax.trees import LeafSpec

POSITIONS = "target/pos_embedding"
# `class_token`: 3 x 3 positions of patches of 4 pixels; the class token has its own.
LARGER = ["--image_size=20", "--position_interpolation=bilinear"]


@pytest.fixture
def archive(tmp_path):
    params = random_params(model("class_token"))
    np.savez(tmp_path / "model.npz", **in_big_vision(params, SHAPE["num_heads"]))
    return tmp_path / "model.npz"


def test_every_form_has_the_interpolated_positions(archive, tmp_path, capsys):
    source = open_checkpoint(archive)
    expected = interpolate(source.read(POSITIONS), 5, "bilinear")
    assert convert.main([str(archive), str(tmp_path / "orbax"), *LARGER]) == 0
    assert "positions: bilinear 3 x 3 -> 5 x 5" in capsys.readouterr().err
    larger = open_checkpoint(tmp_path / "orbax")
    assert larger.metadata()["positions"] == "bilinear 3 x 3 -> 5 x 5"
    for name in source.specs():
        if name == POSITIONS:
            np.testing.assert_array_equal(larger.read(name), expected)
        else:
            np.testing.assert_array_equal(larger.read(name), source.read(name))
    to_npz = [str(archive), str(tmp_path / "larger.npz"), "--to=npz", *LARGER]
    assert convert.main(to_npz) == 0
    found = open_checkpoint(tmp_path / "larger.npz")
    np.testing.assert_array_equal(found.read(POSITIONS), expected)
    np.testing.assert_array_equal(found.read("target/cls"), source.read("target/cls"))


def test_a_folder_of_hugging_face_states_the_size(archive, tmp_path):
    words = ["--to=huggingface", "--image_size=20", "--position_interpolation=bicubic"]
    assert convert.main([str(archive), str(tmp_path / "folder"), *words]) == 0
    assert json.loads((tmp_path / "folder/config.json").read_text())["image_size"] == 20
    expected = interpolate(open_checkpoint(archive).read(POSITIONS), 5, "bicubic")
    found = open_checkpoint(tmp_path / "folder").read(POSITIONS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cannot_be_is_refused(archive, tmp_path, capsys):
    def refused(*words, source=archive):
        assert convert.main([str(source), str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    assert "belong together" in refused("--image_size=20")
    assert "belong together" in refused("--position_interpolation=bicubic")
    assert "got 'nearest'" in refused("--image_size=20", "--position_interpolation=nearest")
    said = refused("--image_size=22", "--position_interpolation=bicubic")
    assert "images of 22 pixels do not divide into the patches" in said
    slots = dict(open_checkpoint(archive).specs())
    slots["state/param_states/pos_embedding/v"] = LeafSpec((1, 9, 16), np.dtype("float32"))
    record = {"model_settings": dict(open_checkpoint(archive).model_settings())}
    writer = create_checkpoint(tmp_path / "checkpoint_3", slots, step=3, metadata=record)
    for name, spec in slots.items():
        writer.write(name, None, np.zeros(spec.shape, spec.dtype))
    writer.finalize()
    assert "--optimizer_state drop" in refused(*LARGER, source=tmp_path / "checkpoint_3")
    assert not (tmp_path / "out").exists()
