"""What a checkpoint contains, from its specs alone: as text and as JSON."""

import collections
import dataclasses
import re
from typing import Any

from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import PARAM_STATES, STATE, STEP, TARGET
from upcycle_jax.text import aligned, size
from upcycle_jax.trees import LeafSpec, Role

_KNOWN_OPTIMIZERS = {
    frozenset({"m", "v", "v_row", "v_col"}): "Adafactor",
    frozenset({"count", "m", "v", "v_row", "v_col"}): "Adafactor (big_vision)",
    frozenset({"mu", "nu"}): "AdamW",
    frozenset({"m"}): "SGD",
}
_UNUSED = (1,)  # T5X stores every slot of every parameter; those that are not used have this shape.


@dataclasses.dataclass(frozen=True)
class Slot:
    """One kind of optimizer state, over all parameters."""

    name: str
    arrays: int
    unused: int
    elements: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A checkpoint's content.

    Attributes:
      path: the checkpoint's own folder or file.
      format: see `CheckpointReader`.
      step: training step.
      fingerprint: see `CheckpointReader.fingerprint`.
      leaves: every leaf by full path.
      parameters: elements under `target/`.
      parameter_bytes: their uncompressed bytes.
      expert_counts: leading axes of the expert kernels, each once; empty for a dense model.
      optimizer: 'Adafactor', 'Adafactor (big_vision)', 'AdamW', 'SGD', 'unknown' or 'none', told by
        the slots' names.
      slots: the optimizer's slots.
      state_bytes: uncompressed bytes under `state/`.
      metadata: this library's record, empty where there is none.
    """

    path: str
    format: str
    step: int
    fingerprint: str
    leaves: dict[str, LeafSpec]
    parameters: int
    parameter_bytes: int
    expert_counts: tuple[int, ...]
    optimizer: str
    slots: tuple[Slot, ...]
    state_bytes: int
    metadata: dict[str, Any]

    def json(self, pattern: str | None = None) -> dict[str, Any]:
        """The summary as JSON-serialisable data; `leaves` only those whose path contains a match of
        `pattern`.
        """
        out = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("leaves", "slots")
        }
        out["slots"] = [dataclasses.asdict(slot) for slot in self.slots]
        out["leaves"] = [
            {
                "name": name,
                "shape": list(spec.shape),
                "dtype": spec.dtype.name,
                "bytes": spec.nbytes,
            }
            for name, spec in self.leaves.items()
            if re.search(pattern or "", name)
        ]
        return out

    def text(self, pattern: str | None = None) -> str:
        """The summary for reading: a head, and one line per leaf whose path contains a match of
        `pattern`.
        """
        targets = {name: spec for name, spec in self.leaves.items() if name.startswith(TARGET)}
        dtypes = collections.Counter(spec.dtype.name for spec in targets.values())
        kinds = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
        experts = ", ".join(map(str, self.expert_counts))
        lines = [
            f"path         {self.path}",
            f"format       {self.format}",
            f"step         {self.step}",
            f"fingerprint  {self.fingerprint}",
            (
                f"parameters   {self.parameters:,} in {len(targets)} arrays ({kinds or 'none'}),"
                f" {size(self.parameter_bytes)}"
            ),
            f"experts      {experts or 'none: dense'}",
            f"optimizer    {self._optimizer_text()}",
        ]
        if self.metadata:
            lines.append(
                "record      "
                f" {', '.join(f'{key}={value!r}' for key, value in sorted(self.metadata.items()))}"
            )
        shown = [
            (printable(name), str(spec))
            for name, spec in self.leaves.items()
            if re.search(pattern or "", name)
        ]
        lines = [printable(line) for line in lines]
        lines += ["", *aligned(shown)]
        if len(shown) < len(self.leaves):
            lines.append(f"({len(shown)} of {len(self.leaves)} leaves shown)")
        return "\n".join(lines) + "\n"

    def _optimizer_text(self) -> str:
        if not self.slots:
            return "none"
        slots = ", ".join(
            f"{slot.name} ({slot.arrays - slot.unused} used of {slot.arrays})"
            for slot in self.slots
        )
        return f"{self.optimizer}: {slots}; {size(self.state_bytes)}"


def summarize(reader: CheckpointReader) -> Summary:
    """Reads the specs of a checkpoint, but none of its arrays except the step."""
    specs = reader.specs()
    slots: dict[str, list[LeafSpec]] = collections.defaultdict(list)
    for name, spec in specs.items():
        if name.startswith(PARAM_STATES):
            slots[name.rpartition("/")[2]].append(spec)
    targets = {name: spec for name, spec in specs.items() if name.startswith(TARGET)}
    return Summary(
        path=str(reader.path),
        format=reader.format,
        step=reader.step,
        fingerprint=reader.fingerprint(),
        leaves=specs,
        parameters=sum(spec.size for spec in targets.values()),
        parameter_bytes=sum(spec.nbytes for spec in targets.values()),
        expert_counts=tuple(
            sorted(
                {
                    spec.shape[0]
                    for spec in targets.values()
                    if spec.role is Role.EXPERT and spec.shape
                }
            )
        ),
        optimizer=_KNOWN_OPTIMIZERS.get(frozenset(slots), "unknown") if slots else "none",
        slots=tuple(
            Slot(
                name,
                len(found),
                sum(spec.shape == _UNUSED for spec in found),
                sum(spec.size for spec in found if spec.shape != _UNUSED),
            )
            for name, found in sorted(slots.items())
        ),
        state_bytes=sum(
            spec.nbytes for name, spec in specs.items() if name.startswith(STATE) and name != STEP
        ),
        metadata=reader.metadata(),
    )
