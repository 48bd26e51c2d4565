"""Slices of TPUs by name, and what is said without libtpu."""

import importlib.util

import pytest

from upcycle_jax.planning import topologies


@pytest.mark.parametrize(
    ("name", "message"),
    [("v5e", "is not GENERATION:SHAPE"), ("v9:2x2", "is not GENERATION:SHAPE with one of v2")],
)
def test_topologies_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        topologies.topology(name)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'upcycle_jax\[precompile\]'"):
        topologies.topology("v5e:4x8")


def test_accelerator_types_count_chips_or_cores():
    assert topologies.CHIPS["v5e"].accelerator_type(256) == "v5litepod-256"
    assert (
        topologies.CHIPS["v5p"].accelerator_type(64) == "v5p-128"
    )  # two cores per chip, one device
