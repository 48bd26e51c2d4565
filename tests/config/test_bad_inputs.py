"""Every bad input of `bad_inputs` is refused while the configuration is built, in one message that
names it. Nothing is trained and nothing is written.
"""

import collections
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


def _cases():
    """The rows of each setting. Settings of one kind get the same values: by default each meets a
    third of them, the next one another third; the rest is slow.
    """
    settings = [
        list(group)
        for _, group in itertools.groupby(ROWS, lambda row: row.bindings[-1].split("=")[0])
    ]
    kinds = [tuple(row.bindings[-1].partition("=")[2] for row in rows) for rows in settings]
    seen, alike = collections.Counter(), collections.Counter(kinds)
    for rows, kind in zip(settings, kinds, strict=True):
        name = f"{rows[0].command} {rows[0].bindings[-1].split('=')[0]}"
        if len(kind) < 3 or alike[kind] < 3:
            yield pytest.param(rows, id=name)
            continue
        now = rows[seen[kind] % 3 :: 3]
        seen[kind] += 1
        yield pytest.param(now, id=name)
        rest = [row for row in rows if row not in now]
        yield pytest.param(rest, id=f"{name}, the rest", marks=pytest.mark.slow)


@pytest.mark.parametrize("rows", _cases())
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
