"""Times of exchanges, by hand and against what makers print of whole pods."""

import pytest

from upcycle_jax.costs import hardware, interconnect
from upcycle_jax.costs.interconnect import Slices

V5E, V5P = hardware.accelerator("v5e"), hardware.accelerator("v5p")


def test_chips_are_spread_over_as_few_slices_as_hold_them():
    def spread(chip, chips):
        found = Slices.of(chip, chips)
        return found.count, found.chips

    assert spread(V5E, 64) == (1, 64)
    assert spread(V5E, 1024) == (4, 256) and spread(V5E, 8192) == (32, 256)
    # A job of 6,144 chips at most: 8,192 are two slices of 4,096.
    assert spread(V5P, 1024) == (1, 1024) and spread(V5P, 8192) == (2, 4096)
    assert spread(hardware.accelerator("h100"), 1024) == (128, 8)


def test_blocks_are_as_compact_as_they_can_be():
    assert interconnect.block_sides(V5E, 32) == (8, 4) and interconnect.block_sides(V5E, 7) == (
        7,
        1,
    )
    assert interconnect.block_sides(V5P, 32) == (4, 4, 2)
    assert interconnect.block_sides(hardware.accelerator("h100"), 8) == (8,)


def test_exchanges_inside_a_slice_by_hand():
    # A block of 8 x 4: the cut across the 8 has 4 links of 200 / 4 GB/s, over which 16 chips send
    # half of 1000 bytes: 8000 bytes at 200 GB/s, as 8 * 1000 / (4 * 50e9).
    block = interconnect.exchange_seconds(Slices.of(V5E, 256), 1000.0, 32)
    assert V5E.link_bandwidth == 50e9 and block == pytest.approx(8 * 1000 / (4 * 50e9))
    # The whole of 4 x 4 x 4 has rings.
    whole = interconnect.exchange_seconds(Slices.of(V5P, 64), 1000.0, 64)
    assert whole == pytest.approx(4 * 1000 / (8 * 100e9))
    assert interconnect.exchange_seconds(Slices.of(V5P, 64), 1000.0, 1) == 0
    # Eight GPUs on a switch: 7 / 8 at 450 GB/s.
    gpus = Slices.of(hardware.accelerator("h100"), 8)
    assert interconnect.exchange_seconds(gpus, 1000.0, 8) == pytest.approx(875 / 450e9)


@pytest.mark.parametrize(("name", "bisection"), [("v5e", 1.6e12), ("v6e", 3.2e12), ("v4", 24e12)])
def test_whole_pods_have_the_bisection_that_their_makers_print(name, bisection):
    """Half of the chips send half of their bytes across it: n / 2 * bytes / 2 in the time of an
    exchange.
    """
    chip = hardware.accelerator(name)
    pod = Slices.of(chip, chip.slice_chips)
    seconds = interconnect.exchange_seconds(pod, 1.0, pod.chips)
    assert pod.chips / 4 / seconds == pytest.approx(bisection, rel=0.07)


def test_exchanges_between_slices_by_hand():
    # Three of four parts leave a slice, at 50 Gbit/s.
    assert interconnect.network_seconds(V5P, 1000.0, 4) == pytest.approx(750 / 6.25e9)
    assert interconnect.network_seconds(V5P, 1000.0, 1) == 0
    assert interconnect.network_seconds(hardware.accelerator("v4"), 1000.0, 4) is None
