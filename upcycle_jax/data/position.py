"""Where a stream of batches stands, as a checkpoint keeps it. No TensorFlow."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle_jax.data import fingerprints

POSITION_FILE = "position.json"


class DamagedPositionError(ValueError):
    """A saved data position cannot be read."""


class OtherStreamError(ValueError):
    """A saved data position is of another stream of batches.

    Attributes:
      differences: a line for each, 'tasks/birds/crop: was ..., is ...'.
    """

    def __init__(self, text: str, differences: Sequence[str]):
        super().__init__(text)
        self.differences = tuple(differences)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a stream of batches stands, and which stream it is.

    Attributes:
      batches: batches taken so far.
      seed: seed of the stream.
      fingerprint: what the stream is made of (`Dataset.fingerprint`).
      process_count: processes that share each batch; on data read on the fly, the division of
        documents among them depends on it.
      packing: of a packed stream from a cache, where the plan of rows stands
        (`packing.PackingPlan.anchor`).
    """

    batches: int
    seed: int
    fingerprint: Mapping[str, Any]
    process_count: int
    packing: Mapping[str, int] | None = None

    def write(self, directory: epath.PathLike) -> None:
        """Writes `position.json`."""
        (epath.Path(directory) / POSITION_FILE).write_text(
            json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        )

    @classmethod
    def read(cls, directory: epath.PathLike) -> "Position":
        """Reads `position.json`.

        Raises:
          FileNotFoundError: the checkpoint holds no data position.
          DamagedPositionError: the file is damaged.
        """
        path = epath.Path(directory) / POSITION_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"no data position at {path}: the checkpoint was saved without its data set; seek"
                " to its step instead"
            )
        try:
            position = cls(**json.loads(path.read_text()))
            position._check_types()
        except (TypeError, ValueError, RecursionError) as error:
            raise DamagedPositionError(
                f"the data position {path} is damaged ({error}): remove the file and seek to the"
                " checkpoint's step"
            ) from error
        return position

    def _check_types(self) -> None:
        """Raises a ValueError where a file holds something else than `write` has written."""
        for name, least in (("batches", 0), ("seed", None), ("process_count", 1)):
            value = getattr(self, name)
            if type(value) is not int or (least is not None and value < least):
                raise ValueError(f"{name} is {value!r}")
        if not isinstance(self.fingerprint, Mapping):
            raise ValueError(f"fingerprint is {self.fingerprint!r}")
        packing = self.packing
        whole = isinstance(packing, Mapping) and {"window", "first_row"} <= packing.keys()
        if packing is not None and not (
            whole and all(type(value) is int and value >= 0 for value in packing.values())
        ):
            raise ValueError(f"packing is {packing!r}")

    def check(self, current: Mapping[str, Any], directory: epath.PathLike) -> None:
        """Raises an OtherStreamError that lists the differences where the position is not of the
        stream whose fingerprint is `current`.
        """
        differences = fingerprints.differences(self.fingerprint, current)
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise OtherStreamError(
                f"the data position at {directory} belongs to another stream of"
                f" batches:\n{listed}\nRestore the former data and settings, or start from the"
                " checkpoint in a new MODEL_DIR",
                differences,
            )
