"""Tokenizers out of GGUF files, against the libraries that trained their vocabularies."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from upcycle_jax.checkpoints.gguf.tokenizer import build_tokenizer, tokenizer_files

PLACE = pathlib.Path("/models/m.gguf")
TEXTS = (
    "The year 2024 isn't over; it's    12345 lines,\n\n\tand\r\n more...  ",
    "def f(x):\n    return {'a': x+1}  # «ça marche» — naïve, Ⅷ½ ١٢٣",
    "x<|end|>y <think>z</think>",
    " leading",
    "한국어 日本語 🙂",
    "",
)


def trained(pre_tokenizer, normalizer=None):
    """A byte-level BPE trained with another library's own pre-tokenizer, and its metadata."""
    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer, out.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    out.train_from_iterator([*TEXTS, __doc__, pathlib.Path(__file__).read_text()], trainer)
    out.add_tokens(["<think>", "</think>"])
    tokens = [out.id_to_token(number) for number in range(out.get_vocab_size())]
    model = json.loads(out.to_str())["model"]
    kinds = [3 if t.startswith("<|") else 4 if "think>" in t else 1 for t in tokens]
    return out, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }


def qwen2():
    transformers = pytest.importorskip("transformers", reason="it knows how Qwen cuts text")
    backend = transformers.Qwen2Tokenizer().backend_tokenizer
    return backend.pre_tokenizer, backend.normalizer


def llama3():
    """As tiktoken's files of Llama 3 are converted."""
    convert = pytest.importorskip(
        "transformers.convert_slow_tokenizer", reason="it knows how Llama 3 cuts text"
    )
    pattern = convert.TikTokenConverter().pattern
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, letters]), None


def smollm():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]), None


def gpt2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False), None


@pytest.mark.parametrize(
    ("name", "reference"),
    [("gpt-2", gpt2), ("smollm", smollm), ("qwen2", qwen2), ("llama-bpe", llama3)],
)
def test_cuts_text_as_the_model_was_trained(name, reference):
    theirs, metadata = trained(*reference())
    ours = build_tokenizer(metadata | {"tokenizer.ggml.pre": name}, PLACE, 512)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text).tokens == theirs.encode(text).tokens
        decoded = ours.decode(ours.encode(text).ids, skip_special_tokens=False)
        assert decoded == (text if name != "qwen2" else ours.normalizer.normalize_str(text))


def test_files_without_a_pre_tokenizer():
    """llama.cpp's own way: punctuation apart, digits by three."""
    _, metadata = trained(*gpt2())
    ours = build_tokenizer(metadata, PLACE, 512)
    pieces = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("Is 12345, or (x)?")]
    assert pieces == ["Is", "Ġ", "123", "45", ",", "Ġor", "Ġ", "(", "x", ")?"]


def test_whole_words_of_llama_3():
    """A word of the vocabulary is one token there, also where no merges lead to it."""
    _, metadata = trained(*llama3())
    tokens = [*metadata["tokenizer.ggml.tokens"], "qzqz"]
    types = np.append(metadata["tokenizer.ggml.token_type"], 1)
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    words = build_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, PLACE, 512)
    assert words.encode("qzqz").tokens == ["qzqz"]
    letters = build_tokenizer(metadata | {"tokenizer.ggml.pre": "qwen2"}, PLACE, 512)
    assert len(letters.encode("qzqz").tokens) > 1


def test_the_first_token_of_a_text():
    _, metadata = trained(*gpt2())
    begin = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True}
    ours = build_tokenizer(metadata | begin, PLACE, 512)
    assert ours.encode("a").tokens == ["<|pad|>", "a"]
    assert ours.encode("a", "b").tokens == ["<|pad|>", "a", "<|pad|>", "b"]
    ends = {"tokenizer.ggml.add_eos_token": True}
    assert build_tokenizer(metadata | ends, PLACE, 512).encode("a").tokens == ["a", "<|end|>"]
    llama = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.pre": "llama-bpe"}
    assert build_tokenizer(metadata | llama, PLACE, 512).encode("a").tokens == ["<|pad|>", "a"]


def test_a_sentencepiece_vocabulary(tmp_path):
    """Llama 2's kind, against SentencePiece itself."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join([*TEXTS[:2], pathlib.Path(__file__).read_text()]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = theirs.get_piece_size()
    kinds = [
        2 if theirs.is_unknown(n) else 3 if theirs.is_control(n) else 6 if theirs.is_byte(n) else 1
        for n in range(count)
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(n) for n in range(count)],
        "tokenizer.ggml.scores": np.array([theirs.get_score(n) for n in range(count)], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    ours = build_tokenizer(metadata, PLACE, 512)
    for text in TEXTS[:2] + TEXTS[3:5]:
        assert ours.encode(text).ids == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text).ids) == text


def test_files_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it reads what is written")
    theirs, metadata = trained(*smollm())
    metadata |= {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>",
    }
    for name, content in tokenizer_files(metadata, PLACE, 512).items():
        (tmp_path / name).write_text(content)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == theirs.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert loaded.model_max_length == 77
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|end|>"


def test_what_is_refused():
    _, good = trained(*gpt2())

    def refused(message, rows=512, **keys):
        metadata = good | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        with pytest.raises(ValueError, match=message) as caught:
            build_tokenizer(metadata, PLACE, rows)
        assert str(PLACE) in str(caught.value)

    tokens = good["tokenizer.ggml.tokens"]
    refused("has no tokenizer", model=None)
    refused("of kind 'bert' is not read", model="bert")
    refused("'olmo' cuts text is not known here", pre="olmo")
    refused(f"{len(tokens)} tokens, but the embedding has 100 rows", rows=100)
    refused("a token is there twice", tokens=[*tokens[:-1], tokens[5]])
    refused("token_type: it does not belong", token_type=np.ones(3, np.int32))
    refused("merges: 'qzqz' does not merge", merges=["qzqz"])
    refused("merges: 'q qzqz' does not merge", merges=["q qzqz"])
    refused("eos_token_id: there is no token 5000", eos_token_id=5000)
    refused("scores: there is not one for each", model="llama")
