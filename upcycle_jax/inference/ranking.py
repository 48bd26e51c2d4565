"""Rank classification: of the answers that an example allows, the one that the model finds most
likely.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_jax.inference import running
from upcycle_jax.types import PyTree

if TYPE_CHECKING:
    from upcycle_jax.data.examples import TaskExamples
    from upcycle_jax.data.prompts import Options


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The answers of one example.

    Attributes:
      scores: log-probability of each answer, summed over its tokens (EOS included where the task's
        targets have it), in the order of the options.
      tokens: int32 ids of the best answer, filled with zeros to the length of targets. Of equal
        answers the first.
    """

    scores: Mapping[str, float]
    tokens: np.ndarray

    @property
    def best(self) -> str:
        """Text of the best answer."""
        return max(self.scores, key=lambda text: self.scores[text])


def rank(
    task: "TaskExamples",
    runner: running.Runner,
    params: PyTree,
    examples: Sequence[Mapping[str, Any]],
    given: "Options | None",
) -> list[Ranked]:
    """Ranks the answers of each example; every (example, answer) is a row of its own, and rows do
    not influence each other.

    Args:
      task: says which answers an example allows, and how they become tokens.
      runner: scores batches.
      params: of the model.
      examples: as `TaskExamples.examples` gives them.
      given: answers that win over the task's own, see `data.prompts`.

    Raises:
      ValueError: an example's answers are not known, or the model's score of one is NaN.
    """
    answers = [task.options(example, given) for example in examples]
    rows = [
        task.answered(example, text)
        for example, texts in zip(examples, answers, strict=True)
        for text in texts
    ]
    scores: list[float] = []
    for part in running.in_batches(rows, runner.batch_size):
        scores += runner.score(params, task.batch(part, runner.batch_size), len(part)).tolist()
    ranked: list[Ranked] = []
    first = 0
    for texts in answers:
        own = scores[first : first + len(texts)]
        if np.isnan(own).any():
            text = texts[int(np.argmax(np.isnan(own)))]
            raise ValueError(
                f"{task.name}: the score of the answer {text!r} to example {len(ranked)} of these"
                f" {len(examples)} is NaN: activations of the model overflow. Compute in float32"
                " (the model's dtype)"
            )
        best = task.padded_targets(rows[first + int(np.argmax(own))])
        ranked.append(Ranked(scores=dict(zip(texts, own, strict=True)), tokens=best))
        first += len(texts)
    return ranked
