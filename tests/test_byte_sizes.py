import argparse

import pytest

from upcycle_jax import byte_sizes


def test_sizes():
    texts = ("1024", "1K", "1.5KiB", "2GiB", "3MB", " 1 T ", str(2**53 + 1))
    assert [byte_sizes.parse_bytes(text) for text in texts] == [
        1024,
        1024,
        1536,
        2 << 30,
        3 << 20,
        1 << 40,
        2**53 + 1,
    ]
    assert byte_sizes.parse_bytes(2 << 30) == 2 << 30


@pytest.mark.parametrize("size", ["", "0", "two", "1P", "-1M", "9" * 400, 0, -1, 2.0, True, None])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="is no size; write for example 512MiB or 2GiB"):
        byte_sizes.parse_bytes(size)


def test_a_flag_says_so_too():
    assert byte_sizes.flag("2GiB") == 2 << 30
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        byte_sizes.flag("much")
