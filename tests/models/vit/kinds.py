"""Tiny vision transformers of every kind, random parameters, and their names in big_vision."""

import numpy as np

from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import ExpertsChoose

SHAPE = {
    "num_classes": 7,
    "image_size": 12,
    "patch_size": 4,
    "emb_dim": 16,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_dim": 24,
}
KINDS = {
    "mean": {},
    "class_token": {"pool": "class_token"},
    "map": {"pool": "map"},
    "clip": {
        "pool": "class_token",
        "pre_norm": True,
        "patch_bias": False,
        "mlp_activations": ("quick_gelu",),
        "norm_epsilon": 1e-5,
    },
    "dinov2": {
        "pool": "class_token",
        "layer_scale": True,
        "mlp_activations": ("gelu_exact",),
    },
    # 9 tokens of an image are a group of 4 experts: C = round(2 * 9 / 4) = 4 (half to even).
    "renormalised": {"moe": VitMoeConfig(num_experts=4, group_size=9, min_expert_capacity=1)},
    # Two images are a group: C = round(2 * 18 / 4) = 9.
    "two_images": {
        "moe": VitMoeConfig(
            num_experts=4, group_size=18, min_expert_capacity=1, router=ExpertsChoose()
        )
    },
}
_PARTS = {
    "pre_attention_layer_norm": "LayerNorm_0",
    "pre_mlp_layer_norm": "LayerNorm_1",
    "mlp/wi": "MlpBlock_0/Dense_0",
    "mlp/wo": "MlpBlock_0/Dense_1",
    "mlp/expert/wi": "Moe/Mlp/Dense_0",
    "mlp/expert/wo": "Moe/Mlp/Dense_1",
    "mlp/router/router_weights/w": "Moe/Router/dense",
    "layer_norm": "LayerNorm_0",
}


def model(kind: str) -> VitModel:
    """The tiny model of a kind."""
    return VitModel(VitConfig(**SHAPE | KINDS[kind]))


def random_params(model: VitModel, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters by path of which no two leaves and no two values are alike."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, spec in model.param_specs().items():
        scale = 0.3 if len(spec.shape) == 1 else spec.shape[-2] ** -0.5
        around = float(path.endswith("scale"))
        params[path] = (around + scale * rng.normal(size=spec.shape)).astype(np.float32)
    return params


def in_big_vision(params: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Parameters under big_vision's names, in its shapes."""
    out = {}
    for path, value in params.items():
        if path.startswith("encoder/layers_"):
            _, layer, rest = path.split("/", 2)
            block = f"Transformer/encoderblock_{layer.removeprefix('layers_')}"
            out |= {f"{block}/{name}": v for name, v in _part(rest, value, heads).items()}
        elif path.startswith("encoder/"):
            out[f"Transformer/{path.removeprefix('encoder/')}"] = value
        elif path.startswith("map_head/"):
            rest = path.removeprefix("map_head/")
            out |= {f"MAPHead_0/{name}": v for name, v in _part(rest, value, heads).items()}
        else:
            out[path] = value
    return out


def _part(path: str, value: np.ndarray, heads: int) -> dict[str, np.ndarray]:
    if path in ("attention_scale", "mlp_scale"):
        return {"ls1" if path == "attention_scale" else "ls2": value}
    module, _, leaf = path.rpartition("/")
    if not module.startswith("attention/"):
        return {f"{_PARTS[module]}/{leaf}" if module else leaf: value}
    if path == "attention/out/kernel":
        value = value.reshape(heads, -1, value.shape[-1])
    elif not path.startswith("attention/out"):
        value = value.reshape(*value.shape[:-1], heads, -1)
    name = module.removeprefix("attention/")
    return {f"MultiHeadDotProductAttention_0/{name}/{leaf}": value}
