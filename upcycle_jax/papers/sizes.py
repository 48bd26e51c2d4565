"""Table 1: sizes of models, counted from their shapes and compared with what the paper prints."""

import dataclasses
from collections.abc import Callable

from upcycle_jax.models import registry
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.papers.exhibits import Method, Point, exhibit


@dataclasses.dataclass(frozen=True)
class SizeRow:
    """A row of table 1.

    Attributes:
      point: the paper's number.
      gin_file: the model file whose parameters are counted.
      parameters: counted from the shapes.
    """

    point: Point
    gin_file: str
    parameters: int

    @property
    def rounded(self) -> str:
        """The count with the digits and the unit of the paper."""
        return self._in_print(self.parameters)

    def _in_print(self, count: float) -> str:
        millions = self.point.printed.endswith("M")
        return f"{count / 1e6:.0f}M" if millions else f"{count / 1e9:.2f}B"

    @property
    def equal(self) -> bool:
        """Whether it is the printed size: rounded, or cut off, as the paper prints 101,519,475 as
        101M and 3,447,116,659 as 3.44B.
        """
        half = 0.5e6 if self.point.printed.endswith("M") else 0.005e9
        return self.point.printed in (self.rounded, self._in_print(self.parameters - half))


def gin_file(point: Point) -> str:
    """The shipped model file of a row of table 1."""
    kind = "_upcycled" if point.method == Method.SPARSE else ""
    if point.modality == "vision":
        return f"models/vit_{point.size.lower().replace('/', '')}{kind}.gin"
    return f"models/t5_1_1_{point.size.lower()}{kind}.gin"


def count(config: ModelConfig) -> int:
    """Parameters of a model; nothing is allocated."""
    return sum(spec.size for spec in registry.build(config).param_specs().values())


def size_rows(load_config: Callable[[str], ModelConfig]) -> list[SizeRow]:
    """Table 1 with this project's counts beside it.

    Args:
      load_config: the model of a shipped model file.
    """
    rows = []
    for point in exhibit("table1").points:
        name = gin_file(point)
        rows.append(SizeRow(point, name, count(load_config(name))))
    return rows
