"""How names and texts out of files reach a terminal or a log."""

import logging


def printable(text: object) -> str:
    r"""`text` with every character that is not printed as itself written as its Python escape:
    control characters, terminal escape sequences, line breaks, marks that change the direction of
    writing, lone surrogates.

    >>> printable("target/\x1b[31mred\n")
    'target/\\x1b[31mred\\n'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: object) -> str:
    """A message of several lines, each of them `printable`; the line breaks stay."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def show(text: object) -> None:
    """Prints lines of text, `printable`."""
    print(printable_lines(text))


class PrintableFormatter(logging.Formatter):
    """Formats records of the log as `printable_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))
