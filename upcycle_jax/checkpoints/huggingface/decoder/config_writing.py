"""The config.json of a decoder-only model, such that transformers 4.57 and 5 and the engines read
the same model out of it.

transformers 5 has `rope_parameters`, one for each type of layer where these differ; 4.57 has
`rope_theta` and `rope_scaling` and takes its defaults, without a word, where these are missing.
Both are always written, and so is every key whose default differs from the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.huggingface.decoder.holding import ACTIVATIONS, HOLDERS, windows
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderConfig

DEFAULT_POSITIONS = 4096
"""`max_position_embeddings` where nobody says it: how long a context engines prepare for."""

LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_ROPE_PER_TYPE = ("olmo3", "gemma3_text")
_HEAD_DIM_KEY = (
    "llama",
    "mistral",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
)
_GATED_ATTENTION_BIAS = (
    *("llama", "qwen3", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "smollm3"),
    *("granite", "gpt_neox", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared"),
)


@dataclasses.dataclass(frozen=True)
class Beside:
    """What config.json says that no parameter and no setting of the forward pass shows.

    Attributes:
      max_positions: `max_position_embeddings`; None: as long as the rope was stretched to, else
        `DEFAULT_POSITIONS`.
      special_tokens: values of `SPECIAL_TOKENS`; null where they are absent: the defaults of some
        types lie beyond a small vocabulary.
    """

    max_positions: int | None = None
    special_tokens: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def config_json(
    config: DecoderConfig, model_type: str, dtype: np.dtype, beside: Beside = Beside()
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      config: of a model that the type can hold (`holding.why_not`).
      model_type: one of `holding.HOLDERS`.
      dtype: of the weights.
      beside: what else it says.
    """
    holder = HOLDERS[model_type]
    positions = beside.max_positions or _positions(config)
    activation = ACTIVATIONS[config.mlp_activations[0]]
    keys: dict[str, Any] = {
        "architectures": [holder.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": activation,
        "max_position_embeddings": positions,
        "tie_word_embeddings": config.logits_via_embedding,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if model_type in _HEAD_DIM_KEY or config.num_heads * config.head_dim != config.emb_dim:
        keys["head_dim"] = config.head_dim
    if model_type in _GATED_ATTENTION_BIAS:
        keys["attention_bias"] = config.qkv_bias
    if model_type in ("llama", "smollm3", "granite"):
        keys["mlp_bias"] = config.mlp_bias
    if model_type == "gpt_neox":
        keys["layer_norm_eps"] = config.norm_epsilon
        keys["use_parallel_residual"] = config.parallel_residual
    elif model_type != "olmo":
        keys["rms_norm_eps"] = config.norm_epsilon
    if model_type in ("olmo", "olmoe"):
        keys["clip_qkv"] = config.clip_qkv
    keys |= _gemma(config, model_type, activation)
    if holder.multipliers:
        keys["embedding_multiplier"] = config.embedding_multiplier
        keys["attention_multiplier"] = config.logit_scale
        keys["residual_multiplier"] = config.residual_multiplier
        keys["logits_scaling"] = config.logits_divisor
    keys |= _windows(config, model_type) | ropes(config, model_type) | _experts(config, model_type)
    keys |= {name: beside.special_tokens.get(name) for name in SPECIAL_TOKENS}
    return keys | {"dtype": dtype.name, "torch_dtype": dtype.name}


def _positions(config: DecoderConfig) -> int:
    rope = config.rope
    if rope is None or rope.original_length is None:
        return DEFAULT_POSITIONS
    return max(int(rope.original_length * rope.factor), 1)


def _gemma(config: DecoderConfig, model_type: str, activation: str) -> dict[str, Any]:
    if model_type not in ("gemma", "gemma2", "gemma3_text"):
        return {}
    # 4.57 reads `hidden_activation` in all three; for Gemma 1, a null there warns and falls back.
    out: dict[str, Any] = {"hidden_activation": activation}
    if model_type != "gemma":
        out["query_pre_attn_scalar"] = round(config.logit_scale**-2)
        out["attn_logit_softcapping"] = config.attention_softcap
        out["final_logit_softcapping"] = config.logits_softcap
        out["use_bidirectional_attention"] = False
    return out


def _windows(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Keys of sliding windows: none for types that have none."""
    how = HOLDERS[model_type].windows
    found = windows(config)
    if how == "none":
        return {}
    size = max((window for window in found if window), default=None)
    if model_type in ("gemma2", "gemma3_text", "olmo3"):
        size = size or DEFAULT_POSITIONS  # They make a mask of it even where no layer has one.
    out: dict[str, Any] = {"sliding_window": size}
    if model_type.startswith("qwen") or model_type == "smollm3":
        out["use_sliding_window"] = size is not None
    if how == "layers":
        out["layer_types"] = [LAYER_TYPES["sliding" if window else "full"] for window in found]
    if model_type in ("qwen2", "qwen3", "qwen2_moe"):
        # Layers from here on have the window, where nobody reads `layer_types`.
        out["max_window_layers"] = next((i for i, window in enumerate(found) if window), len(found))
    if model_type == "smollm3":
        without = set(config.no_rope_layers)
        out["no_rope_layers"] = [int(i not in without) for i in range(config.num_layers)]
    return out


def ropes(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Keys of rotary positions, of both dialects."""
    rope = config.rope
    assert rope is not None, "holding.why_not"
    scaling = _scaling(rope, model_type)
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": scaling}
    whole = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    if HOLDERS[model_type].fraction:
        whole["partial_rotary_factor"] = rope.fraction
    if model_type == "phi3":
        out["partial_rotary_factor"] = rope.fraction
    if model_type == "gpt_neox":
        del out["rope_theta"]
        out |= {"rotary_emb_base": rope.theta, "rotary_pct": rope.fraction}
    if model_type == "phi3":
        # Both versions divide the two for the factor of longrope.
        original = rope.original_length or _positions(config)
        out["original_max_position_embeddings"] = original
    if model_type not in _ROPE_PER_TYPE:
        return out | {"rope_parameters": whole}
    sliding = config.sliding_rope or rope
    part = {
        "rope_theta": sliding.theta,
        **(_scaling(sliding, model_type) or {"rope_type": "default"}),
    }
    if model_type == "gemma3_text":
        out["rope_local_base_freq"] = sliding.theta
    return out | {"rope_parameters": {"full_attention": whole, "sliding_attention": part}}


def _scaling(rope: Rope, model_type: str) -> dict[str, Any] | None:
    """`rope_scaling`; None for a plain rope."""
    if rope.kind == "default":
        return None
    kind = "longrope" if model_type == "phi3" else rope.kind
    if model_type == "phi3":  # 4.57 takes these three keys and no others
        short, long = list(rope.short_factors), list(rope.long_factors)
        return {"type": kind, "short_factor": short, "long_factor": long}
    if model_type == "olmo":  # likewise, and a float
        return {"type": rope.kind, "factor": float(rope.factor)}
    out: dict[str, Any] = {"rope_type": rope.kind, "factor": float(rope.factor)}
    if rope.kind == "linear":
        return out
    out["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        out["low_freq_factor"] = float(rope.low_freq_factor)
        out["high_freq_factor"] = float(rope.high_freq_factor)
        return out
    if rope.kind == "yarn":
        out |= {"beta_fast": float(rope.beta_fast), "beta_slow": float(rope.beta_slow)}
        out["truncate"] = rope.truncate
    if rope.kind == "longrope":
        out["short_factor"] = list(rope.short_factors)
        out["long_factor"] = list(rope.long_factors)
    # Stated, since readers differ in what they take where it is missing.
    return out | {"attention_factor": float(rope.amplitude)}


def _experts(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Keys of MoE layers."""
    moe, holder = config.moe, HOLDERS[model_type].moe
    if moe is None or holder is None:
        return {}
    chosen = int(moe.router.active_experts(1.0))
    out: dict[str, Any] = {
        "num_experts_per_tok": chosen,
        "output_router_logits": False,
        # Both losses count all K choices and are K at perfect balance: docs/routers.md.
        "router_aux_loss_coef": moe.aux_loss_factor,
    }
    if holder.weights == "unit":
        out["num_local_experts"] = moe.num_experts
    else:
        out |= {"num_experts": moe.num_experts, "norm_topk_prob": moe.router.unit_weights}
    if model_type == "mixtral":
        out["router_jitter_noise"] = moe.router.input_jitter
    if not holder.mixed:
        out["intermediate_size"] = config.expert_mlp_dim
    else:
        out["moe_intermediate_size"] = config.expert_mlp_dim
        out |= _placement(config)
    if model_type == "qwen2_moe":
        out["qkv_bias"] = config.qkv_bias
        out["shared_expert_intermediate_size"] = moe.shared_expert_mlp_dim
    if model_type == "granitemoeshared":
        out["shared_intermediate_size"] = moe.shared_expert_mlp_dim
    return out


def _placement(config: DecoderConfig) -> dict[str, Any]:
    """Which layers have experts: every so many if that says it, else those that have none."""
    sparse, count = set(config.sparse_layers), config.num_layers
    for step in range(1, count + 1):
        if sparse == set(range(step - 1, count, step)):
            return {"decoder_sparse_step": step, "mlp_only_layers": []}
    dense = [i for i in range(count) if i not in sparse]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
