"""The objectives of `preprocessors` in numpy, on many segments of one length at a time: what a
cached task needs when it is read.

Counts, divisions into spans and sentinels are those of `tf_spans`; the random numbers are other
ones (`data.draws`), from the same distributions.

Axis legend: N segments, L tokens of a segment, P spans.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upcycle_jax.data import draws
from upcycle_jax.data.objectives import arithmetic

Rows = tuple[list[np.ndarray], list[np.ndarray]]
"""Inputs and targets of each segment, int32, without EOS."""

_LONGEST_PATTERN = 64


def random_partition(keys: np.ndarray, total: int, parts: int) -> np.ndarray:
    """Divides `total` items into `parts` non-empty parts, every division equally likely.

    Args:
      keys: uint64 `[N]` that fix the draw of each row.

    Returns:
      int64 `[N, parts]`, each row summing to `total`.
    """
    rows = len(keys)
    # Which of the total-1 gaps are cut: those with the parts-1 smallest random numbers.
    drawn = draws.bits(keys[:, None], np.arange(total - 1))
    cuts = (
        np.sort(np.argpartition(drawn, parts - 2, axis=1)[:, : parts - 1], axis=1) + 1
        if parts > 1
        else np.zeros((rows, 0), np.int64)
    )
    edges = np.concatenate([np.zeros((rows, 1), np.int64), cuts, np.full((rows, 1), total)], axis=1)
    return np.diff(edges, axis=1)


def noise_mask(
    keys: np.ndarray, length: int, *, noise_density: float, mean_noise_span_length: float
) -> np.ndarray:
    """Which tokens are noise: bool `[N, length]`. Every row starts with text and ends with
    noise.
    """
    counts = arithmetic.span_counts(
        length, noise_density=noise_density, mean_noise_span_length=mean_noise_span_length
    )
    counted, rows = max(length, 2), len(keys)
    kept = random_partition(draws.bits(keys, 0), counted - counts.noise_tokens, counts.spans)
    hidden = random_partition(draws.bits(keys, 1), counts.noise_tokens, counts.spans)
    lengths = np.stack([kept, hidden], axis=-1).reshape(
        -1
    )  # [N * P * 2]: text, noise, text, noise, ...
    is_noise = np.tile([False, True], rows * counts.spans)
    return np.repeat(is_noise, lengths).reshape(rows, counted)[:, :length]


def replace_spans(tokens: np.ndarray, hidden: np.ndarray, *, first_sentinel: int) -> np.ndarray:
    """Replaces every run of hidden tokens by one sentinel: `first_sentinel` for the first run of a
    row, then counting down.

    Args:
      tokens: int32 `[N, L]`.
      hidden: bool `[N, L]`, with the same number of runs and of hidden tokens in every row.
      first_sentinel: id of the first sentinel.

    Returns:
      int32 `[N, L - hidden tokens + runs]`.
    """
    opens = hidden.copy()
    opens[:, 1:] &= ~hidden[:, :-1]
    sentinels = first_sentinel + 1 - np.cumsum(opens, axis=1, dtype=np.int32)
    return np.where(opens, sentinels, tokens)[opens | ~hidden].reshape(len(tokens), -1)


@dataclasses.dataclass(frozen=True)
class SpanNoise:
    """`preprocessors.SpanDenoiser`, with what it needs of the vocabulary.

    Attributes:
      noise_density: fraction of tokens that leave.
      mean_noise_span_length: tokens of a span.
      prefix: text before the inputs that names the mode.
      prefix_ids: its tokens.
      weight: relative number of examples in a mixture.
    """

    noise_density: float = arithmetic.NOISE_DENSITY
    mean_noise_span_length: float = arithmetic.MEAN_NOISE_SPAN_LENGTH
    prefix: str = ""
    prefix_ids: tuple[int, ...] = ()
    weight: float = 1.0

    def lengths(self, sequence_length: Mapping[str, int], extra_ids: int) -> arithmetic.SpanLengths:
        """Lengths of a full segment.

        Raises:
          ValueError: the lengths or the sentinels do not suffice.
        """
        return arithmetic.fitting_span_lengths(
            sequence_length,
            prefix_tokens=len(self.prefix_ids),
            extra_ids=extra_ids,
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
        )

    def raw_length(self, sequence_length: Mapping[str, int], extra_ids: int) -> int:
        """Tokens of text in a full segment. Raises as `lengths`."""
        return self.lengths(sequence_length, extra_ids).raw

    def result_lengths(self, length: int, sequence_length: Mapping[str, int]) -> tuple[int, int]:
        """The most tokens of inputs and targets, EOS included, that `length` tokens of text
        become.
        """
        counts = arithmetic.span_counts(
            length,
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
        )
        return len(self.prefix_ids) + counts.inputs, counts.targets

    def corrupt(
        self,
        tokens: np.ndarray,
        keys: np.ndarray,
        *,
        sequence_length: Mapping[str, int],
        first_sentinel: int,
    ) -> Rows:
        """Inputs and targets of segments.

        Args:
          tokens: int32 `[N, L]`, the segments.
          keys: uint64 `[N]`, the seed of each segment's noise.
          sequence_length: not needed here.
          first_sentinel: id of the first sentinel; the others count down from it.
        """
        mask = noise_mask(
            keys,
            tokens.shape[1],
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
        )
        inputs = replace_spans(tokens, mask, first_sentinel=first_sentinel)
        targets = replace_spans(tokens, ~mask, first_sentinel=first_sentinel)
        return list(_prepend(inputs, self.prefix_ids)), list(targets)


@dataclasses.dataclass(frozen=True)
class PrefixSplit:
    """`preprocessors.PrefixDenoiser`, with what it needs of the vocabulary. Attributes as
    `SpanNoise`.
    """

    prefix: str = ""
    prefix_ids: tuple[int, ...] = ()
    weight: float = 1.0

    def raw_length(self, sequence_length: Mapping[str, int], extra_ids: int) -> int:
        """Tokens of text in a full segment.

        Raises:
          ValueError: lengths below 2.
        """
        return arithmetic.fitting_prefix_length(sequence_length, prefix_tokens=len(self.prefix_ids))

    def result_lengths(self, length: int, sequence_length: Mapping[str, int]) -> tuple[int, int]:
        """The most tokens of inputs and targets, EOS included; both at once do not occur."""
        return sequence_length["inputs"], sequence_length["targets"]

    def corrupt(
        self,
        tokens: np.ndarray,
        keys: np.ndarray,
        *,
        sequence_length: Mapping[str, int],
        first_sentinel: int,
    ) -> Rows:
        """Inputs and targets of segments.

        Args:
          tokens: int32 `[N, L]`, the segments.
          keys: uint64 `[N]`, the seed of each segment's division.
          sequence_length: the most tokens of each side.
          first_sentinel: not needed here.
        """
        length = tokens.shape[1]
        longest = min(
            max(length - 1, 1), sequence_length["targets"] - 1
        )  # each side keeps a place for its EOS
        starts = length - 1 - (draws.bits(keys, 0) % np.uint64(longest)).astype(np.int64)
        inputs = [
            _prepend(row[None, :start], self.prefix_ids)[0]
            for row, start in zip(tokens, starts, strict=True)
        ]
        return inputs, [row[start:] for row, start in zip(tokens, starts, strict=True)]


@dataclasses.dataclass(frozen=True)
class CausalRows:
    """`preprocessors.language_modeling`: a segment is a row as it stands.

    Attributes:
      eos_id: the token that ends each document.
      prefix_ids: none.
      weight: relative number of examples in a mixture.
    """

    eos_id: int
    prefix_ids: tuple[int, ...] = ()
    weight: float = 1.0

    def raw_length(self, sequence_length: Mapping[str, int], extra_ids: int) -> int:
        """Tokens of a row.

        Raises:
          ValueError: there is no length.
        """
        return arithmetic.fitting_row_length(sequence_length)

    def result_lengths(self, length: int, sequence_length: Mapping[str, int]) -> tuple[int, int]:
        """Tokens of inputs and targets."""
        return 0, length

    def corrupt(
        self,
        tokens: np.ndarray,
        keys: np.ndarray,
        *,
        sequence_length: Mapping[str, int],
        first_sentinel: int,
    ) -> Rows:
        """No inputs, and the segments int32 `[N, L]` as targets. Nothing else is needed."""
        return [tokens[0, :0]] * len(tokens), list(tokens)

    def documents(self, targets: np.ndarray) -> np.ndarray:
        """The document of each token of a row, counted from 1: int32 `[L]`."""
        ends = np.pad(targets == self.eos_id, (1, 0))[:-1]
        return 1 + np.cumsum(ends, dtype=np.int32)


Noise = SpanNoise | PrefixSplit | CausalRows
_KINDS = {"span": SpanNoise, "prefix": PrefixSplit, "causal": CausalRows}


def _prepend(tokens: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    if not ids:
        return tokens
    return np.concatenate(
        [np.broadcast_to(np.asarray(ids, np.int32), (len(tokens), len(ids))), tokens], axis=1
    )


def to_json(denoiser: Noise) -> dict[str, Any]:
    """A denoiser as a manifest holds it."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(denoiser, cls))
    return {"kind": kind, **dataclasses.asdict(denoiser), "prefix_ids": list(denoiser.prefix_ids)}


def from_json(described: Mapping[str, Any]) -> Noise:
    """The denoiser of `to_json`.

    Raises:
      ValueError: a kind that this version does not know.
    """
    fields = dict(described)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of noise {kind!r}: known are {sorted(_KINDS)}")
    return _KINDS[kind](**{**fields, "prefix_ids": tuple(fields.get("prefix_ids", ()))})


def pattern(denoisers: Sequence[Noise]) -> tuple[int, ...]:
    """The order in which consecutive segments get the denoisers, so that examples follow the
    weights; each occurs at least once.

    >>> pattern([SpanNoise(weight=2.0), SpanNoise(weight=1.0)])
    (0, 0, 1)
    """
    weights = [denoiser.weight for denoiser in denoisers]
    least = min(weights)
    counts = [weight / least for weight in weights]
    for scale in range(1, _LONGEST_PATTERN):  # the shortest pattern that is exact, if there is one
        if all(math.isclose(count * scale, round(count * scale), rel_tol=1e-6) for count in counts):
            break
    scaled = [max(1, round(count * scale)) for count in counts]
    return tuple(number for number, count in enumerate(scaled) for _ in range(count))
