"""How long exchanges take at least, from what makers print of links: inside a slice, whose chips
are joined by links of their own, and between slices, over the network of the data centre.
"""

import dataclasses
import itertools
import math

from upcycle_jax.costs.hardware import Accelerator


@dataclasses.dataclass(frozen=True)
class Slices:
    """Chips in slices of one size.

    Attributes:
      chip: what they are.
      count: how many slices.
      chips: of each.
    """

    chip: Accelerator
    count: int
    chips: int

    @classmethod
    def of(cls, chip: Accelerator, num_chips: int) -> "Slices":
        """As few slices as hold so many chips, all of one size."""
        size = max(n for n in range(1, chip.slice_chips + 1) if num_chips % n == 0)
        return cls(chip, num_chips // size, size)

    @property
    def are_tori(self) -> bool:
        """Whether the slices' sides are rings: of three axes where each is a multiple of 4, of two
        only those of a whole pod.
        """
        if self.chip.torus_axes == 3:
            return all(side % 4 == 0 for side in block_sides(self.chip, self.chips))
        return self.chips == self.chip.slice_chips


def block_sides(chip: Accelerator, num_chips: int) -> tuple[int, ...]:
    """Sides of the most compact block of a torus that has so many chips, longest first; of a switch
    one.
    """
    if not chip.torus_axes:
        return (num_chips,)
    divisors = [n for n in range(1, num_chips + 1) if num_chips % n == 0]
    found = (
        sides
        for sides in itertools.combinations_with_replacement(divisors, chip.torus_axes)
        if math.prod(sides) == num_chips
    )
    return tuple(sorted(min(found, key=max), reverse=True))


def exchange_seconds(slices: Slices, nbytes: float, num_chips: int) -> float:
    """The least time of an all-to-all among the chips of a block of a slice, each of which has
    `nbytes` for all of them in equal parts, its own included.

    Of a torus: one half of the block sends half of its bytes to the other half, over the links that
    a cut across the longest side meets. A block of n chips with a longest side d has n / d of them
    in each direction; twice as many where its sides are rings, which they are where the block is
    the whole slice and that is a torus. So the time is d * nbytes / (4 * link), half of that of
    rings. Of a switch, a chip sends what is not its own over all of its links.
    """
    chip = slices.chip
    if num_chips == 1:
        return 0.0
    if not chip.torus_axes:
        return nbytes * (num_chips - 1) / num_chips / chip.interconnect_bandwidth
    cuts = 2 if num_chips == slices.chips and slices.are_tori else 1
    return block_sides(chip, num_chips)[0] * nbytes / (4 * cuts * chip.link_bandwidth)


def network_seconds(chip: Accelerator, nbytes: float, num_slices: int) -> float | None:
    """The same for chips that are spread over slices: the parts for other slices go over the
    network. None where its speed is not printed.
    """
    if num_slices == 1:
        return 0.0
    if chip.network_bandwidth is None:
        return None
    return nbytes * (num_slices - 1) / num_slices / chip.network_bandwidth
