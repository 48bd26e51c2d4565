"""Shares of peak, by hand; absent where the peak is not known."""

import types

import jax
import pytest

from upcycle_jax.costs.mfu import Utilisation


def devices(*kinds):
    return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


def test_mfu_by_hand():
    # Four v5e chips: 788e12. 0.5 steps of 394e12 FLOPs a second are a quarter of it.
    found = Utilisation.of_run(
        model_flops=394e12, hardware_flops=394e12, devices=devices(*["TPU v5 lite"] * 4)
    )
    assert found.metrics(0.5) == {"timing/mfu": pytest.approx(0.25)}


def test_what_is_computed_twice_is_hardware_flops():
    # Two cores of a v3 chip: 123e12.
    found = Utilisation.of_run(
        model_flops=30e12, hardware_flops=40e12, devices=devices("TPU v3", "TPU v3")
    )
    values = found.metrics(2.0)
    assert values["timing/mfu"] == pytest.approx(60 / 123) and values[
        "timing/hfu"
    ] == pytest.approx(80 / 123)
    assert values["timing/hardware_flops_per_second"] == 80e12


@pytest.mark.parametrize("kinds", [("cpu",), ("TPU v4", "some card")])
def test_unknown_devices_have_no_share(kinds):
    assert (
        Utilisation.of_run(model_flops=1e12, hardware_flops=1e12, devices=devices(*kinds)).metrics(
            3.0
        )
        == {}
    )
    again = Utilisation.of_run(
        model_flops=1e12, hardware_flops=2e12, devices=devices(*kinds)
    ).metrics(3.0)
    assert again == {"timing/hardware_flops_per_second": 6e12}


def test_no_cpu_is_taken_for_an_accelerator():
    assert (
        Utilisation.of_run(model_flops=1.0, hardware_flops=1.0, devices=jax.devices()).peak_flops
        is None
    )


def test_models_that_are_not_counted():
    assert (
        Utilisation.of_run(model_flops=0.0, hardware_flops=0.0, devices=devices("TPU v4")).metrics(
            3.0
        )
        == {}
    )
