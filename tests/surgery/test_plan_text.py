"""A plan for reading: layers and slots folded, nothing lost."""

import pytest

from upcycle_jax import surgery
from upcycle_jax.surgery.plan_text import pattern, plan_text, totals


@pytest.fixture
def plan(small):
    """Three layers, of which the second and third get four experts."""
    return surgery.make_plan(
        small.tree(layers=3), small.tree(layers=3, sparse=(1, 2), experts=4), surgery.Recipe(seed=9)
    )


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_layers_are_one_line(plan):
    """A kernel [12, 8] of float32 becomes four in each of two layers: 2 x 4 x 384 bytes."""
    (line,) = [line for line in plan_text(plan).splitlines() if "expert/wo/kernel" in line]
    assert cells(line) == [
        "target/encoder/layers_{1,2}/mlp/expert/wo/kernel",
        "tile x4",
        "2",
        "target/encoder/layers_{1,2}/mlp/wo/kernel",
        "float32[4,12,8]",
        "3.0 KiB",
    ]


def test_every_leaf_is_in_a_line_and_has_its_own_on_request(plan):
    folded, whole = (plan_text(plan, all_leaves=every) for every in (False, True))
    table = [cells(line) for line in folded.split("\n\n")[0].splitlines()[1:]]
    assert sum(int(row[2]) for row in table) == len(plan.rows) > 2 * len(table)
    lines = whole.split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines] == [row.target for row in plan.rows]


def test_totals_name_what_is_left_out_and_the_seed(plan):
    text = totals(plan)
    assert text in plan_text(plan) and "drawn with seed 9" in text and "dropped: " in text


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["a/layers_1/k"], "a/layers_1/k"),
        (["a/layers_10/k", "a/layers_2/k"], "a/layers_{2,10}/k"),
        (["a/layers_1/k/v_col", "a/layers_2/k/v_row"], "a/layers_{1,2}/k/{v_col,v_row}"),
        (["a/b/c", "a/d"], "a/..."),
    ],
)
def test_patterns(paths, text):
    assert pattern(paths) == text
