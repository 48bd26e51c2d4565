"""How much of what its devices could do a run does."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from upcycle_jax.costs import hardware


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """Turns steps per second into shares of the devices' peak.

    Attributes:
      model_flops: matrix products of a step, forward and backward, over all devices; 0 for models
        that are not counted.
      hardware_flops: the same with what the backward pass computes again.
      peak_flops: bfloat16 FLOPs per second of all devices together, or None where one of them is
        not in the table of accelerators.
    """

    model_flops: float
    hardware_flops: float
    peak_flops: float | None

    @classmethod
    def of_run(
        cls, *, model_flops: float, hardware_flops: float, devices: Iterable[Any]
    ) -> "Utilisation":
        """The utilisation of a run on these jax devices."""
        peaks = [
            chip.device_peak_flops if (chip := hardware.of_device(device)) else None
            for device in devices
        ]
        return cls(model_flops, hardware_flops, sum(p for p in peaks if p) if all(peaks) else None)

    def metrics(self, steps_per_second: float) -> dict[str, float]:
        """`timing/mfu`, `timing/hfu` and `timing/hardware_flops_per_second`; shares only where the
        peak is known.

        MFU (PaLM, arXiv 2204.02311, appendix B) divides the FLOPs that the model needs by the peak;
        HFU those that are executed. HFU and hardware FLOPs are there only where something is
        computed twice.
        """
        values = {}
        if self.model_flops and self.peak_flops:
            values["timing/mfu"] = steps_per_second * self.model_flops / self.peak_flops
        if self.hardware_flops > self.model_flops:
            values["timing/hardware_flops_per_second"] = steps_per_second * self.hardware_flops
            if self.peak_flops:
                values["timing/hfu"] = steps_per_second * self.hardware_flops / self.peak_flops
        return values
