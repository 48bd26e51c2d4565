"""Metrics to Weights & Biases, beside the files in MODEL_DIR. The package is imported only where a
run asks for it.
"""

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax import checks

RUN_ID_FILE = "wandb_run_id.txt"
MODES = ("online", "offline", "disabled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    """Sends every metric that is written to MODEL_DIR to Weights & Biases too.

    Only process 0 sends. The run's id is kept in `MODEL_DIR/wandb_run_id.txt`: a run that resumes
    goes on in the same W&B run. Metrics are plotted over the training step (`step`), and where a
    resumed run repeats steps that were lost, the later values are there as well.

    Attributes:
      project: W&B project.
      name: how W&B shows the run; None for the name of the MODEL_DIR.
      entity: user or team; None for W&B's default.
      mode: 'online', 'offline' (written to `MODEL_DIR/wandb`, sent later by `wandb sync`) or
        'disabled'. None leaves the choice to the environment variable WANDB_MODE, and to 'online'
        without it.
      tags: labels.

    Raises:
      ValueError: a mode that does not exist.
    """

    project: str = "upcycle_jax"
    name: str | None = None
    entity: str | None = None
    mode: str | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(
                f"Wandb.mode is {self.mode!r}: choose one of {', '.join(map(repr, MODES))}, or None"
                " for WANDB_MODE's"
            )

    def check(self) -> None:
        """Raises a ValueError where the package is not installed."""
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "TRACKER is @Wandb(), but the package wandb is not installed: pip install"
                " 'upcycle_jax[wandb]', or set TRACKER = None (metrics are in MODEL_DIR either way)"
            )

    def start(self, model_dir: epath.Path, config: Mapping[str, Any]) -> "WandbRun":
        """Opens the W&B run of a MODEL_DIR; `config` is shown beside it."""
        import wandb

        id_file = model_dir / RUN_ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        init: Any = wandb.init  # the package's own types differ between its versions
        run = init(
            project=self.project,
            name=self.name or model_dir.name,
            entity=self.entity,
            mode=self.mode,
            tags=list(self.tags),
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(model_dir),
            config=dict(config),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return WandbRun(run)


class WandbRun:
    """An open W&B run."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, folder: str, values: Mapping[str, Any]) -> None:
        """Sends metrics as `<folder>/<name>`; of a vector (`experts/<layer>/load`) its smallest and
        largest element.
        """
        row: dict[str, Any] = {"step": int(step)}
        for name, value in values.items():
            array = np.asarray(value, np.float64)
            parts = {"": array} if not array.ndim else {"/min": array.min(), "/max": array.max()}
            row |= {f"{folder}/{name}{part}": float(number) for part, number in parts.items()}
        self._run.log(row)

    def close(self, *, failed: bool) -> None:
        """Ends the W&B run; it can be gone on with."""
        self._run.finish(exit_code=1 if failed else 0)
