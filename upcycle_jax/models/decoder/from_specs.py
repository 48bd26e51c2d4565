"""The shape of a language model that a checkpoint implies, for conversions where no model file is
given.
"""

import re
from collections.abc import Mapping
from typing import Any

from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import STACK, STATED_ROPES, DecoderConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_START = f"{TARGET}{STACK}/layers_"
_LAYER = re.compile(rf"{_START}(\d+)/")


def from_specs(specs: Mapping[str, LeafSpec], stated: Mapping[str, Any]) -> DecoderConfig | None:
    """The dense configuration of a language model, read off its shapes and what the checkpoint
    states of its forward pass; dtype and dropout are the defaults. None where the leaves are not a
    language model's.

    Args:
      specs: of every leaf, by full path.
      stated: the settings of the forward pass that the checkpoint states.

    Raises:
      ValueError: it does not state its heads, shapes or numbers of layers are no language model's,
        or not of what is stated.
    """
    embedding = specs.get(f"{TARGET}token_embedder/embedding")
    first = f"{_START}0"
    query, key = (specs.get(f"{first}/self_attention/{name}/kernel") for name in ("query", "key"))
    has_cross = any("/encoder_decoder_attention/" in name for name in specs)
    if embedding is None or query is None or key is None or has_cross:
        return None
    missing = [name for name in ("num_heads", "head_dim") if name not in stated]
    if missing:
        raise ValueError(
            f"the source is a language model, but does not state its {' and '.join(missing)}, which"
            " its shapes do not show: name a model file"
        )
    settings = dict(stated)
    for name in STATED_ROPES:
        if settings.get(name) is not None:
            settings[name] = Rope(**settings[name])
    activations = tuple(settings.get("mlp_activations", ("silu", "linear")))
    inner = specs.get(f"{first}/mlp/{input_kernel_names(activations)[0]}/kernel")
    if inner is None:
        raise ValueError(
            f"the source states mlp_activations {activations!r}, but its first layer has no such"
            " MLP: its record is of another model"
        )
    if not all(len(s.shape) == 2 and s.size for s in (embedding, query, key, inner)):
        raise ValueError(
            f"the source's leaves have the shapes of no language model: its embedding is"
            f" {embedding}, its first query {query}, its first key {key}, its first MLP kernel"
            f" {inner}"
        )
    heads, head_dim = settings["num_heads"], settings["head_dim"]
    if query.shape[1] != heads * head_dim or key.shape[1] % head_dim:
        raise ValueError(
            f"the source states {heads} heads of {head_dim}, but its first query is {query} and its"
            f" first key {key}: its record is of another model"
        )
    return DecoderConfig(
        vocab_size=embedding.shape[0],
        emb_dim=embedding.shape[1],
        num_layers=_num_layers(specs),
        mlp_dim=inner.shape[1],
        num_kv_heads=key.shape[1] // head_dim,
        qkv_bias=f"{first}/self_attention/query/bias" in specs,
        attention_out_bias=f"{first}/self_attention/out/bias" in specs,
        mlp_bias=f"{first}/mlp/wo/bias" in specs,
        logits_via_embedding=f"{TARGET}{STACK}/logits_dense/kernel" not in specs,
        logits_bias=f"{TARGET}{STACK}/logits_dense/bias" in specs,
        **settings,
    )


def _num_layers(specs: Mapping[str, LeafSpec]) -> int:
    """How many layers there are.

    Raises:
      ValueError: they are not numbered one by one from 0.
    """
    found = {int(match[1]) for name in specs if (match := _LAYER.match(name))}
    odd = sorted(found - set(range(len(found))))
    if odd:
        raise ValueError(
            f"the source has {len(found)} layers below target/{STACK}, one of them"
            f" layers_{odd[0]}: they are not numbered one by one from 0, so it is no language model"
            " that can be inferred"
        )
    return len(found)
