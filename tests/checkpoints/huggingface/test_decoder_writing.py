"""Every family of decoder-only models, written and loaded by transformers."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.random_decoders import (
    ALL,
    FAMILIES,
    GEMMA,
    MIXED,
    UNIT,
    Held,
    of,
    our_logits,
    their_logits,
)
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.decoder.reading_back import differences
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.layers.rope import Rope

GATED = dataclasses.replace(UNIT, shared_expert_mlp_dim=16, shared_expert_gate=True)
YARN = Rope(
    kind="yarn",
    factor=4.0,
    original_length=32,
    attention_factor=1.3,
    beta_fast=20.0,
    truncate=False,
)


# What transformers makes of a folder of any type, decoder/test_reading.py compares with what is
# read of it, and each that is written here is read again bit for bit below.
IN_EVERY_RUN = ("gemma2", "mixtral", "olmo2", "qwen2_moe")


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow])
        for name in FAMILIES
    ],
)
def test_transformers_computes_the_same(model_type, tmp_path):
    held = Held(FAMILIES[model_type])
    folder = write_huggingface(
        held, tmp_path / "out", options=WritingOptions(model_type=model_type)
    )
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    ours, theirs = our_logits(held.config, held.leaves), their_logits(folder)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma2", of(GEMMA, norm_place="both")),
        ("smollm3", of(no_rope_layers=(0,), **MIXED)),
        ("qwen2_moe", of(moe=GATED, **ALL)),
        ("llama", of(rope=YARN)),
    ],
    ids=["gemma2 without windows", "smollm3 with some", "qwen2_moe with all", "a yarn of its own"],
)
def test_what_few_models_of_a_type_are(model_type, config, tmp_path):
    held = Held(config)
    options = WritingOptions(model_type=model_type)
    theirs = their_logits(write_huggingface(held, tmp_path / "out", options=options))
    np.testing.assert_allclose(our_logits(config, held.leaves), theirs, atol=1e-4)


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
