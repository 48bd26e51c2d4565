"""Tiny language models of every kind, with random parameters."""

import numpy as np

from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import TokensChoose

SHAPE = {
    "vocab_size": 50,
    "emb_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
}
WINDOWS = {"layer_types": ("sliding", "full", "sliding"), "sliding_window": 5}
GEMMA = {
    "norm": "rms_plus_one",
    "embedding_multiplier": 4.0,
    "mlp_activations": ("gelu", "linear"),
    "logits_via_embedding": True,
}

KINDS = {
    "llama": {},
    "llama3": {"rope": Rope(kind="llama3", factor=8.0, original_length=64)},
    "yarn": {"rope": Rope(kind="yarn", factor=8.0, original_length=64)},
    "linear": {"rope": Rope(kind="linear", factor=2.0)},
    "mistral": {"layer_types": ("sliding",) * 3, "sliding_window": 5},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "logits_via_embedding": True},
    "olmo": {"norm": "layer_norm_without_parameters", "clip_qkv": 0.5},
    "olmo2": {"norm_place": "post", "qk_norm": "projection"},
    "gemma": GEMMA,
    "gemma2": GEMMA
    | WINDOWS
    | {
        "norm_place": "both",
        "attention_softcap": 5.0,
        "logits_softcap": 3.0,
        "attention_scale": 0.2,
    },
    "gemma3": GEMMA
    | WINDOWS
    | {
        "norm_place": "both",
        "qk_norm": "head",
        "attention_scale": 0.2,
        "rope": Rope(1e6),
        "sliding_rope": Rope(1e4),
    },
    "smollm3": {"no_rope_layers": (2,)},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_divisor": 2.0,
        "attention_scale": 0.1,
    },
    "mixtral": {"moe": DecoderMoeConfig(num_experts=4)},
}
"""Settings that make the model of each family out of `SHAPE`."""

OTHERS = {
    "gpt_neox": {
        "norm": "layer_norm",
        "parallel_residual": True,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "mlp_activations": ("gelu_exact",),
        "rope": Rope(fraction=0.25),
    },
    "no_positions": {"rope": None},
    "capacity": WINDOWS
    | {
        "moe": DecoderMoeConfig(
            num_experts=4,
            router=TokensChoose(),
            sparse_layout=(1,),
            group_size=32,
            min_expert_capacity=1,
            train_expert_capacity_factor=1.0,
        )
    },
}
"""Further kinds, which the oracle does not know."""


def config(kind: str) -> DecoderConfig:
    """The tiny model of a kind."""
    return DecoderConfig(**SHAPE | KINDS.get(kind, OTHERS.get(kind)))


def random_params(model: DecoderModel, seed: int = 0):
    """Parameters by path of which no two leaves and no two values are alike, norms included."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, spec in model.param_specs().items():
        scale = 0.3 if len(spec.shape) == 1 else spec.shape[-2] ** -0.5
        scale = 1.0 if path.startswith("token_embedder") else scale
        around = float(path.endswith("scale") and model.config.norm != "rms_plus_one")
        params[path] = (around + scale * rng.normal(size=spec.shape)).astype(np.float32)
    return params
