"""The plan as a table: one row per target leaf, printable and as JSON, before anything is read or
written.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.keys import KeySource, key_source
from upcycle_jax.surgery.operations import Movement, Operation, Tile
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.text import aligned, size
from upcycle_jax.trees import LeafSpec


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
        return self.operation.keeps_values and all(
            np.can_cast(spec.dtype, self.spec.dtype) for spec in self.source_specs
        )

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

    def text(
        self,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        *,
        max_rows: int | None = None,
    ) -> str:
        """The plan as a table.

        Args:
          shardings: sharding of each target leaf, shown where given.
          max_rows: the number of leaves to show; the rest is counted. None: all.
        """
        header = [
            "target leaf",
            "operation",
            "source",
            "source shape",
            "target shape",
            "dtype",
            "read",
            "written",
            "seed",
        ]
        header += ["sharding"] if shardings else []
        lines = [header]
        for row in self.rows[:max_rows]:
            source = row.sources[0] if row.sources else "-"
            if len(row.sources) > 1:
                source += f" (+{len(row.sources) - 1})"
            cells = [
                row.target,
                row.what,
                source,
                _shape(row.source_specs[0]) if row.source_specs else "-",
                _shape(row.spec),
                row.spec.dtype.name,
            ]
            cells += [
                size(row.bytes_read),
                size(row.bytes_written),
                str(self.recipe.seed) if row.operation.draws else "-",
            ]
            if shardings:
                sharding = shardings.get(row.target)
                cells.append(
                    str(getattr(sharding, "spec", sharding)) if sharding is not None else "-"
                )
            lines.append(cells)
        out = aligned(lines)
        if max_rows is not None and len(self.rows) > max_rows:
            out.append(f"... and {len(self.rows) - max_rows} more leaves")
        out += ["", *self._totals()]
        return "\n".join(out)

    def _totals(self) -> Iterable[str]:
        """Lines that count operations, bytes and dropped leaves."""
        counts: dict[str, list[int]] = {}
        for row in self.rows:
            entry = counts.setdefault(row.what, [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + row.bytes_written
        yield from (
            f"{count:6d} x {what} ({size(written)})"
            for what, (count, written) in sorted(counts.items())
        )
        parameters = sum(row.spec.size for row in self.rows if row.is_parameter)
        yield (
            f"{len(self.rows)} leaves, {parameters} parameters; read {size(self.bytes_read)}, write"
            f" {size(self.bytes_written)}"
        )
        if not self.dropped:
            yield "dropped: nothing"
        for reason in sorted({item.reason for item in self.dropped}):
            items = [item for item in self.dropped if item.reason == reason]
            names = ", ".join(item.source for item in items[:3]) + (
                ", ..." if len(items) > 3 else ""
            )
            yield (
                f"dropped: {len(items)} source leaves ({size(sum(i.spec.nbytes for i in items))}),"
                f" {reason}: {names}"
            )

    def json(self, shardings: Mapping[str, jax.sharding.Sharding] | None = None) -> dict[str, Any]:
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
            if shardings and row.target in shardings:
                entry["sharding"] = str(
                    getattr(shardings[row.target], "spec", shardings[row.target])
                )
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


def _shape(spec: LeafSpec) -> str:
    return f"[{','.join(map(str, spec.shape))}]"
