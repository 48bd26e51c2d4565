"""Paths, specs and differences of trees."""

import numpy as np
import pytest

from upcycle_jax import trees


def test_flatten_and_back():
    tree = {"b": {"c": 2, "a": {"z": 3}}, "a": 1}
    flat = trees.flatten(tree)
    assert list(flat.items()) == [("a", 1), ("b/a/z", 3), ("b/c", 2)]
    assert trees.unflatten(flat) == tree
    assert trees.flatten({}) == {} and trees.unflatten({}) == {}


def test_matching_is_from_end_to_end():
    paths = ["encoder/mlp/wi", "encoder/mlp/wi_0", "decoder/mlp/wi"]
    assert trees.matching(r".*/wi", paths) == ["encoder/mlp/wi", "decoder/mlp/wi"]
    assert trees.matching(r"mlp", paths) == []


def test_specs():
    spec = trees.LeafSpec((2, 3), "bfloat16", ("embed", None))
    assert (spec.size, spec.nbytes, str(spec)) == (6, 12, "bfloat16[2,3]")
    assert trees.LeafSpec([2], np.float32).axes == (None,)
    assert trees.LeafSpec((), np.int32).nbytes == 4
    assert trees.LeafSpec((32, 4096, 65536), np.float32).nbytes == 32 * 4096 * 65536 * 4
    with pytest.raises(
        ValueError, match=r"axes \('embed',\) do not name the dimensions of shape \(2, 3\)"
    ):
        trees.LeafSpec((2, 3), np.float32, ("embed",))


def test_diff_shows_both_sides():
    expected = {"a": np.zeros(2), "b": np.zeros((2, 3)), "c": np.zeros(1)}
    actual = {"b": np.zeros((3, 2)), "c": np.zeros(1, np.float32), "d": np.zeros(4)}
    difference = trees.diff(expected, actual)
    assert difference and (difference.missing, difference.unexpected) == (("a",), ("d",))
    assert difference.mismatched == (("b", "[2,3]", "[3,2]"),)
    lines = str(difference).splitlines()
    assert lines == [
        "- a (expected, not there)",
        "+ d (there, not expected)",
        "! b: expected [2,3], found [3,2]",
    ]
    with_dtype = trees.diff(expected, actual, compare_dtype=True)
    assert ("c", "float64[1]", "float32[1]") in with_dtype.mismatched


def test_equal_trees_do_not_differ():
    difference = trees.diff({"a": np.zeros(2)}, {"a": np.ones(2)}, compare_dtype=True)
    assert not difference and str(difference) == "no difference"
