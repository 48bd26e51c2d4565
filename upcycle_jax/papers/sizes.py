"""Table 1: sizes of models, counted from their shapes and compared with what the paper prints."""

import dataclasses
from collections.abc import Callable

from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.papers.exhibits import Method, Point, exhibit


@dataclasses.dataclass(frozen=True)
class SizeRow:
    """A row of table 1.

    Attributes:
      point: the paper's number.
      gin_file: the model file whose parameters are counted, or None where this project has no such
        model.
      parameters: counted from the shapes, or None.
    """

    point: Point
    gin_file: str | None
    parameters: int | None

    @property
    def rounded(self) -> str | None:
        """The count with the digits and the unit of the paper."""
        if self.parameters is None:
            return None
        return (
            f"{self.parameters / 1e6:.0f}M"
            if self.point.printed.endswith("M")
            else f"{self.parameters / 1e9:.2f}B"
        )

    @property
    def equal(self) -> bool | None:
        """Whether it is the printed size; None where there is nothing to compare."""
        return None if self.parameters is None else self.rounded == self.point.printed


def gin_file(point: Point) -> str | None:
    """The shipped model file of a row of table 1; None for vision models."""
    if point.modality != "language":
        return None
    kind = "_upcycled" if point.method == Method.SPARSE else ""
    return f"models/t5_1_1_{point.size.lower()}{kind}.gin"


def count(config: T5Config) -> int:
    """Parameters of a model; nothing is allocated."""
    return sum(spec.size for spec in EncoderDecoderModel(config).param_specs().values())


def size_rows(load_config: Callable[[str], T5Config]) -> list[SizeRow]:
    """Table 1 with this project's counts beside it.

    Args:
      load_config: the model of a shipped model file.
    """
    rows = []
    for point in exhibit("table1").points:
        name = gin_file(point)
        rows.append(SizeRow(point, name, count(load_config(name)) if name else None))
    return rows
