"""Every family of decoder-only models, written and loaded by transformers."""

import json

import ml_dtypes
import numpy as np
import pytest
from random_decoders import FAMILIES, UNIT, Held, of, our_logits, their_logits

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.decoder.reading_back import differences
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_computes_the_same(model_type, tmp_path):
    held = Held(FAMILIES[model_type])
    folder = write_huggingface(
        held, tmp_path / "out", options=WritingOptions(model_type=model_type)
    )
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    ours, theirs = our_logits(held.config, held.leaves), their_logits(folder)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_folder_is_read_again_bit_for_bit(model_type, tmp_path):
    held = Held(FAMILIES[model_type])
    options = WritingOptions(model_type=model_type)
    reader = open_checkpoint(write_huggingface(held, tmp_path / "out", options=options))
    assert reader.specs().keys() == held.specs().keys()
    for name in held.specs():
        np.testing.assert_array_equal(reader.read(name), held.read(name), err_msg=name)
    assert not list(differences(held.config, reader.model_config()))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    """Parameters keep their bits, or are cast; config.json names the widest dtype that is there."""
    config = of(norm="layer_norm_without_parameters", moe=UNIT)
    leaves = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in Held(config).leaves.items()}
    options = WritingOptions(dtype=None if dtype is None else np.dtype(dtype))
    folder = write_huggingface(Held(config, leaves), tmp_path / "out", options=options)
    reader = open_checkpoint(folder)
    stated = json.loads((folder / "config.json").read_text())
    # A centred matrix is computed in float32, a router is taken as it is.
    kernels = (
        "target/decoder/layers_0/self_attention/out/kernel",
        ("target/decoder/layers_0/mlp/router/router_weights/w/kernel"),
    )
    found = [reader.specs()[name].dtype.name for name in kernels]
    assert found == (["float32", "bfloat16"] if dtype is None else [dtype, dtype])
    assert {stated["dtype"], stated["torch_dtype"]} == {dtype or "float32"}
    if dtype != "float16":
        value = reader.read(kernels[1])
        expected = leaves[kernels[1].removeprefix("target/")]
        np.testing.assert_array_equal(value.view(np.uint16), expected.view(np.uint16))
