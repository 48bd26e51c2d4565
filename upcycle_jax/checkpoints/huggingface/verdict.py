"""What a reader of a Hugging Face folder makes of a model, said before the folder is written."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from upcycle_jax.text import Table


class Kind(enum.StrEnum):
    """How a reader's function compares with the model's, the best first."""

    EXACT = "exact"
    REWRITTEN = "exact after rewriting"
    NEAR = "near"
    UNKNOWN = "unknown"
    DIFFERS = "differs"
    REFUSED = "refused"


UNUSABLE = (Kind.DIFFERS, Kind.REFUSED)
"""Kinds that `--reader` does not accept."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one reader makes of a folder.

    Attributes:
      reader: e.g. 'transformers5'.
      kind: the worst of what was found.
      reasons: one line each, the worst first.
    """

    reader: str
    kind: Kind
    reasons: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"reader": self.reader, "verdict": str(self.kind), "reasons": list(self.reasons)}


def table(model_type: str, found: Sequence[Verdict]) -> Table:
    """The verdicts, for people."""
    rows = [(one.reader, str(one.kind), "; ".join(one.reasons)) for one in found]
    return Table(f"verdicts on {model_type}", ("reader", "verdict", "why"), rows)
