"""Folders of vision transformers that are written: loaded by transformers, and read again."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from safetensors.numpy import load_file

from tests.checkpoints.huggingface.vit.oracle import (
    CASES,
    WITH_TEXT,
    edited,
    image_size,
    images,
    random_model,
    theirs,
)
from tests.models.vit.kinds import model as tiny
from tests.models.vit.kinds import random_params
from upcycle_jax import convert, trees, upcycle, verify
from upcycle_jax.checkpoints import create_checkpoint, model_settings, open_checkpoint
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec


def leaves(path):
    reader = open_checkpoint(epath.Path(path))
    return {name: reader.read(name) for name in reader.specs() if name.startswith(TARGET)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def loaded(name, folder):
    """The model of a folder, of which transformers misses nothing and does not know too much."""
    kind = getattr(transformers, CASES[name][0])
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    lost = [key for key in info["missing_keys"] if "pooler" not in key]
    assert not lost and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return found.eval()


def assert_loads(name, folder):
    found, pixels = loaded(name, folder), images(image_size(name))
    np.testing.assert_allclose(
        theirs(name, pixels, found), theirs(name, pixels), rtol=1e-5, atol=1e-5
    )
    if name in WITH_TEXT:
        assert_same_rest(found, random_model(name))


def assert_same_rest(found, original):
    """The text tower, bit for bit."""
    now, before = found.state_dict(), original.state_dict()
    rest = [key for key in before if "vision_model" not in key and "position_ids" not in key]
    assert any(key.startswith("text_model") for key in rest) and "logit_scale" in rest
    for key in rest:
        assert torch.equal(now[key], before[key]), key


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_written_as_it_was_read(name, written, tmp_path):
    path = write_huggingface(open_checkpoint(epath.Path(written(name))), tmp_path / "out")
    assert_same(leaves(path), leaves(written(name)))
    assert_loads(name, path)
    was, now = (json.loads((one / "config.json").read_text()) for one in (written(name), path))
    assert now["model_type"] == was["model_type"]
    assert now["architectures"] == was["architectures"]
    assert now.get("text_config") == was.get("text_config")
    side = json.loads((path / "preprocessor_config.json").read_text())["size"]["height"]
    assert side == 12
    verdicts = json.loads((path / "verdicts.json").read_text())
    assert {one["verdict"] for one in verdicts["verdicts"]} == {"exact"}


@pytest.mark.parametrize("name", [*WITH_TEXT, "vit without a head"])
def test_what_lies_beside_the_model_goes_along(name, written, tmp_path, capsys):
    """Through an Orbax checkpoint and the next, with the first folder gone."""
    shutil.copytree(written(name), tmp_path / "source")
    preparation = '{"size": {"height": 12, "width": 12}, "image_mean": [0.4, 0.4, 0.4]}'
    (tmp_path / "source/preprocessor_config.json").write_text(preparation)
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "run")]) == 0
    assert "go along, in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "source")
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "next")]) == 0
    shutil.rmtree(tmp_path / "run")
    words = [str(tmp_path / "next"), str(tmp_path / "out"), "--to=huggingface"]
    assert convert.main(words) == 0
    assert "what it was read as" in capsys.readouterr().err
    assert_loads(name, tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == preparation
    if name.startswith("vit"):
        stored = load_file(tmp_path / "out/model.safetensors")
        assert "pooler.dense.weight" in stored


@pytest.mark.parametrize("name", ["clip with its text"])
def test_images_of_another_size_keep_the_text_tower(name, written, tmp_path):
    size = ["--image_size=16", "--position_interpolation=bicubic"]
    assert convert.main([str(written(name)), str(tmp_path / "run"), *size]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to=huggingface"]) == 0
    found = loaded(name, tmp_path / "out")
    assert found.config.vision_config.image_size == 16
    assert_same_rest(found, random_model(name))
    side = json.loads((tmp_path / "out/preprocessor_config.json").read_text())["size"]
    assert side == {"height": 16, "width": 16}


def words(source, output, recipe):
    return [
        "--gin_file=runs/upcycle.gin",
        f"--gin_file=recipes/{recipe}.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH='{source}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'",
    ]


@pytest.mark.parametrize(
    "name", ["clip with its text", pytest.param("siglip with its text", marks=pytest.mark.slow)]
)
def test_a_model_with_text_is_upcycled_proved_merged_and_written(name, written, tmp_path, capsys):
    sparse = tmp_path / "run/checkpoint_0"
    assert upcycle.main(words(written(name), sparse, "paper_vision")) == 0
    said = capsys.readouterr().out
    assert "proof: PASSED" in said and "function check: PASSED" in said
    assert f"tensors beside the model of {written(name)} go along" in said
    # Damage in the text tower is damage.
    stored = sparse / "beside/model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify.main([str(sparse)]) == 1
    assert "beside/model.safetensors" in capsys.readouterr().out
    stored.write_bytes(whole)
    assert verify.main([str(sparse)]) == 0
    # A checkpoint of the run that followed, merged: what it came from is found.
    assert upcycle.main(words(sparse, tmp_path / "dense/checkpoint_0", "merge_mean")) == 0
    assert_same(leaves(tmp_path / "dense"), leaves(written(name)))
    capsys.readouterr()
    output = [str(tmp_path / "dense"), str(tmp_path / "out"), "--to=huggingface"]
    assert convert.main(output) == 0
    assert_loads(name, tmp_path / "out")
    assert_same(leaves(tmp_path / "out"), leaves(written(name)))


def stored(folder, kind, **settings):
    """A checkpoint of this library with random parameters."""
    one = tiny(kind)
    params = random_params(one)
    specs = {TARGET + path: LeafSpec(value.shape, value.dtype) for path, value in params.items()}
    record = model_settings.record(one.config.forward_settings)
    with create_checkpoint(folder / "checkpoint_3", specs, step=3, metadata=record) as writer:
        for path, value in params.items():
            writer.write(TARGET + path, None, value)
        writer.finalize()
    return one, params


def test_the_paper_s_model_is_a_siglip_classifier(tmp_path):
    """Mean of all tokens, tanh GELU, epsilon 1e-6: without a folder that it came from."""
    one, params = stored(tmp_path, "mean")
    path = write_huggingface(open_checkpoint(tmp_path), tmp_path / "out")
    found, info = transformers.SiglipForImageClassification.from_pretrained(
        path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = one.features.random(None, batch_size=2)
    expected = jax.jit(one.logits)(trees.unflatten(params), batch)
    with torch.no_grad():
        pixels = torch.from_numpy(batch["images"].transpose(0, 3, 1, 2).copy())
        logits = found.eval()(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert_same(leaves(path), {TARGET + name: value for name, value in params.items()})


REFUSED = {
    "experts": ("renormalised", (), "with experts, and Hugging Face has no class for it"),
    "a type that does not hold it": (
        "mean", ("--model_type=vit",), "vit: its features are 'class_token', the model's 'mean'",
    ),
    "a text tower that is nowhere": (
        "map", ("--model_type=siglip",), "it has a text tower, and none came with the model",
    ),
    "another reader": ("mean", ("--reader=vllm",), "'vllm' reads no vision transformer"),
    "an unknown type": ("mean", ("--model_type=llama",), "'llama' is not among vit, siglip"),
    "a projection with a bias": ("clip", (), "has a head whose bias is not zero"),
    "scores of attention pooling": ("map", (), "siglip_vision_model: it has no head"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_type_holds_is_refused(why, tmp_path, capsys):
    kind, flags, message = REFUSED[why]
    stored(tmp_path, kind)
    assert convert.main([str(tmp_path), str(tmp_path / "out"), "--to=huggingface", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_and_nothing_is_left(written, tmp_path):
    def damaged(found):
        found["vit.encoder.layer.1.output.dense.weight"][2, 3] = np.nan
        return found

    reader = open_checkpoint(epath.Path(edited(written("vit"), tmp_path / "source", damaged)))
    with pytest.raises(ValueError, match="encoder/layers_1/mlp/wo/kernel has NaN"):
        write_huggingface(reader, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
