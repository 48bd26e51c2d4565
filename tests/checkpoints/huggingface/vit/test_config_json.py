"""config.json of vision transformers: what is stated, and what is refused."""

import pytest

from tests.checkpoints.huggingface.vit.oracle import SHAPE
from upcycle_jax.checkpoints.huggingface.vit.config_json import read_config

REFUSED = {
    "an oblong image": ("vit", {"image_size": [12, 16]}, "image_size is .*squares"),
    "a patch larger than the image": ("vit", {"patch_size": 13}, "smaller than a patch"),
    "heads that do not divide": ("vit", {"num_attention_heads": 3}, "num_attention_heads is 3"),
    "an unknown activation": ("vit", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    "an unknown key": ("vit", {"rope_theta": 1e4}, "rope_theta is 10000.0: models of type 'vit'"),
    "no depth": ("vit", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    "quantised weights": (
        "vit", {"quantization_config": {"bits": 4}}, "quantised weights are not supported",
    ),
    "siglip without its pooling": (
        "siglip_vision_model", {"vision_use_head": False}, "no features",
    ),
    "no side": ("vit", {"image_size": [None, None]}, "image_size is .*squares"),
    "a text for a side": ("vit", {"patch_size": ["4", "4"]}, "patch_size is '4': an integer"),
    "an endless MLP": ("dinov2", {"mlp_ratio": 1e308}, "mlp_ratio is 1e.308: a number between"),
    "two counts of classes": (
        "vit", {"num_labels": 3, "id2label": {"0": "a"}}, "num_labels is 3: id2label names 1",
    ),
    "dinov2, no hidden unit": ("dinov2", {"mlp_ratio": 0.01}, "no vision transformer's: .*mlp_dim"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_computed_is_refused(why, tmp_path):
    name, changes, said = REFUSED[why]
    keys = keys_of(name) | changes
    with pytest.raises(ValueError, match=said) as caught:
        read_config(tmp_path, keys)
    assert str(tmp_path) in str(caught.value)


def keys_of(model_type):
    """A small config.json that states sizes alone."""
    keys = {"model_type": model_type, **SHAPE}
    if model_type == "dinov2":
        keys |= {"intermediate_size": None, "mlp_ratio": 2}
    return keys


# The defaults of transformers' configurations.
DEFAULTS = {
    "vit": ("gelu_exact", 1e-12, "class_token"),
    "siglip_vision_model": ("gelu", 1e-6, "map"),
    "clip_vision_model": ("quick_gelu", 1e-5, "class_token"),
    "dinov2": ("gelu_exact", 1e-6, "class_token"),
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_is_not_stated_is_the_default_of_transformers(model_type, tmp_path):
    config = read_config(tmp_path, keys_of(model_type)).config
    activation, epsilon, pool = DEFAULTS[model_type]
    assert (config.mlp_activations, config.norm_epsilon, config.pool) == (
        (activation,),
        epsilon,
        pool,
    )


def test_gated_widths_are_rounded_up_to_eights(tmp_path):
    # 16 * 2 = 32 units, two thirds are 21, and 24 is the next multiple of 8.
    stated = read_config(tmp_path, keys_of("dinov2") | {"use_swiglu_ffn": True})
    assert stated.config.mlp_dim == 24
    assert stated.config.mlp_activations == ("silu", "linear")


def test_sides_may_be_stated_twice(tmp_path):
    once = read_config(tmp_path, keys_of("vit"))
    sides = {"image_size": [12, 12], "patch_size": [4, 4]}
    assert read_config(tmp_path, keys_of("vit") | sides) == once
