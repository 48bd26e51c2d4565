"""T5 as the registry of families has it."""

from typing import Any

from upcycle_jax.layers.mlp import are_activations
from upcycle_jax.models.base import Family
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.from_specs import from_specs
from upcycle_jax.models.t5.model import EncoderDecoderModel


def _build(config: T5Config) -> EncoderDecoderModel:
    """With the loss of the sparse upcycling paper."""
    return EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_epsilon(value: Any) -> bool:
    return _is_number(value, float) and 0 < value < 1


def _is_distance(value: Any) -> bool:
    return _is_number(value, int) and value > 0


T5 = Family(
    name="T5 encoder-decoder",
    config=T5Config,
    moe=MoeConfig,
    build=_build,
    from_specs=from_specs,
    settings={
        "mlp_activations": are_activations,
        "layer_norm_epsilon": _is_epsilon,
        "relative_attention_max_distance": _is_distance,
    },
)
