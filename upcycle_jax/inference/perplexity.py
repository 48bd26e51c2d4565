"""Perplexity of language models, per token, byte and word: those of bytes and words compare models
with different vocabularies.

Axis legend: B rows, T positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from upcycle_jax.features import HostBatch
from upcycle_jax.models.base import Model

LOSS = "cross_ent_loss"
"""The metric of evaluation that perplexities follow from."""
_WHITE_SPACE = b" \t\n\r\f\v"


def is_language_model(model: Model) -> bool:
    """Whether a model's targets are a text that it predicts from its beginning on."""
    return all(stack.causal for stack in model.stacks.values())


@dataclasses.dataclass(frozen=True)
class Counts:
    """What of a text was predicted.

    Attributes:
      tokens: EOS included.
      text_bytes: UTF-8 bytes; 0 where they are not known.
      words: begun after white space (ASCII) or at the beginning of a segment.
    """

    tokens: int = 0
    text_bytes: int = 0
    words: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.words + other.words,
        )


class TextCounter:
    """Counts the text of batches while they pass.

    Args:
      texts: `[V]`, the bytes of each id; None: only tokens are counted.
    """

    def __init__(self, texts: Sequence[bytes] | None):
        self._texts = texts
        self.counts = Counts()
        if texts is None:
            return
        begins = [[_begins_word(text, place) for place in range(1, len(text))] for text in texts]
        self._sizes = np.array([len(text) for text in texts], np.int64)
        self._words_inside = np.array([sum(places) for places in begins], np.int64)
        self._begins_plain = np.array([text[:1].strip() != b"" for text in texts])
        # After a special token, which has no text, a word begins anew.
        self._ends_blank = np.array([text[-1:].strip() == b"" for text in texts])

    def counting(self, batches: Callable[[], Iterable[HostBatch]]) -> Callable[[], Iterator[Any]]:
        """The same batches, counted."""

        def passing() -> Iterator[HostBatch]:
            self.counts = Counts()
            for batch in batches():
                self.counts += self.of_batch(batch)
                yield batch

        return passing

    def of_batch(self, batch: Mapping[str, Any]) -> Counts:
        """Counts of the targets of one batch of `DecoderOnlyFeatures`."""
        learnt = np.asarray(batch["decoder_loss_weights"]) > 0  # [B, T]
        if self._texts is None:
            return Counts(int(learnt.sum()))
        ids = np.asarray(batch["decoder_target_tokens"])
        follows = np.zeros_like(learnt)
        follows[:, 1:] = learnt[:, :-1]
        follows &= np.asarray(batch["decoder_positions"]) > 0
        before = np.pad(ids, ((0, 0), (1, 0)))[:, :-1]
        begins = self._begins_plain[ids] & (~follows | self._ends_blank[before])
        words = (self._words_inside[ids] + begins) * learnt
        return Counts(int(learnt.sum()), int((self._sizes[ids] * learnt).sum()), int(words.sum()))


def _begins_word(text: bytes, place: int) -> bool:
    return text[place] not in _WHITE_SPACE and text[place - 1] in _WHITE_SPACE


def over_processes(counts: Counts, num_shards: int) -> Counts:
    """The sum over the parts in which processes read a batch; each part is read by as many
    processes.
    """
    if jax.process_count() == 1:
        return counts
    # As bytes: jax would make 32-bit numbers of these.
    own = np.frombuffer(np.array(dataclasses.astuple(counts), np.int64).tobytes(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own), np.uint8).view(np.int64)
    return Counts(*(int(n) * num_shards // jax.process_count() for n in every.sum(axis=0)))


def perplexities(loss: float, counts: Counts) -> dict[str, float]:
    """Metrics by name; those of bytes and words where these are known.

    Args:
      loss: nats per token.
      counts: of the tokens that it is a mean over.
    """
    values = {"perplexity": _exp(loss)}
    total = loss * counts.tokens
    if counts.text_bytes:
        values["bits_per_byte"] = total / counts.text_bytes / math.log(2)
        values["byte_perplexity"] = _exp(total / counts.text_bytes)
    if counts.words:
        values["word_perplexity"] = _exp(total / counts.words)
    return values


def _exp(value: float) -> float:
    """Infinite where Python's would overflow."""
    return math.exp(value) if value < 700 else math.inf
