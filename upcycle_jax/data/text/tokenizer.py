"""Hugging Face tokenizers: `tokenizer.json` with the special tokens that the files beside it state.
No TensorFlow, and the package `tokenizers` only where text is encoded or decoded.

Ids are the model's own: nothing is shifted, 0 is a token as any other.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_STATED_IN = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name special tokens: the first that names one decides."""
_MODEL_CONFIG = "config.json"
"""States ids of special tokens; asked where none of `_STATED_IN` is there."""
_STOPS_STATED_IN = ("generation_config.json", _MODEL_CONFIG)
"""Files that state `eos_token_id`, one or several: the first that does decides."""
_ROLES = ("bos", "eos", "pad", "unk")
WITHOUT_ROW = ("<image_soft_token>",)
"""Added tokens for which language models have no row, though their tokenizer has them: it stands
for images, in the tokenizer that Gemma 3's models of text share with those that see. No text gives
such a token here.
"""
_MAX_BYTES = {TOKENIZER_FILE: 512 << 20}
_MAX_JSON_BYTES = 64 << 20
_MOST_IDS = 2**24

_FORMS = (
    "'bytes', a folder with tokenizer.json (or that file), or the path of a SentencePiece model"
)


def is_named(vocabulary: str) -> bool:
    """Whether VOCABULARY names a Hugging Face tokenizer: a folder, or a `.json` file."""
    if vocabulary.endswith((".json", ".model")):  # the folder need not be asked
        return vocabulary.endswith(".json")
    return epath.Path(vocabulary).is_dir()


def file_of(vocabulary: str) -> epath.Path:
    """The `tokenizer.json` that VOCABULARY names."""
    path = epath.Path(vocabulary)
    return path / TOKENIZER_FILE if path.is_dir() else path


def _read(path: epath.Path) -> bytes:
    size = path.stat().length
    most = _MAX_BYTES.get(path.name, _MAX_JSON_BYTES)
    if size > most:
        raise ValueError(f"{path} has {size} bytes, more than {most}: it is no tokenizer's file")
    return path.read_bytes()


def _stated(path: epath.Path) -> Mapping[str, Any] | None:
    """The object that a JSON file beside the tokenizer holds; None without the file."""
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no object: copy it again")
    return found


def _without_rowless(content: bytes) -> bytes:
    """A tokenizer.json without the tokens of `WITHOUT_ROW` that come after all others."""
    if not any(token.encode() in content for token in WITHOUT_ROW):
        return content
    made = json.loads(content)
    added = made.get("added_tokens") if isinstance(made, dict) else None
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return content
    vocabulary = made["model"].get("vocab") if isinstance(made.get("model"), dict) else None
    tokens = vocabulary.values() if isinstance(vocabulary, dict) else ()
    last_of_list = len(vocabulary) - 1 if isinstance(vocabulary, list) else -1
    others = [token for token in added if token.get("content") not in WITHOUT_ROW]
    known = [*tokens, last_of_list, *(token.get("id") for token in others)]
    last = max(number for number in known if isinstance(number, int))
    made["added_tokens"] = [
        token for token in added if token in others or not token.get("id", -1) > last
    ]
    return json.dumps(made).encode()


def special_tokens(vocabulary: str) -> dict[str, str | int]:
    """The special tokens that are stated, as text or as ids, by role: 'bos', 'eos', 'pad', 'unk'.

    Raises:
      ValueError: a file is damaged.
    """
    folder = file_of(vocabulary).parent
    stated = [found for name in _STATED_IN if (found := _stated(folder / name)) is not None]
    tokens: dict[str, str | int] = {}
    for role in _ROLES:
        for found in stated:
            token = found.get(f"{role}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                tokens.setdefault(role, token)
    if not stated:
        config = _stated(folder / _MODEL_CONFIG) or {}
        for role in _ROLES:
            number = config.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int:
                tokens[role] = number
    return tokens


def stop_ids(vocabulary: str) -> tuple[int, ...]:
    """The ids at which the folder tells generation to stop, as transformers does: `eos_token_id` of
    generation_config.json, or else of config.json. Chat models state several there.

    Raises:
      ValueError: a file is damaged, or states something else.
    """
    folder = file_of(vocabulary).parent
    for name in _STOPS_STATED_IN:
        given = (_stated(folder / name) or {}).get("eos_token_id")
        if given is None:
            continue
        found = given if isinstance(given, list) else [given]
        if not all(type(one) is int for one in found):
            raise ValueError(
                f"{folder / name} states {given!r} as eos_token_id: it must be an id, or a list of"
                " ids"
            )
        return tuple(dict.fromkeys(found))
    return ()


def identity(vocabulary: str) -> dict[str, Any]:
    """What two equal tokenizers have in common: the sha256 of the file, and special tokens.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged.
    """
    path = file_of(vocabulary)
    if not path.exists():
        if epath.Path(vocabulary).is_dir():
            raise FileNotFoundError(
                f"vocabulary {vocabulary!r}: the folder has no {TOKENIZER_FILE}. Where it has other"
                " files of a tokenizer, transformers writes it:"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise FileNotFoundError(f"vocabulary {vocabulary!r}: no such file; give {_FORMS}")
    digest = hashlib.sha256(_read(path)).hexdigest()
    return {"sha256": digest, "special_tokens": special_tokens(vocabulary)}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer; made by `load`. Two are equal where their `identity` is.

    Attributes:
      path: as it was given.
      identity: see `identity`.
      size: ids, added tokens included, but those of `WITHOUT_ROW`: the least `vocab_size` of a
        model.
      bos_id: id of the token that begins a text; None where none is stated.
      eos_id: of the one that ends a text, likewise.
      stop_ids: at which generation stops, as `stop_ids` says; with or without `eos_id`. They are no
        part of the identity: no text's tokens depend on them.
      pad_id: of padding, likewise.
      unk_id: of what is in no token, likewise.
      library: the tokenizer itself.
    """

    path: str
    identity: Mapping[str, Any]
    size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    stop_ids: tuple[int, ...]
    library: "tokenizers.Tokenizer"

    @classmethod
    def load(cls, vocabulary: str) -> "Tokenizer":
        """Reads the tokenizer that VOCABULARY names.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no tokenizer, or a stated special token is none of its tokens.
        """
        import tokenizers

        found = identity(vocabulary)
        path = file_of(vocabulary)
        try:
            library = tokenizers.Tokenizer.from_buffer(_without_rowless(_read(path)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Exception itself, or a panic, which is none
            raise ValueError(
                f"vocabulary {vocabulary!r}: {path} is no tokenizer ({error}): give {_FORMS}"
            ) from error
        # Files often keep what their last use has set.
        library.no_truncation()
        library.no_padding()
        ids = library.get_vocab(with_added_tokens=True)
        size = 1 + max(ids.values(), default=-1)
        if size > _MOST_IDS:
            raise ValueError(
                f"vocabulary {vocabulary!r}: {path} has a token of id {size - 1}, which no model"
                f" has: give {_FORMS}"
            )
        special: dict[str, int] = {}
        for role, token in found["special_tokens"].items():
            special[role] = ids.get(token, -1) if isinstance(token, str) else token
            if not 0 <= special[role] < size:
                raise ValueError(
                    f"vocabulary {vocabulary!r}: the files beside {path.name} state {token!r} as"
                    f" {role.upper()}, which is none of its {size} ids: correct"
                    f" {' or '.join(_STATED_IN)}"
                )
        return cls(
            path=vocabulary,
            identity=found,
            size=size,
            # An id beyond the tokens is one that the model was not trained to give.
            stop_ids=tuple(one for one in stop_ids(vocabulary) if 0 <= one < size),
            library=library,
            **{f"{role}_id": special.get(role) for role in _ROLES},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. Special tokens that are spelt in it are taken for
        themselves, as transformers does.
        """
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens; ids that are none are left out."""
        return self.library.decode([int(number) for number in ids], skip_special_tokens=True)

    def begins_texts(self, token_id: int) -> bool:
        """Whether a text may begin with a token: BOS, or any special token where none is stated."""
        if self.bos_id is not None:
            return token_id == self.bos_id
        added = self.library.get_added_tokens_decoder().get(token_id)
        return added is not None and added.special

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity["sha256"])


@functools.lru_cache(maxsize=8)
def _loaded(vocabulary: str, sha256: str, *stated: str) -> Tokenizer:
    return Tokenizer.load(vocabulary)


def load(vocabulary: str) -> Tokenizer:
    """As `Tokenizer.load`; read once for as long as the files do not change."""
    found = identity(vocabulary)
    stated = found["special_tokens"], stop_ids(vocabulary)
    return _loaded(vocabulary, found["sha256"], *map(json.dumps, stated))


def start_of_text(vocabulary: str | None = None) -> int:
    """What a model over VOCABULARY reads before the first token of a text
    (`DecoderOnlyFeatures.bos_id`): the BOS of a Hugging Face tokenizer, or EOS where it states
    none; 0 with every other vocabulary.

    Args:
      vocabulary: see `DatasetConfig.vocabulary`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the tokenizer is damaged, or states neither.
    """
    if vocabulary is None or not is_named(vocabulary):
        return 0
    tokenizer = load(vocabulary)
    found = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if found is None:
        raise ValueError(
            f"vocabulary {vocabulary!r} states neither BOS nor EOS: add 'eos_token' to"
            f" {_STATED_IN[0]}, or bind DecoderOnlyFeatures.bos_id"
        )
    return found
