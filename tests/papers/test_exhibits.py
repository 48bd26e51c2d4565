"""The paper's numbers: complete, and those of the reference."""

import csv
import pathlib

import pytest

from upcycle_jax.papers import exhibits as published
from upcycle_jax.papers.exhibits import Kind, Method, exhibit, exhibits

REFERENCE = (
    pathlib.Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper_figures.csv"
)


def test_every_number_has_a_kind_and_a_place():
    for name, one in exhibits().items():
        assert (one.points or one.claims) and one.title
        for point in one.points:
            assert (
                point.kind in Kind
                and point.metric in published.METRICS
                and point.modality in ("language", "vision")
            )
            assert point.place == name and (point.printed != "") == (point.kind == Kind.PRINTED)
            assert (point.value is None) == (point.kind == Kind.NOT_KNOWN)
    by_kind = {
        kind: sum(point.kind == kind for one in exhibits().values() for point in one.points)
        for kind in Kind
    }
    assert by_kind[Kind.PRINTED] == 14 + 18 + 8 + 4  # tables 1, 2 and 3, appendix B.7
    with open(
        published.__file__.replace("exhibits.py", "data/sparse_upcycling.csv"),
        encoding="utf-8",
    ) as stream:
        assert sum(by_kind.values()) == len(list(csv.DictReader(stream)))


def test_numbers_are_those_of_the_reference():
    if not REFERENCE.is_file():
        pytest.skip("the checked list of the paper's figures is not beside this checkout")
    with open(REFERENCE, encoding="utf-8") as stream:
        expected = sorted(
            (
                f"figure{row['figure']}",
                row["panel"],
                float(row["x_extra_cost"]),
                float(row["value"]),
            )
            for row in csv.DictReader(stream)
        )
    ours = [
        p
        for one in exhibits().values()
        for p in one.points
        if p.kind == Kind.READ_OFF and p.method != Method.START and p.x is not None
    ]
    assert (
        sorted(
            (p.place, p.part, p.x, p.value)
            for p in ours
            if p.place in ("figure2", "figure3", "figure4", "figure5")
        )
        == expected
    )


def test_names_are_forgiving_and_wrong_ones_are_told():
    assert exhibit("Figure 2") is exhibit("fig2") is exhibit("figure2") and exhibit(
        "Appendix B.7"
    ) is exhibit("b7")
    with pytest.raises(
        ValueError,
        match=r"no numbers of 'figure7' are known here. Did you mean figure\d+\? Known: table1",
    ):
        exhibit("figure7")
