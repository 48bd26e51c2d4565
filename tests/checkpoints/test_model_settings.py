"""What checkpoints state of their models: whole language models, and settings alone of others."""

import dataclasses
import json

import pytest

from tests.checkpoints.random_decoders import FAMILIES
from upcycle_jax.checkpoints import model_settings
from upcycle_jax.models.config_json import to_json
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.moe.routing import LossFreeTopK, TokensChoose


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_language_model_is_stated_whole(model_type):
    config = FAMILIES[model_type]
    record = json.loads(json.dumps(model_settings.record_config(config)))
    assert model_settings.recorded_config(record, where="here") == config


@pytest.mark.parametrize(
    "router", [TokensChoose(num_selected_experts=3), LossFreeTopK(update_rate=0.25)]
)
def test_every_router_is_stated(router):
    config = FAMILIES["mixtral"]
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))
    record = json.loads(json.dumps(model_settings.record_config(config)))
    assert model_settings.recorded_config(record, where="here") == config


def test_t5_states_its_settings_alone():
    config = T5Config(64, 8, 2, 2, 2, 4, 16, moe=MoeConfig())
    assert model_settings.record_config(config) == {}
    assert model_settings.record_config(None) == {}
    # The model of a conversion of T5 is for its proof.
    record = {"model": to_json(config)}
    assert model_settings.recorded_config(record, where="here") is None


@pytest.mark.parametrize(
    "model",
    [
        {"type": "DecoderConfig", "vocab_size": 8},
        {"type": "DecoderConfig", "sense": 3},
        {"type": "Telepathy"},
        {"type": ["DecoderConfig"]},
    ],
)
def test_a_record_of_no_model_is_an_error(model):
    with pytest.raises(ValueError, match="^here: the recorded model"):
        model_settings.recorded_config({"model": model}, where="here")


@pytest.mark.parametrize("model", [None, 3, "DecoderConfig", [], {}])
def test_a_record_without_a_model(model):
    assert model_settings.recorded_config({"model": model}, where="here") is None
