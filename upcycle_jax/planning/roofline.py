"""The least time that a compiled step takes on its chips: a bound on model FLOPs utilisation (MFU)
before anything has run.

A step takes at least as long as its matrix products at the chip's peak, as what it moves between
memory and chip at full bandwidth, and as what it sends at the full bandwidth of the chip's links.
Real steps reach none of the three, and overlap them in part.
"""

import dataclasses
from collections.abc import Iterable

from upcycle_jax.planning.collectives import Traffic
from upcycle_jax.planning.program_work import Work
from upcycle_jax.planning.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A step on one device.

    Attributes:
      model_flops: matrix products that the model needs.
      work: what the compiled program does.
      sent_bytes: what the device sends.
      chip: the device.
    """

    model_flops: float
    work: Work
    sent_bytes: float
    chip: Chip

    @property
    def waste(self) -> float:
        """FLOPs of the program's products over those of the model's: above 1 where something is
        computed again, or by several devices.
        """
        return self.work.flops / self.model_flops

    @property
    def bytes_per_flop(self) -> float:
        """What the program moves for each FLOP."""
        return self.work.nbytes / self.work.flops

    @property
    def chip_bytes_per_flop(self) -> float:
        """What the chip can move in the time of a FLOP: programs above it wait for memory."""
        return self.chip.memory_bandwidth / self.chip.peak_flops

    @property
    def seconds(self) -> dict[str, float]:
        """The three bounds by name; of loops of unknown length what the model needs counts."""
        flops = max(self.work.flops, self.model_flops if self.work.open_ended else 0.0)
        return {
            "compute": flops / self.chip.peak_flops,
            "memory": self.work.nbytes / self.chip.memory_bandwidth,
            "links": self.sent_bytes / self.chip.link_bandwidth,
        }

    @property
    def limit(self) -> str:
        """Which of the three takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def mfu_bound(self) -> float:
        """MFU that the step cannot exceed."""
        return self.model_flops / self.chip.peak_flops / self.seconds[self.limit]


def sent_bytes(traffic: Iterable[Traffic], num_devices: int) -> float:
    """Bytes that a device sends in all collectives of a program.

    Of n devices that exchange, each sends the n - 1 parts that are not its own; a ring gathers or
    scatters in n - 1 parts of n, and sums by scattering and gathering.
    """
    total = 0.0
    for item in traffic:
        n = item.group_size or num_devices
        share = (n - 1) / n
        total += item.nbytes * {
            "all-reduce": 2 * share,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(item.kind, share)
    return total
