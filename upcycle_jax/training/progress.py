"""What happened since the last report: metrics, speed, and steps whose loss is not a number."""

import collections
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from upcycle_jax.models import metrics as metrics_lib
from upcycle_jax.training import manifest
from upcycle_jax.training.batches import fingerprint
from upcycle_jax.training.spikes import LossHistory, OnSpike
from upcycle_jax.training.train_step import Metrics, StepOutput
from upcycle_jax.training.trainer import NonFinite
from upcycle_jax.types import Batch

_log = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""How many steps the host may dispatch before their losses are looked at: enough to keep devices
busy.
"""


class NonFiniteLossError(ValueError):
    """The loss, the gradient norm or a router logit of a step is NaN or infinite."""


class LossSpikeError(ValueError):
    """The loss of a step is a spike, and the policy is to stop."""


class LossWatch:
    """Looks at every step's loss, a few steps late so that the host does not wait for the devices.

    Args:
      model_dir: where the fingerprint of an offending batch is written.
      policy: stop or skip, where a loss is no number.
      history: the last losses, where spikes are looked for; None where they are not.
      layers: the MoE layers in the order of a forward pass; what jit returns is ordered by name.
    """

    def __init__(
        self,
        model_dir: epath.Path,
        policy: NonFinite,
        history: LossHistory | None = None,
        *,
        layers: Sequence[str] = (),
    ):
        self._model_dir, self._policy, self.history = model_dir, policy, history
        self._layers = list(layers)
        self._pending: collections.deque[tuple[int, StepOutput, int, Batch]] = collections.deque()
        self.skipped = 0

    def add(self, step: int, output: StepOutput, *, batch: int, rows: Batch) -> None:
        """Takes the output of the update that led to `step`, from `rows` of batch number `batch`,
        and looks at those that are due. The rows are held until then: only those of a bad step are
        worth the time that a fingerprint takes.
        """
        self._pending.append((step, output, batch, rows))
        while len(self._pending) > STEPS_AHEAD:
            self._look()

    def settle(self) -> None:
        """Looks at all steps so far: before the state is saved, evaluated or reported.

        Raises:
          NonFiniteLossError: a step's loss or gradient norm, or a router logit, is not finite and
            the policy is to stop.
          LossSpikeError: a step's loss is a spike and the policy is to stop.
        """
        while self._pending:
            self._look()

    def _look(self) -> None:
        step, output, batch, rows = self._pending.popleft()
        loss, grad_norm, bad_logits = jax.device_get(
            (output.loss, output.grad_norm, output.bad_logits)
        )
        loss, grad_norm = float(loss), float(grad_norm)
        bad = {layer: int(count) for layer, count in bad_logits.items() if count}
        limit = self.history.limit(step) if self.history else math.inf
        if self.history:
            self.history.add(step, loss)
        not_finite = bool(bad) or not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not (not_finite or loss > limit):
            return
        report = {
            "step": step,
            "batch": batch,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "batch_crc32": fingerprint(rows),
        }
        if bad:
            report["non_finite_router_logits"] = bad
        if not_finite:
            self._not_finite(report)
        else:
            self._spike(report, limit)

    def _save(self, kind: str, report: dict[str, Any]) -> epath.Path:
        path = self._model_dir / f"{kind}_{report['step']}.json"
        manifest.write_text(path, json.dumps(report, indent=2) + "\n")
        return path

    def _spike(self, report: dict[str, Any], limit: float) -> None:
        assert self.history is not None
        path, spikes = self._save("loss_spike", report | {"limit": limit}), self.history.spikes
        where = f"batch {report['batch']}, fingerprint in {path}"
        what = (
            f"step {report['step']}: the loss {report['loss']} is a spike, above {limit:.6g}"
            f" ({where})"
        )
        if spikes.policy == OnSpike.STOP:
            raise LossSpikeError(
                f"{what}. The last checkpoint is from before it. Lower the learning rate, raise"
                f" LossSpikes.factor ({spikes.factor:g}) where such losses are usual, or set"
                " LossSpikes.policy = 'skip' to leave out such batches"
            )
        self.skipped += 1
        _log.warning("%s: the update is skipped", what)

    def _not_finite(self, report: dict[str, Any]) -> None:
        path = self._save("non_finite", report)
        what = (
            f"step {report['step']}: the loss is {report['loss']} and the gradient norm"
            f" {report['grad_norm']} (batch {report['batch']}, fingerprint in {path})"
        )
        if bad := report.get("non_finite_router_logits"):
            first = min(bad, key=self._layers.index)
            what += (
                f". Router logits that are NaN or infinite: {bad[first]} in {first}, the first of"
                f" {len(bad)} such MoE layers: what reaches that router, or its kernel, is not"
                " finite (MoeConfig.router_z_loss_factor = 0.001 keeps logits small)"
            )
        if self._policy == NonFinite.STOP:
            raise NonFiniteLossError(
                f"{what}. The last checkpoint is from before it. Lower the learning rate, or set"
                " Trainer.non_finite = 'skip' to leave out such batches"
            )
        self.skipped += 1
        _log.warning("%s: the update is skipped", what)


class Window:
    """Metrics and time since the last report; time spent on evaluating and saving does not count.

    Args:
      batch_size: rows of a batch.
      flops_per_step: training FLOPs of one step, or 0 where unknown.
    """

    def __init__(self, *, batch_size: int, flops_per_step: float = 0.0):
        self._batch_size, self._flops = batch_size, flops_per_step
        self._merge = jax.jit(metrics_lib.merge, donate_argnums=0)
        self._total: Metrics | None = None
        self._steps, self._seconds, self._since = 0, 0.0, time.monotonic()

    def add(self, metrics: Metrics) -> None:
        """Merges the metrics of one step, on the devices."""
        self._total = metrics if self._total is None else self._merge(self._total, metrics)
        self._steps += 1

    def pause(self) -> None:
        """Stops the clock; call it when the devices are done."""
        self._seconds += time.monotonic() - self._since

    def go_on(self) -> None:
        """Starts the clock again."""
        self._since = time.monotonic()

    def take(self) -> dict[str, Any]:
        """Values since the last call: metrics and `timing/*`; empties the window. The clock must be
        paused.
        """
        assert self._total is not None, "a report needs at least one step"
        values = host_values(self._total)
        rate = self._steps / max(self._seconds, 1e-9)
        values["timing/seconds"] = self._seconds
        values["timing/steps_per_second"] = rate
        values["timing/seqs_per_second"] = rate * self._batch_size
        values["timing/target_tokens_per_second"] = rate * values.pop("target_tokens", 0.0)
        # What other programs take shows in times: reports compare those of quiet machines.
        values["timing/load_average"] = os.getloadavg()[0]
        if self._flops:
            values["timing/model_flops_per_second"] = rate * self._flops
        self._total, self._steps, self._seconds = None, 0, 0.0
        return values


def host_values(metrics: Metrics) -> dict[str, Any]:
    """Metrics on the host: a float, or a NumPy vector, per name."""
    values = jax.device_get(metrics_lib.compute(metrics))
    return {
        name: float(value) if np.ndim(value) == 0 else np.asarray(value)
        for name, value in values.items()
    }
