"""Every family of decoder-only models, written and loaded by transformers."""

import json

import numpy as np
import pytest
from random_decoders import FAMILIES, Held, our_logits, their_logits

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
