"""Tiny random models of every type that is read, written by transformers: every tensor is random,
norms and biases too, so that none can be left out or taken for another unseen.
"""

import copy
import json
import shutil

import numpy as np
import pytest

from tests import oracles

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
}
ONE_LAYER = {"num_hidden_layers": 1}
WINDOW = {"sliding_window": 5}
HEADS = {"head_dim": 8}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {**EXPERTS, "moe_intermediate_size": 20}
SHARED = {**QWEN_MOE, "shared_expert_intermediate_size": 12}
NEOX = {"num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}

CASES = {
    "llama": ("llama", {**ONE_LAYER, "rope_parameters": LLAMA3}),
    "llama with biases": (
        "llama",
        {**HEADS, **BIASES, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "mistral": ("mistral", {**ONE_LAYER, **WINDOW}),
    "qwen2": ("qwen2", {**ONE_LAYER, "tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("qwen3", {**ONE_LAYER, **HEADS, "rope_parameters": YARN}),
    "olmo": ("olmo", {**ONE_LAYER, "clip_qkv": 0.5}),
    "olmo2": ("olmo2", ONE_LAYER),
    "olmo3": ("olmo3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma": ("gemma", {**ONE_LAYER, **HEADS}),
    "gemma2": (
        "gemma2",
        {
            **HEADS,
            **WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **HEADS,
            **WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": ("granite", {**ONE_LAYER, **GRANITE}),
    "phi3": (
        "phi3",
        {**WINDOW, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phi3 beyond its first context": (
        "phi3",
        {**ONE_LAYER, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    ),
    "gpt_neox": ("gpt_neox", {**NEOX, "rotary_pct": 0.5}),
    "gpt_neox in sequence": (
        "gpt_neox",
        {**ONE_LAYER, **NEOX, "rotary_pct": 1.0, "use_parallel_residual": False},
    ),
    "mixtral": ("mixtral", {**LOCAL, **WINDOW, "rope_parameters": LLAMA3}),
    "qwen2_moe": ("qwen2_moe", {**SHARED, "decoder_sparse_step": 2}),
    "qwen2_moe renormalised": (
        "qwen2_moe",
        {**SHARED, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**ONE_LAYER, **QWEN_MOE, **HEADS, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**ONE_LAYER, **EXPERTS, "clip_qkv": 0.5}),
    "flex_olmo": ("flex_olmo", {**ONE_LAYER, **EXPERTS, "norm_topk_prob": True}),
    "granitemoe": ("granitemoe", {**ONE_LAYER, **LOCAL, **GRANITE}),
    "granitemoeshared": (
        "granitemoeshared",
        {**LOCAL, **GRANITE, "shared_intermediate_size": 12},
    ),
}
"""Name -> `model_type`, and settings beside `SIZES`. Two layers are for models whose layers are not
all alike, and for one of each form of tensors.
"""

NOT_IN_REFERENCE = ("phi3", "gpt_neox")
"""Types that the NumPy reference does not compute."""


REMOVED = object()


def torch_and_transformers():
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    return torch, transformers


def random_model(model_type, settings, seed=0):
    """A model of transformers with random tensors of everyday size."""
    torch, transformers = torch_and_transformers()
    keys = copy.deepcopy({**SIZES, **settings})  # transformers writes into objects of these.
    config = transformers.AutoConfig.for_model(model_type, **keys)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else max(parameter.shape[-1], 1) ** -0.5
            one = "norm" in name and name.endswith("weight") and "gemma" not in model_type
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale + (1.0 if one else 0.0))
    return model.float().eval()


def rewritten(folder, target, **config):
    """A copy of a folder with other values in config.json; `REMOVED` removes a key."""
    shutil.copytree(folder, target)
    keys = json.loads((folder / "config.json").read_text()) | config
    keys = {name: value for name, value in keys.items() if value is not REMOVED}
    (target / "config.json").write_text(json.dumps(keys))
    return target


def logits_of(model, tokens):
    """Float32 `[B, L, V]`."""
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def reference():
    """The NumPy forward pass beside the project, a module."""
    return oracles.load("reference_forward")
