"""Tiny vision transformers of transformers, every tensor random, and changed copies of their
folders.
"""

import functools
import json
import shutil

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
}
_DINO = {**SHAPE, "intermediate_size": None, "mlp_ratio": 2}


def _logits(output):
    return output.logits


def _pooled(output):
    return output.pooler_output


def _class_token(output):
    return output.last_hidden_state[:, 0]


def _embeds(output):
    return output.image_embeds


def _embedded(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CASES = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"num_labels": 5}, _logits),
    "vit without a head": ("ViTModel", "ViTConfig", {}, _class_token),
    # A larger epsilon and the other gelu show that both are read.
    "vit without biases": (
        "ViTForImageClassification",
        "ViTConfig",
        {"qkv_bias": False, "layer_norm_eps": 0.1, "hidden_act": "gelu_new", "num_labels": 3},
        _logits,
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, _pooled),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, _pooled),
    "clip with a projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {"projection_dim": 6},
        _embeds,
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO, _pooled),
    "gated dinov2": ("Dinov2Model", "Dinov2Config", {**_DINO, "use_swiglu_ffn": True}, _pooled),
    # 14 pixels: the convolution does not see the last two.
    "siglip with a margin": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {"image_size": 14},
        _pooled,
    ),
    "siglip with its text": ("SiglipModel", "SiglipConfig", {"text_config": _TEXT}, _embedded),
    "clip with its text": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TEXT, "projection_dim": 6},
        _embedded,
    ),
    "siglip classifier": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"num_labels": 5},
        _logits,
    ),
}
"""By name: the class of the model, that of its configuration, settings, and what is compared."""

WITH_TEXT = ("siglip with its text", "clip with its text")


@functools.cache
def random_model(name):
    """The model of a case."""
    model_class, config_class, settings, _ = CASES[name]
    whole = config_class in ("SiglipConfig", "CLIPConfig")
    sizes = {"vision_config": SHAPE} if whole else SHAPE
    config = getattr(transformers, config_class)(**{**sizes, **settings})
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            scale = 0.3 if value.dim() <= 1 else value[0].numel() ** -0.5
            around = float("norm" in path and path.endswith("weight"))
            value.copy_(around + scale * torch.randn_like(value))
    return model


def image_size(name):
    """The side of a case's images."""
    config = random_model(name).config
    return getattr(config, "vision_config", config).image_size


def images(size):
    """Noise, `[2, size, size, 3]`."""
    return np.random.default_rng(3).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def theirs(name, images, model=None):
    """Features or logits of the case's model, or of another one of its class."""
    model = random_model(name) if model is None else model
    run = model.get_image_features if name in WITH_TEXT else model
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return CASES[name][3](run(pixel_values=pixels)).numpy()


def edited(folder, target, tensors=lambda found: found, **keys):
    """A copy of a folder with other tensors, and with these keys in its config.json; None removes
    one.
    """
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target
