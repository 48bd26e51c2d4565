"""Arithmetic of span corruption: how many tokens become noise, in how many spans, and how long the
results are.

Integers only, no TensorFlow: a configuration can be checked before anything heavy is imported.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0


@dataclasses.dataclass(frozen=True)
class SpanCounts:
    """How one run of tokens divides.

    Attributes:
      noise_tokens: tokens that leave the inputs and appear in the targets.
      spans: noise spans; there are as many spans of kept text, and text comes first.
      inputs: length of the inputs with one sentinel per noise span and the closing EOS.
      targets: length of the targets with one sentinel per kept span and the closing EOS.
    """

    noise_tokens: int
    spans: int
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class SpanLengths:
    """Lengths that fill a model's inputs without padding: `raw` tokens of text become `inputs` and
    `targets` tokens.
    """

    raw: int
    inputs: int
    targets: int
    spans: int


def span_counts(
    length: int,
    *,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> SpanCounts:
    """Divides `length` tokens into noise and text, as T5 does (Raffel et al. 2020, section 3.1.4;
    rounding in float32, half to even).

    A run of one token is counted as if it had two, so that there is always something to keep and
    something to predict.

    Raises:
      ValueError: a density outside (0, 1) or a mean span below one token.
    """
    if not 0.0 < noise_density < 1.0:
        raise ValueError(
            f"noise_density is {noise_density}: it is a fraction of the tokens, so give a value"
            " above 0 and below 1"
        )
    if mean_noise_span_length < 1.0:
        raise ValueError(
            f"mean_noise_span_length is {mean_noise_span_length}: a span has at least one token, so"
            " give 1 or more"
        )
    counted = max(length, 2)
    noise = int(np.round(np.float32(counted) * np.float32(noise_density)))
    noise = min(max(noise, 1), counted - 1)
    spans = int(np.round(np.float32(noise) / np.float32(mean_noise_span_length)))
    spans = min(max(spans, 1), noise, counted - noise)
    return SpanCounts(
        noise_tokens=noise,
        spans=spans,
        inputs=counted - noise + spans + 1,
        targets=noise + spans + 1,
    )


def span_lengths(
    inputs_length: int,
    *,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> SpanLengths:
    """The longest run of text whose corrupted form fits `inputs_length` tokens, EOS included.

    >>> span_lengths(512)
    SpanLengths(raw=568, inputs=512, targets=114, spans=28)

    Raises:
      ValueError: `inputs_length` below 3 (one token, one sentinel, EOS), or a bad density or span
        length.
    """
    if inputs_length < 3:
        raise ValueError(
            f"task_feature_lengths['inputs'] is {inputs_length}: span corruption needs at least 3"
            " (text, sentinel, EOS)"
        )
    raw = max(inputs_length - 1, 2)
    density, mean = noise_density, mean_noise_span_length
    while (
        span_counts(raw + 1, noise_density=density, mean_noise_span_length=mean).inputs
        <= inputs_length
    ):
        raw += 1
    counts = span_counts(raw, noise_density=density, mean_noise_span_length=mean)
    if (
        density == 0.5 and counts.targets > counts.inputs
    ):  # T5's adjustment: equal lengths for half and half
        raw -= 1
        counts = span_counts(raw, noise_density=density, mean_noise_span_length=mean)
    return SpanLengths(raw=raw, inputs=counts.inputs, targets=counts.targets, spans=counts.spans)


def asked_length(sequence_length: Mapping[str, int], feature: str, *, objective: str) -> int:
    """The length that an objective needs of a feature.

    Raises:
      ValueError: there is none.
    """
    length = sequence_length.get(feature)
    if length is None:
        raise ValueError(
            f"task_feature_lengths is {dict(sequence_length)}: {objective} needs a length for"
            f" '{feature}'. A decoder-only model learns plain text by OBJECTIVE ="
            " 'language_modeling', which needs 'targets' alone"
        )
    return length


def fitting_span_lengths(
    sequence_length: Mapping[str, int],
    *,
    prefix_tokens: int,
    extra_ids: int,
    noise_density: float,
    mean_noise_span_length: float,
) -> SpanLengths:
    """`span_lengths` of what the inputs leave beside a prefix.

    Raises:
      ValueError: the targets do not fit, or the vocabulary has too few sentinels; both with what
        would.
    """
    inputs_length, targets_length = (
        asked_length(sequence_length, name, objective="span corruption")
        for name in ("inputs", "targets")
    )
    lengths = span_lengths(
        inputs_length - prefix_tokens,
        noise_density=noise_density,
        mean_noise_span_length=mean_noise_span_length,
    )
    if targets_length < lengths.targets:
        raise ValueError(
            f"span corruption (density {noise_density}, mean span {mean_noise_span_length}) of"
            f" inputs of {inputs_length} tokens gives targets of {lengths.targets}"
            f" tokens, but task_feature_lengths['targets'] is {targets_length}: set it"
            f" to {lengths.targets} or more, or shorten the inputs"
        )
    if lengths.spans > extra_ids:
        raise ValueError(
            f"span corruption (density {noise_density}, mean span {mean_noise_span_length}) of"
            f" inputs of {inputs_length} tokens needs {lengths.spans} sentinels, but"
            f" the vocabulary has {extra_ids} extra ids: make it with extra_ids={lengths.spans} or"
            " more, or shorten the inputs"
        )
    return lengths


def fitting_prefix_length(sequence_length: Mapping[str, int], *, prefix_tokens: int) -> int:
    """Tokens of a segment of prefix language modelling: what the inputs leave beside a prefix.

    Raises:
      ValueError: nothing to divide.
    """
    inputs_length, targets_length = (
        asked_length(sequence_length, name, objective="prefix language modelling")
        for name in ("inputs", "targets")
    )
    available = inputs_length - prefix_tokens
    if available < 2 or targets_length < 2:
        raise ValueError(
            f"task_feature_lengths {dict(sequence_length)} leave a prefix language model no text:"
            " give 2 tokens or more"
        )
    return available


def fitting_row_length(sequence_length: Mapping[str, int]) -> int:
    """Tokens of a row of language modelling.

    Raises:
      ValueError: there is no length.
    """
    return asked_length(sequence_length, "targets", objective="language modelling")
