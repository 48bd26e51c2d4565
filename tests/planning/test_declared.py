"""Collectives that a step is expected to have, and others."""

import types

import pytest

from upcycle_jax.partitioning import DATA, EXPERT, MODEL
from upcycle_jax.planning import declared
from upcycle_jax.planning.collectives import Traffic


def found(kind, group, *, data=2, expert=4, model=1, fsdp=False, moe=True):
    mesh = types.SimpleNamespace(
        shape={DATA: data, EXPERT: expert, MODEL: model}, size=data * expert * model
    )
    work = types.SimpleNamespace(
        partitioner=types.SimpleNamespace(mesh=mesh, fsdp=fsdp),
        model=types.SimpleNamespace(config=types.SimpleNamespace(moe=moe or None)),
    )
    return declared.undeclared(work, [Traffic(kind, group, 1, 100)])


@pytest.mark.parametrize(
    ("kind", "group", "mesh"),
    [
        ("all-to-all", 4, {}),
        ("all-reduce", 8, {}),
        ("all-reduce", 0, {}),
        ("reduce-scatter", 2, {}),
        ("all-gather", 2, {"fsdp": True}),
        ("all-to-all", 0, {"fsdp": True, "moe": False}),
        ("collective-permute", 2, {"fsdp": True}),
        ("all-gather", 2, {"data": 4, "expert": 1, "model": 2}),
    ],
)
def test_exchanges_sums_and_declared_gathers(kind, group, mesh):
    assert not found(kind, group, **mesh)


@pytest.mark.parametrize(
    ("kind", "group", "mesh"),
    [
        ("all-to-all", 2, {}),  # along the data axis
        ("all-to-all", 4, {"moe": False}),
        ("all-gather", 4, {}),
        ("all-gather", 4, {"fsdp": True}),  # along the expert axis
        ("all-reduce", 3, {}),
        ("collective-permute", 2, {}),
        ("collective-broadcast", 8, {"fsdp": True}),
    ],
)
def test_what_else_a_program_sends(kind, group, mesh):
    assert [item.kind for item in found(kind, group, **mesh)] == [kind]
