"""A model's configuration as JSON and back: what a converted checkpoint records, so that it can be
proved without a model file.
"""

from typing import Any

from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe import routing
from upcycle_jax.surgery.recipe_json import from_json, to_json

PARTS = (
    T5Config,
    MoeConfig,
    routing.DroplessTopK,
    routing.ExpertsChoose,
    routing.HashTop1,
    routing.LossFreeTopK,
    routing.SigmoidTopK,
    routing.SoftMoe,
    routing.SwitchTop1,
    routing.TokensChoose,
)
"""Every class that a recorded model is made of."""


def model_to_json(model: EncoderDecoderModel) -> Any:
    """The configuration of a model as plain JSON."""
    return to_json(model.config)


def model_from_json(value: Any, *, max_layers: int | None = None) -> EncoderDecoderModel:
    """The model of a recorded configuration, with the paper's loss.

    Args:
      value: what `model_to_json` gave.
      max_layers: refuse a deeper model; None: trust the record.

    Raises:
      ValueError: it has parts or fields that this version does not know, or more layers.
    """
    config = from_json(value, PARTS, "the recorded model")
    if not isinstance(config, T5Config):
        raise ValueError(f"the recorded model is {type(config).__name__}, no T5Config")
    if (
        max_layers is not None
        and config.num_encoder_layers + config.num_decoder_layers > max_layers
    ):
        raise ValueError(
            f"the recorded model has {config.num_encoder_layers} + {config.num_decoder_layers}"
            f" layers, more than the checkpoint's {max_layers} leaves can be"
        )
    return EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
