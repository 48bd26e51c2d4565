"""Folders of decoder-only models that are damaged, contradict themselves or lead elsewhere: one
line that names what is wrong.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.decoder.config_json import read_config
from upcycle_jax.checkpoints.huggingface.decoder.tensors import tensor_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 1e4,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.block_sparse_moe.experts.2.w3.weight"


def write(folder, config=None, edit=None, **written):
    """A folder of random tensors.

    Args:
      folder: where.
      config: what the tensors are of, beside `CONFIG`.
      edit: gets the tensors and gives others.
      **written: other values in config.json.
    """
    folder.mkdir()
    keys = {**CONFIG, **(config or {})}
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(keys["model_type"], read_config(folder, keys))
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = edit(tensors) if edit else tensors
    (folder / "config.json").write_text(json.dumps(keys | written))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def assert_refused(folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "written", "match"),
    [
        ({}, {"model_type": "deepseek_v3"}, "type 'deepseek_v3'; only T5.*attention is latent"),
        ({}, {"model_type": "gpt2"}, "type 'gpt2'; .*positions are a learned table"),
        ({}, {"model_type": "brand_new"}, "type 'brand_new'; only T5 .*decoder-only models .llama"),
        ({}, {"vocab_size": 21}, r"has the shape \[20, 8\], \[21, 8\] belongs .*vocab_size 21"),
        ({}, {"hidden_size": 16}, r"belongs there according to config.json .*hidden_size 16"),
        ({}, {"intermediate_size": 13}, r"\[12, 8\], \[13, 8\] belongs there"),
        ({}, {"num_hidden_layers": 1}, r"layers 0, 1 \(2 in all\), but num_hidden_layers .* is 1"),
        ({}, {"num_hidden_layers": 900}, "but num_hidden_layers in config.json is 900"),
        ({}, {"num_key_value_heads": 2}, r"k_proj.weight .* \[4, 8\], \[8, 8\] belongs"),
        ({}, {"head_dim": 8}, r"\[8, 8\], \[16, 8\] belongs there"),
        ({}, {"attention_bias": True}, "lacks 8 of the model's tensors: .*k_proj.bias"),
        ({"attention_bias": True}, {"attention_bias": False}, "8 tensors have no place in a llama"),
        ({}, {"model_type": "qwen2"}, "lacks 6 of the model's tensors: .*k_proj.bias"),
        (
            {},
            {"model_type": "gpt_neox", "num_key_value_heads": 2, "rotary_pct": 1},
            "no tensor of a layer, gpt_neox",
        ),
        ({}, {"tie_word_embeddings": True}, "lm_head.weight in model.safetensors differs from mod"),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            "has no lm_head.weight, bu",
        ),
        (
            {"model_type": "mixtral", **EXPERTS},
            {"num_local_experts": 4},
            r"experts 0, 1, 2 \(3 in all\), but config.json describes 4",
        ),
        (
            {"model_type": "mixtral", **EXPERTS},
            {"num_local_experts": 30000},
            r"but config.json describes 30000",
        ),
        (
            {"model_type": "granitemoe", **EXPERTS},
            {"num_local_experts": 4},
            r"router.layer.weight .* \[3, 8\], \[4, 8\] belongs .*num_local_experts 4",
        ),
    ],
)
def test_a_config_of_another_model(tmp_path, config, written, match):
    write(tmp_path / "hf", config, **written)
    assert_refused(tmp_path / "hf", match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (without(UP), "lacks 1 of the model's tensors: .*experts.2.w3.weight"),
        (without("model.norm.weight"), "lacks 1 of the model's tensors: model.norm.weight"),
        (lambda t: t | {UP: t[UP].T.copy()}, r"w3.weight .* \[8, 12\], \[12, 8\] belongs there"),
        (lambda t: t | {UP: t[UP].astype(np.int8)}, "is stored as I8; quantised weights"),
        (lambda t: t | {"model.vision.weight": t[UP]}, "1 tensor has no place in a mixtral mod"),
        (
            lambda t: t | {"model.layers.2.input_layernorm.weight": t["model.norm.weight"]},
            r"layers 0, 1, 2 \(3 in all\), but num_hidden_layers",
        ),
        (
            lambda t: {name: x for name, x in t.items() if ".experts.1." not in name},
            r"experts 0, 2 \(2 in all\), but config.json describes 3",
        ),
    ],
)
def test_tensors_of_another_model(tmp_path, edit, match):
    write(tmp_path / "hf", {"model_type": "mixtral", **EXPERTS}, edit)
    assert_refused(tmp_path / "hf", match)


def shards(folder, **places):
    """Divides a folder's tensors over two files, with an index that says so."""
    tensors = write(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | places}))


def test_shards_that_are_missing_or_truncated(tmp_path):
    last = "model-00002-of-00002.safetensors"
    shards(tmp_path / "missing")
    (tmp_path / "missing" / last).unlink()
    assert_refused(tmp_path / "missing", f"the index names {last}, which is missing: copy it again")
    shards(tmp_path / "truncated")
    content = (tmp_path / "truncated" / last).read_bytes()
    (tmp_path / "truncated" / last).write_bytes(content[:-10])
    assert_refused(tmp_path / "truncated", f"{last} is damaged or truncated .*copy it again")
    shards(tmp_path / "header")
    (tmp_path / "header" / last).write_bytes(content[:40])
    assert_refused(tmp_path / "header", f"{last} is damaged or truncated")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leaves_the_folder(tmp_path, name):
    shards(tmp_path / "hf", **{QUERY: name})
    assert_refused(tmp_path / "hf", "weight_map places .*q_proj.weight in .*of the folder itself")


def test_a_link_that_leaves_the_folder(tmp_path):
    write(tmp_path / "outside")
    write(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors").symlink_to(tmp_path / "outside" / "model.safetensors")
    assert_refused(tmp_path / "hf", "is a link that leaves the folder")
