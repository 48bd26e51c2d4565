"""Paths of layers, made and taken apart."""

import pytest

from upcycle_jax.models import layer_names


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("encoder/layers_1", ("encoder", 1, "", "layers")),
        ("encoder/layers_10/mlp/wo/kernel", ("encoder", 10, "mlp/wo/kernel", "layers")),
        ("target/decoder/layers_0/norm/scale", ("target/decoder", 0, "norm/scale", "layers")),
        ("Transformer/encoderblock_2/norm", ("Transformer", 2, "norm", "encoderblock")),
    ],
)
def test_a_path_of_a_layer_is_taken_apart(path, expected):
    found = layer_names.split(path)
    assert found == expected
    stack, number, rest, called = expected
    assert path.startswith(found.layer)
    assert found.layer == layer_names.layer(stack, number, called)
    assert not rest or found.in_layer(number) == path


@pytest.mark.parametrize("path", ["token_embedder/embedding", "layers_1/mlp", "a/layers_x/b", ""])
def test_other_paths_are_of_no_layer(path):
    assert layer_names.split(path) is None
