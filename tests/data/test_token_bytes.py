"""The bytes of tokens, one after another, are the text."""

import pathlib

import pytest
import seqio

from upcycle_jax.data.text import tokenizer
from upcycle_jax.data.token_bytes import byte_level_signs, token_bytes
from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary

TEXTS = ["", "one  two\n\tthree!", "ünï ∀ 漢字 \U0001f600 \u00a0"]


def joined(vocabulary, text):
    known = token_bytes(vocabulary)
    assert len(known) == vocabulary.vocab_size
    return b"".join(known[number] for number in vocabulary.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_of_bytes_and_of_a_byte_level_tokenizer(text, tokenizer_folder):
    assert joined(seqio.ByteVocabulary(extra_ids=10), text) == text.encode()
    vocabulary = TokenizerVocabulary(tokenizer.load(str(tokenizer_folder)))
    assert joined(vocabulary, text) == text.encode()
    assert token_bytes(vocabulary)[vocabulary.eos_id] == b""


def test_of_sentencepiece():
    path = (
        pathlib.Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model"
    )
    if not path.exists():
        pytest.skip("this seqio has no test vocabulary")
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=100)
    # SentencePiece puts a space before the text.
    assert joined(vocabulary, "this is a test") == b" this is a test"
    assert token_bytes(vocabulary)[vocabulary.eos_id] == b""


def test_of_a_tokenizer_with_signs_for_spaces_and_bytes(tmp_path):
    """Llama 2's kind: spaces are signs, what is in no piece is spelt in bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *spelt, "\u2581", "a", "b", "\u2581a"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(ids, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_tokens(["<think>"])
    made.add_special_tokens(["<unk>"])
    made.save(str(tmp_path / "tokenizer.json"))
    vocabulary = TokenizerVocabulary(tokenizer.load(str(tmp_path)))
    text = "a b ü a<think>"
    assert joined(vocabulary, text) == text.encode()
    assert token_bytes(vocabulary)[0] == b""


def test_a_vocabulary_that_does_not_say_has_none():
    assert token_bytes(seqio.PassThroughVocabulary(size=10)) is None


def test_signs_of_bytes_are_those_of_the_tokenizers_library():
    from tokenizers import pre_tokenizers

    signs = byte_level_signs()
    assert set(signs) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(signs.values()) == list(range(256))
    # The space is the 33rd byte that is not printed, and 32 come before it.
    assert signs["\u0120"] == ord(" ") and signs["\u010a"] == ord("\n") and signs["A"] == ord("A")
