"""Sizes, durations and tables as text."""

import pytest

from upcycle_jax import text
from upcycle_jax.text import Format, Table


@pytest.mark.parametrize(
    ("seconds", "shown"), [(12, "12 s"), (100, "2 min"), (7200, "2.0 h"), (260_000, "3.0 days")]
)
def test_duration(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 Bytes"), (1023, "1023 Bytes"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_size(count, shown):
    assert text.size(count) == shown


def test_shorten_counts_what_it_leaves_out():
    assert text.shorten(["a", "b"], 2) == ["a", "b"]
    assert text.shorten("abcd", 1) == ["a", "... and 3 more"]


def test_a_table_is_the_same_for_the_terminal_and_as_markdown():
    """Numbers flush right, words and the first column flush left."""
    table = Table("Costs", ["model", "steps", "kind"], [["a", "10", "dense"], ["bb", "-", "moe"]])
    assert table.render(Format.TEXT).splitlines() == [
        "Costs",
        "  model  steps  kind",
        "  a         10  dense",
        "  bb         -  moe",
    ]
    assert table.render(Format.MARKDOWN).splitlines() == [
        "### Costs",
        "",
        "| model | steps | kind  |",
        "| ----- | ----: | ----- |",
        "| a     |    10 | dense |",
        "| bb    |     - | moe   |",
    ]


def test_nothing_leaves_its_cell():
    """A bar or a line end in a name would begin another cell or end the table."""
    (*_, row) = text.markdown(["run"], [["a | b\n| c"]], right=[]).splitlines()
    assert row == "| a \\| b \\| c |"
