"""The tensors of a folder against those that a model has."""

import re
from collections.abc import Mapping, Set
from pathlib import Path

from upcycle_jax.checkpoints.huggingface.files import CONFIG, WeightFiles, shown


def compare(
    folder: Path,
    weights: WeightFiles,
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored: Set[str],
    kind: str,
    describes: str,
    given: str,
) -> None:
    """Checks that the folder holds these tensors, and no others.

    Args:
      folder: for messages.
      weights: what it holds.
      expected: shapes by name.
      ignored: names of tensors that may lie beside them.
      kind: of the model, for messages.
      describes: what config.json describes, for messages.
      given: the sizes that config.json states, for messages.

    Raises:
      ValueError: one has no place, is missing, or has another shape.
    """
    tensors = weights.tensors
    unknown = sorted(tensors.keys() - expected.keys() - ignored)
    if unknown:
        count = f"{len(unknown)} tensors have" if len(unknown) > 1 else "1 tensor has"
        raise ValueError(
            f"{folder}: {count} no place in {kind}:"
            f" {', '.join(f'{shown(n)} (in {tensors[n].file})' for n in unknown[:5])}. {CONFIG}"
            f" describes {describes}"
        )
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's tensors: {', '.join(missing[:5])}. The"
            " folder holds a part of a model: copy it again"
        )
    for name, shape in expected.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise ValueError(
                f"{folder}: {name} in {stored.file} has the shape {list(stored.shape)},"
                f" {list(shape)} belongs there according to {CONFIG} ({given}): one of the two is"
                " of another model"
            )


def numbered(weights: WeightFiles, pattern: re.Pattern[str]) -> set[int]:
    """The numbers that the first group of a pattern matches in names of tensors, from their
    beginning.
    """
    matches = (pattern.match(name) for name in weights.tensors)
    return {int(match.group(1)) for match in matches if match}


def few(numbers: set[int]) -> str:
    """Few of many numbers, for people."""
    first = sorted(numbers)[:8]
    return (
        f"{', '.join(map(str, first))}{', ...' if len(numbers) > 8 else ''} ({len(numbers)} in all)"
    )
