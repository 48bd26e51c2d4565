"""Advice: its sources, and the cases that the evidence covers."""

import dataclasses
import re

import pytest

from upcycle_jax.planning import literature

CASE = literature.Case(
    dense_parameters=247_577_856,
    dense_tokens=1.6e11,
    extra_share=0.3,
    batch_tokens=163_840,
    num_experts=32,
    capacity_factor=2.0,
    router="experts_choose",
    renormalize=False,
    sparse_share=0.5,
)


def stances(**changes):
    return {
        (item.topic, item.source): item.stance
        for item in literature.advise(dataclasses.replace(CASE, **changes))
    }


def test_every_advice_has_a_source_and_a_kind():
    for item in literature.advise(CASE):
        assert (
            re.search(r"arXiv \d{4}\.\d{5}", item.source)
            and item.kind in literature.Kind
            and item.text
        )


def test_the_papers_own_case_is_supported():
    assert (
        literature.Stance.OUTSIDE not in stances().values()
        and literature.Stance.WARNS not in stances().values()
    )


@pytest.mark.parametrize(
    ("changes", "topic", "stance"),
    [
        ({"extra_share": 1.3}, "upcycle or scratch", literature.Stance.WARNS),
        ({"extra_share": 2.5}, "upcycle or scratch", literature.Stance.WARNS),
        ({"dense_parameters": 70_000_000_000}, "upcycle or scratch", literature.Stance.OUTSIDE),
        ({"capacity_factor": 4.0}, "capacity factor", literature.Stance.WARNS),
        ({"capacity_factor": 1.0}, "capacity factor", literature.Stance.OUTSIDE),
        ({"num_experts": 8}, "number of experts", literature.Stance.OUTSIDE),
        ({"num_experts": 256}, "number of experts", literature.Stance.WARNS),
        ({"sparse_share": 1.0}, "MoE layers", literature.Stance.OUTSIDE),
        ({"router": "tokens_choose"}, "routing", literature.Stance.WARNS),
        ({"renormalize": True}, "routing", literature.Stance.WARNS),
    ],
)
def test_cases_outside_the_evidence_are_told(changes, topic, stance):
    assert stance in {found for (where, _), found in stances(**changes).items() if where == topic}
    assert stance not in {found for (where, _), found in stances().items() if where == topic}


def test_no_capacity_is_judged_where_there_is_none():
    (line,) = (
        item
        for item in literature.advise(dataclasses.replace(CASE, capacity_factor=None))
        if item.topic == "capacity factor"
    )
    assert line.stance is literature.Stance.NOTE and "dropless" in line.text


def test_without_dense_steps_the_question_is_put():
    (line,) = (
        item
        for item in literature.advise(dataclasses.replace(CASE, extra_share=None))
        if item.topic == "upcycle or scratch"
    )
    assert "--dense_steps" in line.text
