"""Training and what checkpoints state of a model's forward pass: handed on by every checkpoint, and
compared with the run's model before anything is written.
"""

import dataclasses
import types

import numpy as np
import pytest

from upcycle_jax.checkpoints import create_checkpoint, model_settings
from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.training import loop
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.prepare import prepare
from upcycle_jax.training.restore import Source, Start
from upcycle_jax.training.train_settings import TrainSettings
from upcycle_jax.training.train_state import state_specs

CONFIG = T5Config(
    vocab_size=24,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=16,
    mlp_activations=("silu", "linear"),
    relative_attention_max_distance=20,
)


def write(folder, record):
    specs = state_specs(EncoderDecoderModel(CONFIG), Adafactor())
    with create_checkpoint(folder, specs, step=2, metadata=record) as writer:
        for name, spec in specs.items():
            if name != "state/step":
                writer.write(name, None, np.zeros(spec.shape, spec.dtype))
        writer.finalize()


@pytest.fixture
def prepared(bags, tmp_path):
    def make(config, *, restore=None):
        return prepare(
            TrainSettings(
                model=EncoderDecoderModel(config),
                model_dir=tmp_path / "run",
                train_dataset_cfg=bags.Dataset(batch_size=8),
                checkpoint_cfg=CheckpointConfig(
                    restore=restore and RestoreCheckpointConfig(path=str(restore)),
                    save=SaveCheckpointConfig(period=2),
                ),
                partitioner=bags.one_device,
                trainer=bags.trainer(optimizer=Adafactor()),
                total_steps=5,
            )
        )

    return make


@pytest.mark.parametrize("place", ["source/checkpoint_2", "run/checkpoint_2"])
def test_a_run_whose_model_contradicts_its_checkpoint_is_refused(prepared, tmp_path, place):
    """Continued from elsewhere, and resumed."""
    write(tmp_path / place, model_settings.record(CONFIG.forward_settings))
    restore = tmp_path / place if place.startswith("source") else None
    other = dataclasses.replace(CONFIG, mlp_activations=("gelu", "linear"))
    with pytest.raises(ValueError, match=r"states mlp_activations \('silu', 'linear'\)"):
        prepared(other, restore=restore)
    assert prepared(CONFIG, restore=restore).source.step == 2


def test_a_checkpoint_that_states_nothing_is_continued_with_any(prepared, tmp_path):
    write(tmp_path / "source" / "checkpoint_2", {})
    assert prepared(CONFIG, restore=tmp_path / "source" / "checkpoint_2").source.step == 2


def test_every_checkpoint_of_a_run_states_its_models_settings():
    run = types.SimpleNamespace(
        source=Source(Start.SCRATCH),
        settings=types.SimpleNamespace(
            model=EncoderDecoderModel(CONFIG),
            trainer=types.SimpleNamespace(counts_from_start=False),
        ),
    )
    record = loop._checkpoint_record(run)
    assert model_settings.recorded(record, where="") == CONFIG.forward_settings
    assert "model" not in record  # of T5; language models are stated whole
