"""Folders of timm's vision transformers: those of transformers under timm's names."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import upcycle_jax as uj
from tests.checkpoints.huggingface.vit.oracle import images
from upcycle_jax import convert, trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.state_tree import TARGET

# The architecture has 3 heads.
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
VIT = {"architecture": "vit_tiny_patch4_12", "num_classes": 5, "global_pool": "token"}
DINOV2 = {"architecture": "vit_tiny_patch4_dinov2", "num_classes": 0, "global_pool": "token"}


def random(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for path, value in model.named_parameters():
            scale = 0.3 if value.dim() == 1 else value[0].numel() ** -0.5
            around = float("norm" in path and path.endswith("weight"))
            value.copy_(around + scale * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="module")
def vit():
    config = transformers.ViTConfig(
        **SHAPE, intermediate_size=32, layer_norm_eps=1e-6, num_labels=5
    )
    return random(transformers.ViTForImageClassification(config))


@pytest.fixture(scope="module")
def dinov2():
    return random(transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2)))


RENAMED = (
    ("vit.", ""),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("attention.o_proj", "attn.proj"),
    ("attention.output.dense", "attn.proj"),
    ("layernorm", "norm"),
    ("classifier", "head"),
)


def write(model, folder, keys, change=lambda tensors: tensors):
    """A folder of timm's: queries, keys and values are rows of one matrix."""
    tensors, fused = {}, {}
    for name, value in model.named_parameters():
        for theirs, timms in RENAMED:
            name = name.replace(theirs, timms)
        part = next((p for p in "qkv" if f"attention.{p}_proj" in name), None)
        if part is None:
            tensors[name] = value.detach().numpy().copy()
        else:
            name = name.replace(f"attention.{part}_proj", "attn.qkv")
            fused.setdefault(name, {})[part] = value.detach().numpy()
    for name, parts in fused.items():
        tensors[name] = np.concatenate([parts[part] for part in "qkv"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def ours(folder, pixels):
    reader, model = open_checkpoint(folder), uj.build_model(str(folder))
    params = {path.removeprefix(TARGET): reader.read(path) for path in reader.specs()}
    batch = model.features.batch(pixels, np.zeros(len(pixels), np.int32), len(pixels))
    return jax.jit(model.logits)(trees.unflatten(params), batch)


def theirs(model, pixels):
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        return (out.logits if hasattr(out, "logits") else out.pooler_output).numpy()


@pytest.mark.parametrize(("name", "keys"), [("vit", VIT), ("dinov2", DINOV2)])
def test_logits_and_features_are_those_of_the_same_model(name, keys, request, tmp_path):
    model, pixels = request.getfixturevalue(name), images(12)
    folder = write(model, tmp_path / "timm", keys)
    expected = theirs(model, pixels)
    np.testing.assert_allclose(ours(folder, pixels), expected, rtol=1e-5, atol=1e-5)
    # As a folder that transformers reads.
    assert convert.main([str(folder), str(tmp_path / "out"), "--to=huggingface"]) == 0
    found = type(model).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(theirs(found, pixels), expected, rtol=1e-5, atol=1e-5)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


REFUSED = {
    "another architecture": (
        {"architecture": "vit_base_patch16_siglip_224"}, None, "architecture is .*of timm's models",
    ),
    "mean pooling": ({"global_pool": "avg"}, None, "global_pool is 'avg'"),
    "changed settings": ({"model_args": {"qk_norm": True}}, None, "model_args is"),
    "a missing layer": ({}, without("blocks.0.mlp.fc1.weight"), "fc1.weight is missing"),
    "no class token": ({}, without("cls_token"), "lacks 1 of the model's tensors: cls_token"),
    "another head": ({"num_classes": 4}, None, r"head.weight .* shape \[5, 24\], \[4, 24\] belong"),
    "a hostile number of layers": (
        {},
        lambda t: t | {"blocks.900000000.norm1.weight": np.zeros(24, np.float32)},
        "one is missing",
    ),
    "layer scales": (
        {}, lambda t: t | {"blocks.0.ls1.gamma": np.ones(24, np.float32)}, "has no place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_computed_is_refused(why, vit, tmp_path):
    keys, change, message = REFUSED[why]
    folder = write(vit, tmp_path / "timm", VIT | keys, change or (lambda tensors: tensors))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
