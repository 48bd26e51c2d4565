"""Whether a config.json says what it is meant to say: it is read again, as transformers 4 reads it
and as transformers 5 does. A window, a flag or a rope that got lost is another model to whoever
loads the folder, and no loader says so.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.huggingface.decoder.config_json import read_config
from upcycle_jax.checkpoints.huggingface.files import CONFIG
from upcycle_jax.layers.rope import Rope, as_plain
from upcycle_jax.models.decoder.config import DecoderConfig

OF_5 = frozenset({"rope_parameters", "dtype"})
"""Keys that transformers 4 does not read."""

OF_4 = frozenset(
    {
        *("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype"),
        *("rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
    }
)
"""Keys that transformers 5 does not need."""

_LENGTHS = (16, 1 << 20)
"""Sequences shorter and longer than any rope was trained for."""


def check(keys: Mapping[str, Any], config: DecoderConfig, *, by_4: bool = True) -> None:
    """Reads a config.json in each dialect.

    Args:
      keys: its content.
      config: the model that it is meant to state.
      by_4: 4.57 reads this model too; where not, that has been said.

    Raises:
      ValueError: it states another model; what differs is named.
    """
    dialects = {"transformers 5": OF_4} | ({"transformers 4.57": OF_5} if by_4 else {})
    for version, missing in dialects.items():
        read = read_config(Path(), {k: v for k, v in keys.items() if k not in missing})
        found = list(differences(config, read))
        if found:
            raise ValueError(
                f"the {CONFIG} would be another model to {version}: {'; '.join(found)}. Nothing was"
                " written"
            )


def differences(ours: DecoderConfig, read: DecoderConfig) -> Iterator[str]:
    """What two models compute differently, as far as the settings say."""
    one, other = _computed(ours), _computed(read)
    for name, value in one.items():
        if name in other and not _equal(value, other[name]):
            yield f"{name} is {value!r}, read as {other[name]!r}"
    for i in range(min(ours.num_layers, read.num_layers)):
        if not _same_rope(ours, read, i):
            was, now = (as_plain(config.layer_rope(i)) for config in (ours, read))
            yield f"the rope of layer {i} is {was}, read as {now}"


def _computed(config: DecoderConfig) -> dict[str, Any]:
    """What decides the function, except ropes; each in one form, however it was stated."""
    plain = (
        *("vocab_size", "emb_dim", "num_layers", "num_heads", "kv_heads", "head_dim"),
        *("mlp_activations", "norm", "norm_place", "norm_epsilon", "qk_norm", "qkv_bias"),
        *("attention_out_bias", "mlp_bias", "clip_qkv", "logit_scale", "attention_softcap"),
        *("logits_softcap", "residual_multiplier", "logits_divisor", "parallel_residual"),
        *("logits_via_embedding", "logits_bias", "sparse_layers"),
    )
    out = {name: getattr(config, name) for name in plain}
    out["windows"] = tuple(config.layer_window(i) for i in range(config.num_layers))
    # A bfloat16 Gemma rounds it, see `holding`.
    out["embedding_multiplier"] = round(config.embedding_multiplier / math.sqrt(config.emb_dim), 2)
    if len(config.sparse_layers) < config.num_layers:
        out["mlp_dim"] = config.mlp_dim
    moe = config.moe
    if moe is not None and config.sparse_layers:
        out["num_experts"] = moe.num_experts
        out["num_selected_experts"] = moe.router.active_experts(1.0)
        out["renormalised"] = moe.router.unit_weights
        out["expert_mlp_dim"] = config.expert_mlp_dim
        out["shared_expert_mlp_dim"] = moe.shared_expert_mlp_dim
        out["shared_expert_gate"] = moe.shared_expert_gate
    return out


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _same_rope(ours: DecoderConfig, read: DecoderConfig, index: int) -> bool:
    one, other = ours.layer_rope(index), read.layer_rope(index)
    if one is None or other is None:
        return one is other
    return math.isclose(one.amplitude, other.amplitude, rel_tol=1e-9) and all(
        _same_frequencies(one, other, ours.head_dim, length) for length in _LENGTHS
    )


def _same_frequencies(one: Rope, other: Rope, head_dim: int, length: int) -> bool:
    a, b = one.frequencies(head_dim, length), other.frequencies(head_dim, length)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=0))
