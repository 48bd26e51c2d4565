"""Text held in memory, divided into passages and into a training and a validation part. No
TensorFlow.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)

PASSAGE_CHARACTERS = 4096
DOCUMENT_CHARACTERS = 2**18
"""Longer documents are cut where whole ones are learnt: some 60,000 tokens, which is a longer
context than rows have.
"""
VALIDATION_FRACTION = 0.05

_SENTENCE_ENDS = (". ", "! ", "? ", "; ")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and the key that decides its split: documents that share a key are never on both
    sides.

    Attributes:
      text: Unicode text.
      key: name of the document. Empty: the text is its own key, so equal texts fall on one side.
    """

    text: str
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages by split, in a fixed pseudo-random order.

    Attributes:
      name: domain.
      splits: UTF-8 passages of 'train' and 'validation'.
      origin: what the texts are and in which version; small and JSON-able.
    """

    name: str
    splits: Mapping[str, tuple[bytes, ...]]
    origin: Mapping[str, Any]

    def fingerprint(self) -> dict[str, Any]:
        """Counts, bytes and sha256 of each split, with the origin."""
        result: dict[str, Any] = {"origin": dict(self.origin)}
        for split, passages in self.splits.items():
            digest = hashlib.sha256()
            for passage in passages:
                digest.update(len(passage).to_bytes(8, "little"))
                digest.update(passage)
            result[split] = {
                "passages": len(passages),
                "bytes": sum(map(len, passages)),
                "sha256": digest.hexdigest(),
            }
        return result


def _cut_point(text: str, start: int, limit: int) -> int:
    """Where a passage that begins at `start` ends: after a blank line, a line, a sentence or a
    word, and no later than `limit`.
    """
    least = (
        start + (limit - start) // 2
    )  # a passage of less than half the size is not worth a nicer end
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, least, limit)
        if found >= 0:
            return found + len(mark)
    found = max(text.rfind(mark, least, limit) + len(mark) for mark in _SENTENCE_ENDS)
    if found > least:
        return found
    found = text.rfind(" ", least, limit)
    return found + 1 if found >= 0 else limit


def split_passages(text: str, *, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cuts a text into passages of at most `characters`, at blank lines, line ends, sentence ends
    or spaces. Nothing is lost.

    >>> list(split_passages("one two. three four. five", characters=12))
    ['one two. ', 'three four. ', 'five']
    """
    start = 0
    while len(text) - start > characters:
        end = _cut_point(text, start, start + characters)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _hash(*parts: str) -> int:
    return int.from_bytes(
        hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:8], "little"
    )


def is_held_out(key: str, fraction: float = VALIDATION_FRACTION) -> bool:
    """Whether documents with this key belong to validation: the rule of `build_corpus`, for
    examples made of the same documents.
    """
    return _hash(key) < fraction * 2.0**64


def build_corpus(
    name: str,
    documents: Iterable[Document],
    *,
    origin: Mapping[str, Any],
    validation_fraction: float = VALIDATION_FRACTION,
    characters: int = PASSAGE_CHARACTERS,
) -> Corpus:
    """Cuts documents into passages and divides them by the hash of their key, or of the passage
    where there is no key.

    The order of passages within a split is that of a hash too: the same on every machine, and the
    first few evaluation batches are a fair sample of the whole split. At least one key goes to each
    side. Equal passages are kept once, so that none is on both sides.

    Raises:
      ValueError: there is no text, or only one passage.
    """
    passages: dict[tuple[int, int, int], tuple[int, bytes]] = {}
    for document in documents:
        for number, passage in enumerate(split_passages(document.text, characters=characters)):
            if passage.strip():
                key = _hash(document.key or passage)
                place = (_hash("order", document.key, passage), key, number)
                passages[place] = (key, passage.encode("utf-8", "replace"))
    keys = sorted({key for key, _ in passages.values()})
    distinct = len({encoded for _, encoded in passages.values()})
    if len(keys) < 2 or distinct < 2:
        found = "one passage of text" if distinct else "no text"
        raise ValueError(
            f"the domain '{name}' has {found}: training and validation need at least one document"
            " each, so give it more text"
        )
    held_out = {key for key in keys if key < validation_fraction * 2.0**64} or {keys[0]}
    if len(held_out) == len(keys):
        held_out.discard(keys[-1])
    splits: dict[str, list[bytes]] = {TRAIN: [], VALIDATION: []}
    seen: set[bytes] = set()
    for _, (key, encoded) in sorted(passages.items()):
        if encoded in seen:
            continue
        seen.add(encoded)
        splits[VALIDATION if key in held_out else TRAIN].append(encoded)
    if not all(splits.values()):
        raise ValueError(
            f"the documents of the domain '{name}' repeat each other so much that one split is"
            " empty: give it more text"
        )
    return Corpus(
        name=name,
        splits={split: tuple(texts) for split, texts in splits.items()},
        origin=dict(origin),
    )
