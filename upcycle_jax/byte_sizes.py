"""Sizes in bytes as people write them."""

import argparse
import re
from decimal import Decimal

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(size: int | str) -> int:
    """A number of bytes, given as such or as text: '2GiB', '512M', '1000000'. Units are powers of
    1024.

    >>> parse_bytes("2GiB") == parse_bytes("2048M") == parse_bytes(2 << 30)
    True

    Raises:
      ValueError: it is no size above 0.
    """
    text = str(size).strip() if isinstance(size, int | str) and not isinstance(size, bool) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    number = int(Decimal(match.group(1)) * _UNITS[match.group(2).upper()]) if match else 0
    if not 0 < number < 1 << 63:
        raise ValueError(f"{size!r} is no size; write for example 512MiB or 2GiB")
    return number


def flag(text: str) -> int:
    """`parse_bytes` as the `type` of a command-line flag, whose message argparse then shows.

    Raises:
      argparse.ArgumentTypeError: it is no size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
