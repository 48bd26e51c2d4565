"""Small GGUF files of random models, written with the package `gguf` and without the library's own
table of names.
"""

import numpy as np
import pytest

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
"""Under the names of Hugging Face's config.json."""

LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""Tensors of a layer: llama.cpp's name -> Hugging Face's."""

EXTRA = {
    "llama": {},
    "qwen2": {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    "qwen3": {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
}


def gguf_package():
    """The package, or a skipped test."""
    return pytest.importorskip("gguf", reason="gguf writes the files of these tests")


def shapes(architecture, *, tied=True, sizes=SIZES):
    """Every tensor of a model: llama.cpp's name -> (Hugging Face's name, shape)."""
    d, f, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    q, kv = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    linear = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    linear |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    out = {"token_embd.weight": ("model.embed_tokens.weight", (sizes["vocab_size"], d))}
    for layer in range(sizes["num_hidden_layers"]):
        for ours, theirs in (LAYER | EXTRA[architecture]).items():
            module, kind = theirs.split(".")[-2:]
            shape = linear.get(module, (head,) if module in ("q_norm", "k_norm") else (d,))
            shape = shape[:1] if kind == "bias" else shape
            out[f"blk.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}", shape)
    out["output_norm.weight"] = ("model.norm.weight", (d,))
    if not tied:
        out["output.weight"] = ("lm_head.weight", (sizes["vocab_size"], d))
    return out


def tensors(architecture, *, tied=True, sizes=SIZES, seed=0):
    """Random tensors as Hugging Face has them, by llama.cpp's name; norms are random too."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * 0.3 + ("norm" in name)).astype(np.float32)
        for name, (_, shape) in shapes(architecture, tied=tied, sizes=sizes).items()
    }


def metadata(architecture, sizes=SIZES):
    """The usual metadata, without the architecture's name before the keys."""
    return {
        "context_length": 128,
        "embedding_length": sizes["hidden_size"],
        "block_count": sizes["num_hidden_layers"],
        "feed_forward_length": sizes["intermediate_size"],
        "attention.head_count": sizes["num_attention_heads"],
        "attention.head_count_kv": sizes["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-5 if architecture == "llama" else 1e-6,
        "rope.freq_base": 10000.0 if architecture == "llama" else 1e6,
        **({"attention.key_length": sizes["head_dim"]} if architecture == "qwen3" else {}),
    }


def interleaved(rows, heads):
    """Rows of queries or keys as llama.cpp stores them for 'llama': entry i of a head's first half
    before entry i of its second.
    """
    by_half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return by_half.transpose(0, 2, 1, 3).reshape(rows.shape)


def as_stored(architecture, values, sizes=SIZES):
    """Hugging Face's tensors as a GGUF file of the architecture has them."""
    if architecture != "llama":
        return dict(values)
    heads = {"attn_q": sizes["num_attention_heads"], "attn_k": sizes["num_key_value_heads"]}
    return {
        name: interleaved(value, heads[module])
        if (module := name.split(".")[-2]) in heads
        else value
        for name, value in values.items()
    }


def write(path, architecture, values, *, keys=None, kind=None, more=None, blocks=None):
    """Writes a file.

    Args:
      path: the file.
      architecture: 'llama', 'qwen2' or 'qwen3', or another text.
      values: tensors as they are to be stored, by name.
      keys: metadata below the architecture's name; None: `metadata`. A value of None leaves out.
      kind: name of the type in which matrices are stored; None: F32.
      more: further metadata under their full keys.
      blocks: tensors that are there as blocks already: name -> (uint8 [rows, bytes], type).
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    keys = metadata(architecture) if keys is None else keys
    for key, value in {f"{architecture}.{k}": v for k, v in keys.items()}.items():
        _add(writer, key, value)
    for key, value in (more or {}).items():
        _add(writer, key, value)
    for name, (value, type_name) in (blocks or {}).items():
        writer.add_tensor(name, value, raw_dtype=gguf.GGMLQuantizationType[type_name])
    for name, value in values.items():
        if name in (blocks or {}):
            continue
        if kind is None or value.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(value, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, key, value):
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    if value is not None:
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
