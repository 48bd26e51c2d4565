"""Metrics of classification and of short answers, in percent as T5's are, and the post-processor
that they need. No TensorFlow.
"""

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

UNKNOWN = -1
"""The class of a prediction that is no label."""


def label_to_class(decoded: str, *, label_classes: Sequence[str], **unused_kwargs: Any) -> int:
    """The number of the label that a model wrote, `UNKNOWN` for anything else."""
    text = decoded.strip()
    return label_classes.index(text) if text in label_classes else UNKNOWN


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Percent of classes that are right."""
    return {
        "accuracy": (
            100.0
            * sum(t == p for t, p in zip(targets, predictions, strict=True))
            / max(1, len(targets))
        )
    }


def macro_f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Mean over the classes that occur among the targets of F1 = 2 hits / (targets + predictions of
    the class), in percent.
    """
    hits = collections.Counter(t for t, p in zip(targets, predictions, strict=True) if t == p)
    of_targets, of_predictions = collections.Counter(targets), collections.Counter(predictions)
    scores = [
        2 * hits[label] / (count + of_predictions[label]) for label, count in of_targets.items()
    ]
    return {"f1": 100.0 * sum(scores) / max(1, len(scores))}


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation around them; a text of punctuation alone is one word."""
    lowered = text.lower().strip()
    stripped = [
        word.strip(string.punctuation) or word for word in re.split(r"\s+", lowered) if word
    ]
    return stripped


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percent of answers that are equal, but for space at both ends."""
    return {
        "em": (
            100.0
            * sum(t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True))
            / max(1, len(targets))
        )
    }


def word_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean over examples of the F1 of words, each counted as often as it occurs (as SQuAD's), in
    percent.
    """
    total = 0.0
    for target, prediction in zip(targets, predictions, strict=True):
        wanted, got = collections.Counter(_words(target)), collections.Counter(_words(prediction))
        shared = (wanted & got).total()
        total += (
            2 * shared / (wanted.total() + got.total()) if shared else float(not wanted and not got)
        )
    return {"f1": 100.0 * total / max(1, len(targets))}
