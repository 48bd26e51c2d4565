"""From a GGUF file to a Hugging Face folder, with its tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from tests.checkpoints.gguf_models import SIZES, as_stored, metadata, tensors, write
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "Ġa"],
    "tokenizer.ggml.token_type": [3] + [1] * 257,
    "tokenizer.ggml.merges": ["Ġ a"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 4294967295,
}
BYTES = SIZES | {"vocab_size": 258}


@pytest.fixture
def model(tmp_path):
    values = as_stored("llama", tensors("llama", sizes=BYTES))
    write(tmp_path / "m.gguf", "llama", values, more=TOKENIZER)
    return tmp_path / "m.gguf"


class MadeFrom:
    """A checkpoint whose record says what it was made from."""

    format = "orbax"

    def __init__(self, path, source):
        self._reader, self.path = open_checkpoint(path), path.parent / "checkpoint_0"
        self._source = source

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def metadata(self):
        return {"surgery": {"sources": [str(self._source)]}}


def test_the_end_of_a_turn_ends_as_well(tmp_path):
    turns = {"tokenizer.ggml.eot_token_id": 257, "tokenizer.ggml.eom_token_id": "x"}
    values = as_stored("llama", tensors("llama", sizes=BYTES))
    write(tmp_path / "m.gguf", "llama", values, more=TOKENIZER | turns)
    folder = write_huggingface(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, 257]


def test_a_folder_with_the_tokenizer(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it reads what is written")
    said = []
    folder = write_huggingface(open_checkpoint(model), tmp_path / "out", progress=said.append)
    assert f"tokenizer from {model}" in said
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 128
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    a, end = 257, 0
    assert tokenizer("x a<|end|>")["input_ids"] == [1 + LETTERS.index("x"), a, end]
    written, read = open_checkpoint(folder), open_checkpoint(model)
    for name in read.specs():
        np.testing.assert_array_equal(written.read(name), read.read(name))


def test_what_was_made_from_a_file_gets_its_tokenizer(model, tmp_path):
    (tmp_path / "inner").mkdir()
    folder = write_huggingface(MadeFrom(model, model), tmp_path / "inner" / "out")
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    said = []
    gone = MadeFrom(model, tmp_path / "gone.gguf")
    folder = write_huggingface(gone, tmp_path / "inner" / "bare", progress=said.append)
    assert not (folder / "tokenizer.json").exists()
    assert any("no tokenizer is copied: name the folder or GGUF file" in line for line in said)


def test_a_file_without_a_tokenizer_and_one_that_is_named(model, tmp_path):
    bare = tmp_path / "bare.gguf"
    values = as_stored("llama", tensors("llama", sizes=BYTES))
    write(bare, "llama", values, more=TOKENIZER | {"tokenizer.ggml.pre": "unheard-of"})
    said = []
    write_huggingface(open_checkpoint(bare), tmp_path / "one", progress=said.append)
    assert any("no tokenizer is copied" in x and "'unheard-of' cuts text" in x for x in said)
    named = WritingOptions(tokenizer=model, max_positions=64)
    folder = write_huggingface(open_checkpoint(bare), tmp_path / "two", options=named)
    assert (folder / "tokenizer.json").exists()
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 64
    with pytest.raises(ValueError, match="'unheard-of' cuts text"):
        write_huggingface(
            open_checkpoint(model), tmp_path / "three", options=WritingOptions(tokenizer=bare)
        )
    small = tmp_path / "small.gguf"
    write(small, "llama", as_stored("llama", tensors("llama")), keys=metadata("llama"))
    with pytest.raises(ValueError, match="258 tokens, but the embedding has 40 rows"):
        write_huggingface(
            open_checkpoint(small), tmp_path / "four", options=WritingOptions(tokenizer=model)
        )
    assert not (tmp_path / "three").exists() and not (tmp_path / "four").exists()
