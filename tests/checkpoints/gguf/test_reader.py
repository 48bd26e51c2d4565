"""GGUF files read as checkpoints: names, order of rows, types, parts, and where they lie."""

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.gguf_models import (
    SIZES,
    as_stored,
    gguf_package,
    metadata,
    shapes,
    tensors,
    write,
)
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.gguf.tensors import gguf_name
from upcycle_jax.trees import LeafSpec

LAYER = {
    "attn_norm.weight": "pre_self_attention_layer_norm/scale",
    "attn_q.weight": "self_attention/query/kernel",
    "attn_k.weight": "self_attention/key/kernel",
    "attn_v.weight": "self_attention/value/kernel",
    "attn_q.bias": "self_attention/query/bias",
    "attn_k.bias": "self_attention/key/bias",
    "attn_v.bias": "self_attention/value/bias",
    "attn_q_norm.weight": "self_attention/query_norm/scale",
    "attn_k_norm.weight": "self_attention/key_norm/scale",
    "attn_output.weight": "self_attention/out/kernel",
    "ffn_norm.weight": "pre_mlp_layer_norm/scale",
    "ffn_gate.weight": "mlp/wi_0/kernel",
    "ffn_up.weight": "mlp/wi_1/kernel",
    "ffn_down.weight": "mlp/wo/kernel",
}
MODEL = {
    "token_embd.weight": "target/token_embedder/embedding",
    "output_norm.weight": "target/decoder/decoder_norm/scale",
    "output.weight": "target/decoder/logits_dense/kernel",
}


def leaf_of(name):
    if name in MODEL:
        return MODEL[name]
    _, layer, rest = name.split(".", 2)
    return f"target/decoder/layers_{layer}/{LAYER[rest]}"


def expected_leaves(values):
    """Hugging Face's tensors as leaves."""
    return {
        leaf_of(name): value.T if leaf_of(name).endswith("kernel") else value
        for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True)]
)
def test_every_tensor_is_the_leaf_that_it_belongs_to(tmp_path, architecture, tied):
    values = tensors(architecture, tied=tied)
    write(tmp_path / "m.gguf", architecture, as_stored(architecture, values))
    reader = open_checkpoint(tmp_path / "m.gguf")
    assert (reader.format, reader.step) == ("gguf", 0)
    expected = expected_leaves(values)
    assert list(reader.specs()) == sorted(expected)
    rng = np.random.default_rng(1)
    for name, value in expected.items():
        assert reader.specs()[name] == LeafSpec(value.shape, np.float32)
        np.testing.assert_array_equal(reader.read(name), value)
        bounds = [sorted(rng.integers(0, size + 1, 2)) for size in value.shape]
        part = tuple(slice(int(a), int(b)) for a, b in bounds)
        np.testing.assert_array_equal(reader.read(name, part), value[part])


def test_heads_of_another_size(tmp_path):
    """head_dim 24 with 4 heads is wider than the stream, and is stated as key_length."""
    sizes = SIZES | {"head_dim": 24}
    values = tensors("llama", sizes=sizes)
    keys = {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24}
    write(
        tmp_path / "m.gguf",
        "llama",
        as_stored("llama", values, sizes),
        keys=metadata("llama") | keys,
    )
    reader = open_checkpoint(tmp_path / "m.gguf")
    assert reader.model_config().head_dim == 24
    for name, value in expected_leaves(values).items():
        np.testing.assert_array_equal(reader.read(name), value)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_of_weights(tmp_path, kind):
    """Quantised matrices come out as the package dequantises them whole, whatever part is read."""
    gguf = gguf_package()
    values = tensors("qwen2")
    write(tmp_path / "m.gguf", "qwen2", values, kind=kind)
    reader = open_checkpoint(tmp_path / "m.gguf")
    dtypes = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    for name, value in values.items():
        leaf = leaf_of(name)
        want = value
        if value.ndim == 2:
            number = gguf.GGMLQuantizationType[kind]
            want = gguf.dequantize(gguf.quantize(value, number), number)
            # The coarsest of them has 16 steps over twice the largest weight.
            np.testing.assert_allclose(want, value, atol=np.abs(value).max() / 8)
        want = want.T if leaf.endswith("kernel") else want
        read = reader.read(leaf)
        assert read.dtype == (dtypes.get(kind, np.float32) if value.ndim == 2 else np.float32)
        np.testing.assert_array_equal(read.astype(np.float32), want)
        part = tuple(slice(5, min(size, 43)) for size in want.shape)
        np.testing.assert_array_equal(reader.read(leaf, part).astype(np.float32), want[part])


def test_a_block_by_hand(tmp_path):
    """Q4_1: a float16 step d and least value m for 32 weights of 4 bits, w = m + d q; byte i holds
    weight i in its low half and weight i + 16 in its high half. With d = 0.5, m = -1 and all bytes
    0x31, weights 0-15 are -1 + 0.5 * 1 = -0.5 and weights 16-31 are -1 + 0.5 * 3 = 0.5.
    """
    block = np.frombuffer(np.array([0.5, -1], "<f2").tobytes() + b"\x31" * 16, np.uint8)
    blocks = {"blk.0.ffn_up.weight": (np.tile(block, (96, 2)), "Q4_1")}
    write(tmp_path / "m.gguf", "qwen2", tensors("qwen2"), blocks=blocks)
    up = open_checkpoint(tmp_path / "m.gguf").read("target/decoder/layers_0/mlp/wi_1/kernel")
    column = np.repeat([-0.5, 0.5, -0.5, 0.5], 16)
    np.testing.assert_array_equal(up, np.tile(column[:, None], (1, 96)))


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "IQ4_NL"])
def test_types_that_the_package_reads_and_does_not_write(tmp_path, kind):
    """Blocks of random bytes, whose float16 scales are set to 1/64."""
    gguf = gguf_package()
    sizes = SIZES | {"intermediate_size": 256}
    number = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 256, (64, 256 // elements, size), np.uint8)
    scale = np.array([1 / 64], "<f2").view(np.uint8)
    raw[..., :2] = raw[..., -2:] = scale
    if kind == "Q4_K":
        raw[..., 2:4] = scale
    raw = raw.reshape(64, -1)
    write(
        tmp_path / "m.gguf",
        "qwen2",
        tensors("qwen2", sizes=sizes),
        keys=metadata("qwen2", sizes),
        blocks={"blk.1.ffn_down.weight": (raw, kind)},
    )
    want = gguf.dequantize(raw, number)
    assert np.isfinite(want).all()
    down = open_checkpoint(tmp_path / "m.gguf")
    leaf = "target/decoder/layers_1/mlp/wo/kernel"
    np.testing.assert_array_equal(down.read(leaf), want.T)
    part = (slice(33, 190), slice(7, 50))
    np.testing.assert_array_equal(down.read(leaf, part), want.T[part])


def test_names_are_those_of_the_package():
    """llama.cpp's own table says the same."""
    gguf = gguf_package()
    for architecture in ("llama", "qwen2", "qwen3"):
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
        table = gguf.get_tensor_name_map(kind, 2)
        for ours, (theirs, _) in shapes(architecture, tied=False).items():
            module, _, last = theirs.rpartition(".")
            assert f"{table.get_name(module)}.{last}" == ours == gguf_name(theirs)


def test_a_folder_with_one_file(tmp_path):
    write(tmp_path / "m.gguf", "qwen3", tensors("qwen3"))
    (tmp_path / "README.md").write_text("a model")
    reader = open_checkpoint(tmp_path)
    assert reader.path.name == "m.gguf"
    assert reader.fingerprint() == open_checkpoint(tmp_path / "m.gguf").fingerprint()
    write(tmp_path / "other.gguf", "qwen3", tensors("qwen3", seed=1))
    assert open_checkpoint(tmp_path / "other.gguf").fingerprint() != reader.fingerprint()
    with pytest.raises(ValueError, match=r"2 GGUF files \(m.gguf, other.gguf\): name the one"):
        open_checkpoint(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    values = tensors("llama")

    def refused(edit, message):
        write(tmp_path / "m.gguf", "llama", {**values, **edit})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "m.gguf")
        (tmp_path / "m.gguf").unlink()

    refused(
        {"blk.0.ffn_gate_inp.weight": np.zeros((8, 64), np.float32)},
        "1 of its tensors have no place.*ffn_gate_inp",
    )
    refused({"blk.2.attn_q.weight": values["blk.1.attn_q.weight"]}, "no place.*blk.2.attn_q.weight")
    refused(
        {"blk.1.ffn_up.weight": np.zeros((95, 64), np.float32)},
        r"ffn_up.weight has the shape \[95, 64\], \[96, 64\]",
    )
    refused(
        {"output.weight": np.zeros((39, 64), np.float32)}, r"output.weight has the shape \[39, 64\]"
    )
    values.pop("blk.1.attn_norm.weight")
    refused({}, "lacks blk.1.attn_norm.weight")


def test_without_the_package(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", "llama", tensors("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'upcycle_jax\[gguf\]'"):
        open_checkpoint(tmp_path / "m.gguf")
