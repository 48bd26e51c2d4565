"""Bounds on utilisation, by hand."""

import pytest

from upcycle_jax.planning import roofline
from upcycle_jax.planning.collectives import Traffic
from upcycle_jax.planning.program_work import Work
from upcycle_jax.planning.roofline import Roofline
from upcycle_jax.planning.topologies import Chip

# 1 TFLOP/s, 100 GB/s of memory, 10 GB/s of links.
CHIP = Chip("easy", 2**30, 1e12, 1e11, 1e10, "easy")


def test_the_longest_of_three_times_bounds_utilisation():
    # 1.25 TFLOPs for 1 of the model: 1.25 s. 50 GB: 0.5 s. 5 GB: 0.5 s.
    found = Roofline(1e12, Work(1.25e12, 5e10), 5e9, CHIP)
    assert (found.waste, found.limit, found.mfu_bound) == (1.25, "compute", 0.8)
    assert found.bytes_per_flop == 0.04 and found.chip_bytes_per_flop == 0.1
    # 200 GB take 2 s, in which the chip could do 2 TFLOPs.
    assert Roofline(1e12, Work(1.25e12, 2e11), 5e9, CHIP).mfu_bound == 0.5
    assert Roofline(1e12, Work(1.25e12, 5e10), 4e10, CHIP).limit == "links"
    # Half of the model's products are in loops of unknown length: no less than all will run.
    assert Roofline(1e12, Work(5e11, 5e10, open_ended=True), 5e9, CHIP).mfu_bound == 1.0


def test_bytes_that_a_device_sends():
    # Of four devices: three quarters of an exchange, of a gathering and of a scattering, twice that
    # of a sum; all of a permutation. A group of 0 is all 8 devices.
    def sent(kind, group=4):
        return roofline.sent_bytes([Traffic(kind, group, 1, 800)], num_devices=8)

    assert sent("all-to-all") == sent("all-gather") == sent("reduce-scatter") == 600
    assert sent("all-reduce") == 1200 and sent("all-reduce", 0) == pytest.approx(2 * 700)
    assert sent("collective-permute", 2) == 800
    both = [Traffic("all-to-all", 4, 1, 800), Traffic("all-reduce", 4, 1, 800)]
    assert roofline.sent_bytes(both, num_devices=8) == 1800
