"""Paths of layers, made and taken apart."""

import pytest

from upcycle_jax.models import layer_names


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("encoder/layers_1", ("encoder", 1, "")),
        ("encoder/layers_10/mlp/wo/kernel", ("encoder", 10, "mlp/wo/kernel")),
        ("target/decoder/layers_0/norm/scale", ("target/decoder", 0, "norm/scale")),
    ],
)
def test_a_path_of_a_layer_is_taken_apart(path, expected):
    found = layer_names.split(path)
    assert found == expected
    assert path.startswith(found.layer) and found.layer == layer_names.layer(*expected[:2])


@pytest.mark.parametrize("path", ["token_embedder/embedding", "layers_1/mlp", "a/layers_x/b", ""])
def test_other_paths_are_of_no_layer(path):
    assert layer_names.split(path) is None
