"""The table of accelerators: names are unique, figures are consistent, and nothing is guessed."""

import types

import jax
import pytest

from upcycle_jax.costs import hardware


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tpu_v5e", "tpu_v5e"),
        ("v5e", "tpu_v5e"),
        ("TPU v5 lite", "tpu_v5e"),
        ("v5p", "tpu_v5p"),
        ("H100", "h100"),
        ("trillium", "tpu_v6e"),
    ],
)
def test_names_and_aliases(name, expected):
    assert hardware.accelerator(name).name == expected


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"no accelerator 'tpu_v5f' is known; known: tpu_v2, .*Did you mean tpu_v5[ep]\?",
    ):
        hardware.accelerator("tpu_v5f")


def test_names_are_unique():
    names = [
        hardware._plain(name)
        for chip in hardware.ACCELERATORS
        for name in {chip.name, *chip.aliases}
    ]
    kinds = [kind for chip in hardware.ACCELERATORS for kind in chip.device_kinds]
    assert len(names) == len(set(names)) and len(kinds) == len(set(kinds))


def test_devices_by_what_jax_calls_them():
    assert hardware.of_device(device("TPU v5")).name == "tpu_v5p"
    assert hardware.of_device(device("NVIDIA H200")).name == "h200"
    # A PCIe card is slower than the SXM module of the same name: unknown, not taken for it.
    assert hardware.of_device(device("NVIDIA H100 PCIe")) is None
    assert hardware.of_device(jax.devices()[0]) is None


def test_two_cores_of_a_v3_chip_share_its_figures():
    chip = hardware.accelerator("v3")
    assert (chip.device_peak_flops, chip.device_hbm_bytes) == (61.5e12, 16 * hardware.GIB)


@pytest.mark.parametrize("chip", hardware.ACCELERATORS, ids=lambda chip: chip.name)
def test_figures_are_in_their_units(chip):
    """A slip of a thousand in a unit: machine balances of these chips lie between 60 and 600 FLOPs
    per byte of HBM.
    """
    assert 50 < chip.peak_flops / chip.hbm_bandwidth < 700
    assert chip.hbm_bandwidth / 12 < chip.interconnect_bandwidth < chip.hbm_bandwidth
    assert 16 * hardware.GIB <= chip.hbm_bytes <= 192 * hardware.GIB and chip.source.startswith(
        "https://"
    )
