"""Every bad input of `bad_inputs` is refused while the configuration is built, in one message that
names it. Nothing is trained and nothing is written.
"""

import functools
import itertools

import pytest

from tests.config import bad_inputs
from upcycle_jax.config import load

ROWS = list(bad_inputs.rows())


@functools.cache
def _refusal(row: bad_inputs.BadInput) -> str | None:
    """What the error says; None without one."""
    try:
        loaded = load(row.files, row.bindings, function=bad_inputs.FUNCTIONS[row.command])
        loaded.build(bad_inputs.FUNCTIONS[row.command])()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def _id(row: bad_inputs.BadInput) -> str:
    return f"{row.command} {row.bindings[-1][:60]}"


@pytest.mark.parametrize("command", bad_inputs.FILES)
def test_without_nonsense_everything_is_built(command):
    loaded = load(bad_inputs.FILES[command], bad_inputs.REQUIRED[command])
    loaded.build(bad_inputs.FUNCTIONS[command])()


@pytest.mark.parametrize(
    "rows",
    [
        list(group)
        for _, group in itertools.groupby(ROWS, lambda row: row.bindings[-1].split("=")[0])
    ],
    ids=lambda rows: f"{rows[0].command} {rows[0].bindings[-1].split('=')[0]}",
)
def test_nonsense_is_refused_by_name(rows):
    told = {_id(row): _refusal(row) for row in rows}
    wrong = {
        _id(row): told[_id(row)]
        for row in rows
        if (text := told[_id(row)]) is None
        or row.fragment.lower() not in text.lower()
        or "\n" in text
        or len(text) > 700
    }
    assert not wrong


def test_there_are_many():
    assert len(ROWS) >= 190 and len(set(ROWS)) == len(ROWS)
