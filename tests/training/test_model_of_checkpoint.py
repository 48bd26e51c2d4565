"""The model that a run trains where no model file gives one."""

import dataclasses
import json

import numpy as np
import pytest

from upcycle_jax import state_tree
from upcycle_jax.checkpoints import create_checkpoint, model_settings
from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.surgery import MergeRecipe, Recipe
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.training.model_of_checkpoint import model_of_checkpoint

DENSE = DecoderConfig(
    vocab_size=12,
    emb_dim=4,
    num_layers=2,
    num_heads=2,
    head_dim=2,
    num_kv_heads=2,
    mlp_dim=6,
    qk_norm="head",
    norm_epsilon=1e-6,
)
SPARSE = dataclasses.replace(DENSE, moe=DecoderMoeConfig(num_experts=2))


def save(model, path, record=None):
    """A checkpoint of a model's zeros, with what runs and conversions record of it."""
    specs = state_tree.specs(model.param_specs(), {})
    stated = model_settings.record(model.config.forward_settings)
    with create_checkpoint(path, specs, step=3, metadata=stated | (record or {})) as writer:
        for name, spec in specs.items():
            if name.startswith(state_tree.TARGET):
                writer.write(name, None, np.zeros(spec.shape, spec.dtype))
        writer.finalize()
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save(DecoderModel(DENSE), tmp_path_factory.mktemp("dense") / "checkpoint_3")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """As a conversion leaves it."""
    path = tmp_path_factory.mktemp("sparse") / "checkpoint_3"
    return save(DecoderModel(SPARSE), path, {"model": to_json(SPARSE)})


def test_a_dense_checkpoint_is_its_own_model(dense):
    assert model_of_checkpoint(dense) == DecoderModel(DENSE)
    given = model_of_checkpoint(
        [dense],
        features=DecoderOnlyFeatures(bos_id=7),
        dtype="bfloat16",
        remat_policy="full",
        scan_layers=True,
        dropout_rate=0.1,
        z_loss=1e-4,
        loss_normalizing_factor=None,
    )
    config = dataclasses.replace(
        DENSE, dtype="bfloat16", remat_policy="full", scan_layers=True, dropout_rate=0.1
    )
    assert given == DecoderModel(
        config,
        features=DecoderOnlyFeatures(bos_id=7),
        z_loss=1e-4,
        loss_normalizing_factor=None,
    )


def test_a_recipe_gives_it_experts(dense):
    assert model_of_checkpoint(dense, recipe=Recipe()).config.moe == DecoderMoeConfig()
    few = model_of_checkpoint(dense, recipe=Recipe(), moe=SPARSE.moe)
    assert few == DecoderModel(SPARSE)


def test_a_converted_checkpoint_states_its_experts(sparse):
    assert model_of_checkpoint(sparse) == DecoderModel(SPARSE)
    assert model_of_checkpoint(sparse, recipe=MergeRecipe()) == DecoderModel(DENSE)
    other = DecoderMoeConfig(num_experts=2, aux_loss_factor=0.5)
    assert model_of_checkpoint(sparse, moe=other).config.moe == other


def test_the_manifest_of_a_run_states_them(tmp_path):
    path = save(DecoderModel(SPARSE), tmp_path / "run" / "checkpoint_3")
    with pytest.raises(ValueError, match="has experts, and neither a record in it nor a manifest"):
        model_of_checkpoint(path)
    manifest = {"model": to_json(SPARSE)}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert model_of_checkpoint(path) == DecoderModel(SPARSE)
    assert model_of_checkpoint(str(tmp_path / "run")) == DecoderModel(SPARSE)


def test_an_encoder_decoder_is_read_too(tmp_path):
    config = T5Config(
        vocab_size=12,
        emb_dim=4,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=2,
        mlp_dim=6,
    )
    path = save(EncoderDecoderModel(config), tmp_path / "checkpoint_3")
    found = model_of_checkpoint(path, dropout_rate=config.dropout_rate)
    assert isinstance(found, EncoderDecoderModel)
    assert found.param_specs() == EncoderDecoderModel(config).param_specs()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no checkpoint"):
        model_of_checkpoint([])
    with pytest.raises(FileNotFoundError):
        model_of_checkpoint(str(tmp_path / "nothing"))
