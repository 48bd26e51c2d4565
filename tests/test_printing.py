"""Texts out of files on terminals and in the log."""

import logging

from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_jax import printing


@given(st.text(st.characters(), max_size=20))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_everything_becomes_printable_and_nothing_is_lost(text):
    shown = printing.printable(text)
    assert shown.isprintable()
    assert shown == text if text.isprintable() else "\\" in shown
    assert "\n" not in shown


def test_what_terminals_obey_is_escaped():
    assert printing.printable("\x1b[2J\x9b1m\u202e\ud800\n") == r"\x1b[2J\x9b1m\u202e\ud800\n"
    assert printing.printable("Grüße, 世界 C:\\") == "Grüße, 世界 C:\\"
    assert printing.printable_lines(ValueError("one\x07\ntwo")) == "one\\x07\ntwo"


def test_the_log_is_printable():
    record = logging.LogRecord("x", logging.INFO, "f", 1, "leaf %s\nnext", ("\x1b[31m",), None)
    assert printing.PrintableFormatter("%(message)s").format(record) == "leaf \\x1b[31m\nnext"


def test_show(capsys):
    printing.show("a\x1bb\nc")
    assert capsys.readouterr().out == "a\\x1bb\nc\n"
