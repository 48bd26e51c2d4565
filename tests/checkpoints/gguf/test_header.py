"""Headers of GGUF files: what they hold, and what damage and malice make of them."""

import resource
import struct

import numpy as np
import pytest

from tests.checkpoints.gguf_models import as_stored, gguf_package, tensors, write
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.gguf.header import read_header

MORE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "ä", "", "▁b"],
    "tokenizer.ggml.scores": [0.5, -1.0],
    "general.flag": True,
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "llama", as_stored("llama", tensors("llama")), more=MORE, kind="Q8_0")
    return path


def test_agrees_with_the_package(model):
    theirs = gguf_package().GGUFReader(model)
    ours = read_header(np.fromfile(model, np.uint8), model)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.type, info.start) == (int(tensor.tensor_type), tensor.data_offset)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    for key, field in fields.items():
        np.testing.assert_array_equal(ours.metadata[key], field.contents())
    assert ours.metadata["tokenizer.ggml.tokens"] == ["a", "ä", "", "▁b"]


def refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_truncated_anywhere(model):
    data = model.read_bytes()
    end = min(t.start for t in read_header(np.frombuffer(data, np.uint8), model).tensors.values())
    rng = np.random.default_rng(0)
    for length in {0, 1, 4, 8, 20, 24, *rng.integers(0, end, 60).tolist()}:
        refused(model, data[:length], "damaged|truncated|no GGUF file")
    for length in (end, end + 1000, len(data) - 32):
        refused(model, data[:length], "is truncated: .* ends at byte .* Copy it again")


def test_other_files(model):
    data = model.read_bytes()
    refused(model, b"PK\3\4" + data[4:], "is no GGUF file: it does not begin with 'GGUF'")
    for version in (1, 4):
        changed = data[:4] + struct.pack("<I", version) + data[8:]
        refused(model, changed, f"GGUF file of version {version}; versions 2 and 3 are read")
    refused(model, data[:4] + struct.pack(">I", 3) + data[8:], "is a big-endian GGUF file")


def test_claims_are_not_believed(model):
    """Counts of 2^60 are refused where they are read: nothing is allocated for them."""
    data, many = model.read_bytes(), struct.pack("<Q", 1 << 60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(model, data[:8] + many + data[16:], "damaged")
    refused(model, data[:16] + many + data[24:], "damaged")
    refused(model, data[:24] + many + data[32:], "a name of 1152921504606846976 bytes")
    tokens = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    refused(model, data[:tokens] + many + data[tokens + 8 :], "a list of 1152921504606846976")
    scores = data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    million = struct.pack("<Q", 1 << 24)
    refused(model, data[:scores] + million + data[scores + 8 :], "truncated")
    refused(model, data[: scores - 4] + struct.pack("<I", 9) + data[scores:], "unknown type 9")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"


def test_tensors_that_cannot_be(model):
    data = model.read_bytes()
    name = b"output_norm.weight"
    rank = data.index(name) + len(name)  # then u32 rank, u64 size, u32 type, u64 start

    def changed(offset, code, value):
        piece = struct.pack(f"<{code}", value)
        return data[: rank + offset] + piece + data[rank + offset + len(piece) :]

    refused(model, changed(0, "I", 5), "'output_norm.weight' has 5 dimensions")
    refused(model, changed(4, "Q", 1 << 62), "larger than any array")
    refused(model, changed(4, "Q", 1 << 40), "is truncated: output_norm.weight")
    refused(model, changed(12, "I", 4000), "output_norm.weight is stored as type number 4000")
    refused(model, changed(12, "I", 26), "is stored as type I32, which cannot be dequantised")
    refused(model, changed(16, "Q", 3), "'output_norm.weight' is not aligned")
    refused(model, changed(16, "Q", 1 << 62), "is truncated: output_norm.weight")
    twice = data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", 1)
    refused(model, twice, "the tensor 'blk.0.ffn_up.weight' is there twice")
    key = b"tokenizer.ggml.scores"
    refused(model, data.replace(key, b"tokenizer.ggml.tokens", 1), "is there twice")
    refused(model, data.replace(b"general.flag", b"general.fl\xff\xff", 1), "a text is no UTF-8")
