"""Folders of vision transformers, written by transformers and computed here."""

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import upcycle_jax as uj
from tests.checkpoints.huggingface.vit.oracle import CASES, edited, image_size, images, theirs
from upcycle_jax import trees, upcycle, verify
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.state_tree import TARGET


def ours(folder, pixels):
    """Features or logits of the model that a folder holds."""
    reader, model = open_checkpoint(epath.Path(folder)), uj.build_model(str(folder))
    params = {path.removeprefix(TARGET): reader.read(path) for path in reader.specs()}
    specs = model.param_specs()
    assert {path: value.shape for path, value in params.items()} == {
        path: spec.shape for path, spec in specs.items()
    }
    labels = np.zeros(len(pixels), np.int32)
    batch = model.features.batch(pixels, labels, len(pixels))
    return jax.jit(model.logits)(trees.unflatten(params), batch)


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits_are_those_of_transformers(name, written):
    pixels = images(image_size(name))
    # What is beyond the last whole patch is seen by neither.
    found = ours(written(name), pixels[:, :12, :12])
    np.testing.assert_allclose(found, theirs(name, pixels), rtol=1e-5, atol=1e-5)


def leaves(folder):
    reader = open_checkpoint(epath.Path(folder))
    return {path: reader.read(path) for path in reader.specs()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_names_of_transformers_4_are_read(name, written, tmp_path):
    def older(found):
        found = {f"vision_model.{path}": value for path, value in found.items()}
        return found | {"vision_model.embeddings.position_ids": np.arange(10)[None]}

    folder = edited(written(name), tmp_path / "older", older)
    assert_same(leaves(folder), leaves(written(name)))


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_the_class_token_has_its_position_and_patches_theirs(name, written):
    stored = load_file(written(name) / "model.safetensors")
    tensors = {path.removeprefix("vit."): value for path, value in stored.items()}
    token, positions = {
        "vit": ("embeddings.cls_token", "embeddings.position_embeddings"),
        "clip": ("embeddings.class_embedding", "embeddings.position_embedding.weight"),
    }[name]
    table = tensors[positions].reshape(10, 16)
    found = leaves(written(name))
    np.testing.assert_array_equal(found["target/pos_embedding"], table[None, 1:])
    np.testing.assert_array_equal(found["target/cls"][0, 0], tensors[token].reshape(16) + table[0])


def test_bfloat16_stays_and_the_sum_is_float32(written, tmp_path):
    def halved(found):
        return {path: value.astype(ml_dtypes.bfloat16) for path, value in found.items()}

    folder = edited(written("vit"), tmp_path / "bfloat16", halved)
    found, exact = leaves(folder), leaves(written("vit"))
    wide = {path for path, value in found.items() if value.dtype == np.float32}
    assert wide == {"target/cls"}
    kernel = "target/embedding/kernel"
    np.testing.assert_array_equal(found[kernel], exact[kernel].astype(ml_dtypes.bfloat16))
    tensors = halved(load_file(written("vit") / "model.safetensors"))
    token = tensors["vit.embeddings.cls_token"].astype(np.float32)
    first = tensors["vit.embeddings.position_embeddings"].astype(np.float32)[:, :1]
    np.testing.assert_array_equal(found["target/cls"], token + first)


@pytest.mark.parametrize("path", ["target/embedding/kernel", "target/cls"])
def test_computed_leaves_are_read_in_parts(path, written):
    reader = open_checkpoint(epath.Path(written("vit")))
    whole = reader.read(path)
    part = tuple(slice(size // 2, size) for size in whole.shape)
    assert reader.read(path, part).flags.c_contiguous
    np.testing.assert_array_equal(reader.read(path, part), whole[part])


def test_a_tower_becomes_experts_and_is_proved(written, tmp_path, capsys):
    words = [
        "--gin_file=runs/upcycle.gin",
        "--gin_file=recipes/paper_vision.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH='{written('siglip')}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{tmp_path / 'sparse'}'",
    ]
    assert upcycle.main(words) == 0
    said = capsys.readouterr().out
    assert "proof: PASSED" in said and "function check: PASSED" in said
    assert verify.main(words) == 0
    result, dense = open_checkpoint(tmp_path / "sparse"), leaves(written("siglip"))
    experts = result.read("target/encoder/layers_1/mlp/expert/wi/kernel")
    np.testing.assert_array_equal(experts[31], dense["target/encoder/layers_1/mlp/wi/kernel"])


BLOCK = "vit.encoder.layer.1."
REFUSED = {
    "a tensor without a place": (
        lambda found: found | {"vit.extra.weight": np.zeros(3, np.float32)},
        {},
        r"1 tensor has no place in a vit model: vit.extra.weight",
    ),
    "a missing tensor": (
        lambda found: {k: v for k, v in found.items() if k != f"{BLOCK}layernorm_after.bias"},
        {},
        r"lacks 1 of the model's tensors: vit.encoder.layer.1.layernorm_after.bias",
    ),
    "a missing head": (
        lambda found: {k: v for k, v in found.items() if not k.startswith("classifier")},
        {},
        "lacks 2 of the model's tensors: classifier.bias",
    ),
    "another head": (None, {"id2label": {"0": "a", "1": "b"}}, "has 5 rows, but .* labels: 2"),
    "another size": (None, {"image_size": 16}, r"\[1, 10, 16\], \[1, 17, 16\] belongs there"),
    "another depth": (None, {"num_hidden_layers": 3}, "num_hidden_layers in config.json is 3"),
    "biases that are not stated": (
        None, {"qkv_bias": False}, "6 tensors have no place .* without biases",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_computed_is_refused(why, written, tmp_path):
    tensors, keys, said = REFUSED[why]
    folder = edited(written("vit"), tmp_path / "vit", tensors or (lambda found: found), **keys)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(epath.Path(folder))
    assert str(folder) in str(caught.value)


OTHERS = {
    "clip, another projection": (
        "clip with a projection", {"projection_dim": 7}, "6 rows, but .*projection_dim 7",
    ),
    "clip, no projection": (
        "clip", {"architectures": ["CLIPVisionModelWithProjection"]}, "lacks .*visual_projection",
    ),
    "dinov2, gated": ("dinov2", {"use_swiglu_ffn": True}, "no place .*gated MLPs"),
    "clip, a tower of another type": (
        "clip with its text",
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_config is .*: its model_type should be clip_vision_model",
    ),
    "clip, another width inside": (
        "clip with its text",
        {"vision_config": {"hidden_size": 3}},
        "vision_config.num_attention_heads is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", OTHERS)
def test_what_other_types_cannot_be_is_refused(why, written, tmp_path):
    name, keys, said = OTHERS[why]
    with pytest.raises(ValueError, match=said):
        open_checkpoint(epath.Path(edited(written(name), tmp_path / "folder", **keys)))


def test_a_dinov2_classifier_is_refused(written, tmp_path):
    def classifier(found):
        out = {f"dinov2.{path}": value for path, value in found.items()}
        return out | {"classifier.weight": np.zeros((5, 32), np.float32)}

    folder = edited(written("dinov2"), tmp_path / "folder", classifier)
    with pytest.raises(ValueError, match="classifier of type dinov2, whose head sees more"):
        open_checkpoint(epath.Path(folder))
