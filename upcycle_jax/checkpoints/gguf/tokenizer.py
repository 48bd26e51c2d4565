"""The tokenizer in the metadata of a GGUF file, as the `tokenizers` library and transformers have
it.

Two kinds are read: byte-level BPE ('gpt2': SmolLM, Llama 3, Qwen) and SentencePiece's BPE ('llama':
Llama 2, Mistral, TinyLlama). How text is cut before merging is named in the file and not described
there; the expressions below are those with which the vocabularies were trained, as the tokenizers
of GPT-2, Llama 3 and Qwen publish them, and for 'default' llama.cpp's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.printing import printable

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # Values of tokenizer.ggml.token_type.
_TAKE_FILES = "take the tokenizer files of the model's Hugging Face folder"
_SPACE = "▁"  # How SentencePiece writes a space.

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_SMOLLM = (r"\p{N}", *_GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""`tokenizer.ggml.pre` -> expressions; each cuts further what those before it have left, and what
one matches is a piece, as is what lies between two matches.
"""

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class NoTokenizer(ValueError):
    """There is no tokenizer, or one of a kind that is not read."""


def tokenizer_files(metadata: Mapping[str, Any], place: Path, rows: int) -> dict[str, str]:
    """The tokenizer as files of a Hugging Face folder.

    Args:
      metadata: of the file; see `header.Header`.
      place: the file, for messages.
      rows: of the model's embedding.

    Returns:
      Content by name of the file: tokenizer.json and tokenizer_config.json.

    Raises:
      NoTokenizer: there is none, or it is of a kind that is not read.
      ValueError: it is damaged, or has more tokens than the embedding has rows.
    """
    vocabulary = _Vocabulary(metadata, place, rows)
    config = json.dumps(vocabulary.config(), indent=2, ensure_ascii=False)
    return {
        TOKENIZER: vocabulary.tokenizer().to_str(pretty=True),
        TOKENIZER_CONFIG: f"{config}\n",
    }


def build_tokenizer(metadata: Mapping[str, Any], place: Path, rows: int) -> tokenizers.Tokenizer:
    """The tokenizer; arguments and errors as for `tokenizer_files`."""
    return _Vocabulary(metadata, place, rows).tokenizer()


class _Vocabulary:
    def __init__(self, metadata: Mapping[str, Any], place: Path, rows: int):
        self._metadata, self._place = metadata, place
        self.model = self._get("model", str)
        if self.model not in ("gpt2", "llama"):
            raise NoTokenizer(
                f"{printable(self._place)}: a tokenizer of kind {printable(repr(self.model))} is"
                f" not read (known are gpt2 and llama): {_TAKE_FILES}"
            )
        self.tokens: list[str] = self._get("tokens", list)
        if len(self.tokens) > rows:
            raise self._refuse(
                "tokens", f"{len(self.tokens)} tokens, but the embedding has {rows} rows"
            )
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            raise self._refuse("tokens", "a token is there twice")
        types = metadata.get("tokenizer.ggml.token_type")
        if types is None:
            types = np.full(len(self.tokens), _NORMAL)
        if not isinstance(types, np.ndarray) or types.shape != (len(self.tokens),):
            raise self._refuse("token_type", "it does not belong to the list of tokens")
        self.types: np.ndarray = types
        self.special = {name: self._token(key) for name, key in _SPECIAL.items()}

    def _refuse(self, key: str, why: str) -> ValueError:
        return untrusted.damaged(self._place, f"tokenizer.ggml.{key}: {why}")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise NoTokenizer(
                f"{printable(self._place)} has no tokenizer (tokenizer.ggml.{key}): {_TAKE_FILES}"
            )
        if not isinstance(value, kind):
            raise self._refuse(key, f"a {type(value).__name__}")
        return value

    def _token(self, key: str) -> str | None:
        number = self._metadata.get(f"tokenizer.ggml.{key}")
        if number is None or number in (-1, 2**32 - 1):  # the file's ways to say 'none'
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise self._refuse(key, f"there is no token {number!r}")
        return self.tokens[number]

    def tokenizer(self) -> tokenizers.Tokenizer:
        out = self._sentencepiece() if self.model == "llama" else self._byte_level()
        for kind in (_CONTROL, _USER_DEFINED):
            chosen = [self.tokens[number] for number in np.flatnonzero(self.types == kind)]
            special = kind == _CONTROL
            added = [AddedToken(token, normalized=False, special=special) for token in chosen]
            out.add_special_tokens(added) if special else out.add_tokens(added)
        self._add_ends(out)
        if out.get_vocab_size() != len(self.tokens):
            raise self._refuse("tokens", "they do not keep their numbers")
        return out

    def _byte_level(self) -> tokenizers.Tokenizer:
        name = self._get("pre", str, "default")
        if name not in PRE_TOKENIZERS:
            raise NoTokenizer(
                f"{printable(self._place)}: how tokenizer.ggml.pre {printable(repr(name))} cuts"
                f" text is not known here (known are {', '.join(PRE_TOKENIZERS)}): {_TAKE_FILES}"
            )
        merges = []
        for merge in self._get("merges", list):
            left, space, right = merge.partition(" ")
            if not space or not {left, right, left + right} <= self.ids.keys():
                raise self._refuse("merges", f"{merge!r} does not merge two of the tokens")
            merges.append((left, right))
        # Llama 3's vocabulary holds whole words that no sequence of merges reaches.
        whole_words = PRE_TOKENIZERS[name] is _LLAMA3
        out = tokenizers.Tokenizer(models.BPE(self.ids, merges, ignore_merges=whole_words))
        if PRE_TOKENIZERS[name] is _QWEN2:
            out.normalizer = normalizers.NFC()
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
            for expression in PRE_TOKENIZERS[name]
        ]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        out.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
        out.decoder = decoders.ByteLevel()
        return out

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        unknown = self.special["unk_token"]
        out = tokenizers.Tokenizer(
            models.BPE(
                self.ids,
                self._merges_by_score(),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback="<0x00>" in self.ids,
            )
        )
        prefix = self._get("add_space_prefix", bool, True)
        before = [normalizers.Prepend(_SPACE)] if prefix else []
        out.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
        after = [decoders.Strip(" ", 1, 0)] if prefix else []
        out.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        )
        return out

    def _merges_by_score(self) -> Sequence[tuple[str, str]]:
        """SentencePiece merges the pair whose result has the best score: a rank for every way to
        make a token out of two.
        """
        scores = self._metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or scores.shape != (len(self.tokens),):
            raise self._refuse("scores", "there is not one for each token")
        found = []
        for number in np.flatnonzero(self.types == _NORMAL):
            token = self.tokens[number]
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in self.ids and right in self.ids:
                    found.append((-float(scores[number]), self.ids[left], self.ids[right]))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(found)]

    def _add_ends(self, out: tokenizers.Tokenizer) -> None:
        """The tokens that every text begins and ends with."""
        llama3 = PRE_TOKENIZERS.get(self._metadata.get("tokenizer.ggml.pre", "")) is _LLAMA3
        first = self._get("add_bos_token", bool, self.model == "llama" or llama3)
        last = self._get("add_eos_token", bool, False)
        bos = self.special["bos_token"] if first else None
        eos = self.special["eos_token"] if last else None
        before, after = ([bos] if bos else []), ([eos] if eos else [])
        if not before and not after:
            return
        out.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1",
                  *(f"{token}:1" for token in after)],
            special_tokens=[(token, self.ids[token]) for token in {*before, *after}],
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json."""
        out: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: token for name, token in self.special.items() if token is not None},
        }
        architecture = self._metadata.get("general.architecture", "")
        length = self._metadata.get(f"{architecture}.context_length")
        if isinstance(length, int) and length > 0:
            out["model_max_length"] = length
        template = self._metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            out["chat_template"] = template
        return out
