"""Which tensors of a GGUF file the parameters are: Hugging Face's table in llama.cpp's names.

llama.cpp turns neighbouring entries of a head where Hugging Face turns the two halves of it, so in
files of the architecture 'llama' the rows of queries and keys lie interleaved. For 'qwen2' and
'qwen3' it turns halves as well.
"""

import dataclasses
import re
from collections.abc import Mapping

from upcycle_jax.checkpoints.gguf.config import ROPE_FACTORS
from upcycle_jax.checkpoints.gguf.files import GgufFile
from upcycle_jax.checkpoints.huggingface.base import Rows, Source
from upcycle_jax.checkpoints.huggingface.decoder.tensors import NAMES, layout
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import TARGET

_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's modules -> llama.cpp's."""

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_IGNORED = re.compile(rf"{re.escape(ROPE_FACTORS)}|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")
"""What says nothing that the metadata and `ROPE_FACTORS` do not say."""


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor.

    >>> gguf_name("model.layers.3.self_attn.o_proj.weight")
    'blk.3.attn_output.weight'
    """
    module, _, kind = name.rpartition(".")
    if match := _IN_LAYER.fullmatch(module):
        return f"blk.{match.group(1)}.{_LAYER[match.group(2)]}.{kind}"
    return f"{_MODEL[module]}.{kind}"


def sources(file: GgufFile, architecture: str, config: DecoderConfig) -> dict[str, Source]:
    """The tensor behind every leaf, by full path.

    Args:
      file: the file.
      architecture: its `general.architecture`.
      config: of its model.

    Raises:
      ValueError: a tensor has no place, is missing, or contradicts the metadata.
    """
    out: dict[str, Source] = {}
    for place in layout(architecture, config, NAMES[architecture]):
        assert isinstance(place.sources, Source)  # Dense models have one tensor for each leaf.
        name = gguf_name(place.sources.tensor)
        rows = _rows(name, config) if architecture == "llama" else None
        source = dataclasses.replace(place.sources, tensor=name, rows=rows)
        stored = file.tensors.get(name)
        if stored is None:
            raise ValueError(
                f"{printable(file.path)} lacks {name}: it holds a part of a model, or its metadata"
                f" describe another ({_described(config)})"
            )
        wanted = place.shape[::-1] if source.transposed else place.shape
        if stored.shape != wanted:
            raise ValueError(
                f"{printable(file.path)}: {name} has the shape {list(stored.shape)},"
                f" {list(wanted)} belongs there according to its metadata ({_described(config)})"
            )
        out[TARGET + place.path] = source
    unknown = sorted(
        name
        for name in file.tensors.keys() - {source.tensor for source in out.values()}
        if not _IGNORED.fullmatch(name)
    )
    if unknown:
        raise ValueError(
            f"{printable(file.path)}: {len(unknown)} of its tensors have no place in a dense model"
            f" of architecture {architecture} with {_described(config)}:"
            f" {printable(', '.join(unknown[:5]))}"
        )
    return out


def _rows(name: str, config: DecoderConfig) -> Rows | None:
    """Rows of queries and keys, head by head: first the even ones, then the odd ones."""
    heads: Mapping[str, int] = {"attn_q": config.num_heads, "attn_k": config.kv_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return None
    return Rows((count, 2, config.head_dim // 2), (config.head_dim, 1, 2))


def _described(config: DecoderConfig) -> str:
    return (
        f"{config.num_layers} layers of width {config.emb_dim}, {config.num_heads} heads of size"
        f" {config.head_dim}, {config.kv_heads} of them for keys, MLP of {config.mlp_dim}"
    )
