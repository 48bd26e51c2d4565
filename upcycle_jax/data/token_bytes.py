"""What the tokens of a vocabulary are as text, byte by byte: so much of a text as a token stands
for, also where it is a part of a character.
"""

import json

import numpy as np
import seqio

from upcycle_jax.data.text.tokenizer import Tokenizer
from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""
_BYTE_VOCABULARY_OFFSET = 3


def token_bytes(vocabulary: seqio.Vocabulary) -> list[bytes] | None:
    """The text of each id, b'' for special tokens; None where the vocabulary is of a kind that does
    not say. A space that SentencePiece puts before a text is taken for a part of it.
    """
    if isinstance(vocabulary, seqio.ByteVocabulary):
        plain = [bytes([byte]) for byte in range(256)]
        return _of_size([b""] * _BYTE_VOCABULARY_OFFSET + plain, vocabulary.vocab_size)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        pieces = vocabulary.tokenizer
        known = [
            b""
            if pieces.is_control(number) or pieces.is_unknown(number)
            else _piece(pieces.id_to_piece(number))
            for number in range(pieces.vocab_size())
        ]
        return _of_size(known, vocabulary.vocab_size)
    if isinstance(vocabulary, TokenizerVocabulary):
        return _of_tokenizer(vocabulary.tokenizer)
    return None


def _of_size(known: list[bytes], size: int) -> list[bytes]:
    """With ids that stand for nothing up to `size`, which may be those of sentinels."""
    return known[:size] + [b""] * (size - len(known))


def _piece(text: str) -> bytes:
    """Of a SentencePiece piece; `<0x0A>` is a byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode()


def _of_tokenizer(tokenizer: Tokenizer) -> list[bytes] | None:
    stated = json.loads(tokenizer.library.to_str())
    decoder = json.dumps(stated.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        of_sign = byte_level_signs()

        def as_bytes(text: str) -> bytes:
            # Text that is not spelt in signs is that of an added token, which follows.
            return bytes(of_sign[sign] for sign in text if sign in of_sign)

    elif '"Metaspace"' in decoder or _SPACE in decoder:
        as_bytes = _piece
    else:
        return None
    out = [b""] * tokenizer.size
    for text, number in tokenizer.library.get_vocab(with_added_tokens=False).items():
        out[number] = as_bytes(text)
    # Added tokens are spelt as they are; special ones are no part of a text.
    for token in stated.get("added_tokens", []):
        out[token["id"]] = b"" if token["special"] else token["content"].encode()
    return out


def byte_level_signs() -> dict[str, int]:
    """The byte that each sign of a byte-level tokenizer stands for (GPT-2's table): printable
    Latin-1 bytes stand for themselves, the others are numbered from 256 on.
    """
    printable = np.r_[ord("!") : ord("~") + 1, 0xA1:0xAD, 0xAE:0x100]
    others = np.setdiff1d(np.arange(256), printable)
    signs = {chr(byte): int(byte) for byte in printable}
    return signs | {chr(256 + place): int(byte) for place, byte in enumerate(others)}
