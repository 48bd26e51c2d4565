"""What the metadata of GGUF files say of the model, and what is refused by name."""

import math

import numpy as np
import pytest

from tests.checkpoints.gguf_models import as_stored, metadata, tensors, write
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderConfig


def opened(path, architecture="llama", *, keys=None, more=None, values=None):
    values = as_stored(architecture, tensors(architecture)) | (values or {})
    write(path, architecture, values, keys=metadata(architecture) | (keys or {}), more=more)
    return open_checkpoint(path)


def test_whole_models(tmp_path):
    sizes = {
        "vocab_size": 40,
        "emb_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_dim": 96,
        "logits_via_embedding": True,
    }
    llama = opened(tmp_path / "llama.gguf")
    assert llama.model_config() == DecoderConfig(**sizes)
    assert llama.model_settings() == DecoderConfig(**sizes).forward_settings
    qwen2 = DecoderConfig(**sizes, norm_epsilon=1e-6, qkv_bias=True, rope=Rope(1e6))
    assert opened(tmp_path / "qwen2.gguf", "qwen2").model_config() == qwen2
    qwen3 = DecoderConfig(**sizes, norm_epsilon=1e-6, qk_norm="head", rope=Rope(1e6))
    assert opened(tmp_path / "qwen3.gguf", "qwen3").model_config() == qwen3


def test_defaults_of_the_format(tmp_path):
    """Without a count of key heads there are as many as of queries; without a base it is 10000."""
    sizes = {"attention.head_count_kv": None, "rope.freq_base": None}
    values = {
        f"blk.{n}.attn_{x}.weight": np.zeros((64, 64), np.float32) for n in (0, 1) for x in "kv"
    }
    config = opened(tmp_path / "m.gguf", keys=sizes, values=values).model_config()
    assert (config.kv_heads, config.rope) == (4, Rope(10000.0))


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, Rope()),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            Rope(kind="linear", factor=4.0),
        ),
        ({"rope.scale_linear": 2.0}, Rope(kind="linear", factor=2.0)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
            Rope(kind="yarn", factor=4.0, original_length=32),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.attn_factor": 0.5,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            Rope(
                kind="yarn",
                factor=4.0,
                original_length=32,
                beta_fast=16.0,
                attention_factor=0.5 * (0.1 * math.log(4) + 1),
            ),
        ),
    ],
)
def test_stretched_ropes(tmp_path, keys, rope):
    assert opened(tmp_path / "m.gguf", keys=keys).model_config().rope == rope


def test_factors_of_llama_3(tmp_path):
    """llama.cpp writes what each frequency is divided by. Llama 3.1's own settings are found again
    in them; other factors are taken as they are.
    """
    base, length = 500000.0, 8192
    inverse = base ** -(np.arange(0, 16, 2) / 16)
    kept = np.clip((length * inverse / (2 * math.pi) - 1) / 3, 0, 1)
    factors = (1 / ((1 - kept) / 8 + kept)).astype(np.float32)
    assert factors.min() == 1 and factors.max() == 8 and len({*factors}) > 2
    keys = {"rope.freq_base": base}
    config = opened(
        tmp_path / "a.gguf", keys=keys, values={"rope_freqs.weight": factors}
    ).model_config()
    assert config.rope == Rope(base, "llama3", factor=8.0, original_length=8192)
    other = np.linspace(1, 5, 8, dtype=np.float32)
    rope = opened(tmp_path / "b.gguf", values={"rope_freqs.weight": other}).model_config().rope
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    for positions in (4, 100000):
        np.testing.assert_allclose(rope.frequencies(16, positions), plain / other, rtol=1e-6)
    assert rope.amplitude == 1
    for bad, message in (
        (np.ones(9, np.float32), r"rope_freqs.weight has the shape \[9\]; heads of size 16 need 8"),
        (np.zeros(8, np.float32), "no positive numbers"),
        (np.full(8, np.nan, np.float32), "no positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "c.gguf", values={"rope_freqs.weight": bad})


def test_a_window_of_every_layer(tmp_path):
    config = opened(tmp_path / "m.gguf", keys={"attention.sliding_window": 8}).model_config()
    assert (config.layer_types, config.sliding_window) == (("sliding", "sliding"), 8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing: a positive size"),
        ({"block_count": 0}, "llama.block_count is 0: a positive size"),
        ({"block_count": 3}, "lacks blk.2.attn_norm.weight"),
        ({"block_count": "two"}, "llama.block_count is 'two'"),
        ({"feed_forward_length": [96, 80]}, "feed_forward_length is .* layers differ in it"),
        ({"attention.head_count": 5}, "head_count is 5: it does not divide the width 64"),
        ({"attention.head_count_kv": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"attention.value_length": 8}, "value_length is 8: heads of size 16"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8: heads of size 16"),
        ({"rope.scaling.type": "su"}, "rope.scaling.type is 'su': known are none, linear"),
        ({"vocab_size": 50}, "llama.vocab_size is 50: token_embd.weight has 40 rows"),
        ({"expert_count": 8}, "llama.expert_count is 8: a dense model without it"),
        ({"logit_scale": 0.5}, "llama.logit_scale is 0.5: a dense model without it"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"attention.shiny": 1}, "llama.attention.shiny is 1: this setting is not known here"),
    ],
)
def test_metadata_that_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / "m.gguf", keys=keys)
    assert "\n" not in str(caught.value)


def test_models_that_are_refused(tmp_path):
    for architecture, message in (
        ("qwen3moe", "'qwen3moe': only GGUF files of llama, qwen2, qwen3 .* Mixture-of-Experts"),
        ("mamba", "general.architecture is 'mamba': only GGUF files"),
        ("x\ny", r"general.architecture is 'x\\ny'"),
    ):
        write(tmp_path / "m.gguf", architecture, tensors("llama"))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="is one of 3 parts of a model: merge them"):
        opened(tmp_path / "m.gguf", more={"split.count": 3})
    with pytest.raises(ValueError, match="general.type is 'adapter'"):
        opened(tmp_path / "m.gguf", more={"general.type": "adapter"})
    with pytest.raises(ValueError, match="qwen2.attention.sliding_window is 8: .* which layers"):
        opened(tmp_path / "m.gguf", "qwen2", keys={"attention.sliding_window": 8})
