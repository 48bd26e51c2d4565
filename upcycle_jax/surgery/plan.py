"""The plan: one row per target leaf, before anything is read or written."""

import dataclasses
import re
from typing import Any

import numpy as np

from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.keys import KeySource, key_source
from upcycle_jax.surgery.operations import InterpolatePositions, Movement, Operation, Tile
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.trees import LeafSpec, Role


@dataclasses.dataclass(frozen=True)
class Row:
    """The one origin of one target leaf.

    Attributes:
      target: full path of the leaf in the result.
      spec: its shape, dtype and logical axes.
      operation: what is done.
      sources: full paths of the source leaves, in the order that the operation takes them.
      source_specs: their specs.
      layer: path that draws shared by the matrices of an MLP are keyed with (the MLP's path, else
        the leaf's own).
    """

    target: str
    spec: LeafSpec
    operation: Operation
    sources: tuple[str, ...] = ()
    source_specs: tuple[LeafSpec, ...] = ()
    layer: str = ""

    def keys(self, seed: int) -> KeySource:
        """What the random keys of this leaf are made of."""
        return key_source(seed, self.target, self.layer or self.target)

    @property
    def casts(self) -> bool:
        """Whether the values change dtype on the way."""
        return any(spec.dtype != self.spec.dtype for spec in self.source_specs)

    @property
    def moves_bits(self) -> bool:
        """Whether every byte of the result is a byte of a source."""
        return isinstance(self.operation, Movement) and not self.casts

    @property
    def moves_values(self) -> bool:
        """Whether every value is a value of a source (or zero), with a cast at most that loses
        nothing: devices then do it to the bit.
        """
        return isinstance(self.operation, Movement) and self.keeps_values

    @property
    def keeps_values(self) -> bool:
        """As `moves_values`, and also where values change their places, as in shuffled experts."""
        return self.operation.keeps_values and self.keeps_precision

    @property
    def keeps_precision(self) -> bool:
        """Whether every source fits into the leaf's dtype."""
        return all(np.can_cast(spec.dtype, self.spec.dtype) for spec in self.source_specs)

    @property
    def is_parameter(self) -> bool:
        """Whether the leaf is a parameter, and no step or optimizer slot."""
        return self.target.startswith(TARGET)

    @property
    def what(self) -> str:
        """The operation as the table shows it."""
        copies = f" x{self.spec.shape[0]}" if isinstance(self.operation, Tile) else ""
        cast = f" -> {self.spec.dtype.name}" if self.casts else ""
        return self.operation.name + copies + cast

    @property
    def bytes_read(self) -> int:
        """Bytes of the source leaves, each read once."""
        return sum(spec.nbytes for spec in self.source_specs)

    @property
    def bytes_written(self) -> int:
        """Bytes of the target leaf."""
        return self.spec.nbytes


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A source leaf that the result does not use, and why."""

    source: str
    spec: LeafSpec
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every target leaf with its origin, every source leaf used or dropped by name.

    Attributes:
      rows: parameters first, then the state; sorted by target path.
      dropped: sorted by source path.
      recipe: what the plan follows.
    """

    rows: tuple[Row, ...]
    dropped: tuple[Dropped, ...]
    recipe: Recipe | MergeRecipe

    def row(self, target: str) -> Row:
        """The row of one target leaf; KeyError where there is none."""
        return (
            next(row for row in self.rows if row.target == target)
            if target in self.specs()
            else _missing(target)
        )

    def specs(self) -> dict[str, LeafSpec]:
        """Specs of the result."""
        return {row.target: row.spec for row in self.rows}

    @property
    def bytes_read(self) -> int:
        """Bytes of the distinct source leaves that are used."""
        used = {
            name: spec
            for row in self.rows
            for name, spec in zip(row.sources, row.source_specs, strict=True)
        }
        return sum(spec.nbytes for spec in used.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of the result."""
        return sum(row.bytes_written for row in self.rows)

    @property
    def is_pure_movement(self) -> bool:
        """Whether nothing but zeros, fresh routers and unchanged bytes goes into leaves that
        grow.
        """
        return all(row.moves_bits for row in self.rows if row.operation.stacked)

    @property
    def interpolated(self) -> tuple[Row, ...]:
        """The rows of positions that are interpolated to another grid."""
        return tuple(row for row in self.rows if isinstance(row.operation, InterpolatePositions))

    @property
    def zeroed(self) -> tuple[Row, ...]:
        """The rows of parameters that start at zero because the recipe names them."""
        patterns = getattr(self.recipe, "zeroed", ())
        return tuple(
            row
            for row in self.rows
            if row.is_parameter
            and any(re.fullmatch(pattern, row.target.removeprefix(TARGET)) for pattern in patterns)
        )

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of dense parameters that are no longer the source's: a source is compared with
        the result that has the result's.
        """
        return (*self.interpolated, *(row for row in self.zeroed if row.spec.role is Role.DENSE))

    def json(self) -> dict[str, Any]:
        """The plan as plain JSON; nothing is abbreviated."""
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "target": row.target,
                "operation": row.what,
                "sources": list(row.sources),
                "source_shapes": [list(spec.shape) for spec in row.source_specs],
                "source_dtypes": [spec.dtype.name for spec in row.source_specs],
                "shape": list(row.spec.shape),
                "dtype": row.spec.dtype.name,
                "bytes_read": row.bytes_read,
                "bytes_written": row.bytes_written,
                "seed": self.recipe.seed if row.operation.draws else None,
            }
            rows.append(entry)
        return {
            "recipe": to_json(self.recipe),
            "rows": rows,
            "dropped": [
                {
                    "source": d.source,
                    "shape": list(d.spec.shape),
                    "dtype": d.spec.dtype.name,
                    "reason": d.reason,
                }
                for d in self.dropped
            ],
            "leaves": len(self.rows),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


def _missing(target: str) -> Row:
    raise KeyError(f"the plan has no target leaf {target!r}")
