"""Decoder-only language models as the registry of families has them."""

import functools
import typing
from typing import Any

from upcycle_jax import checks
from upcycle_jax.layers.mlp import are_activations
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.base import Family
from upcycle_jax.models.decoder.config import (
    STATED,
    STATED_ROPES,
    DecoderConfig,
    DecoderMoeConfig,
)
from upcycle_jax.models.decoder.from_specs import from_specs
from upcycle_jax.models.decoder.model import DecoderModel

_HINTS = typing.get_type_hints(DecoderConfig, include_extras=True)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value out of a file is one of a field of `DecoderConfig`."""
    value = tuple(value) if isinstance(value, list) else value
    return checks.problem(value, _HINTS[name]) is None


def _is_rope(value: Any) -> bool:
    if value is None:
        return True
    try:
        Rope(**value)
    except (TypeError, ValueError):
        return False
    return True


DECODER = Family(
    name="decoder-only language model",
    config=DecoderConfig,
    moe=DecoderMoeConfig,
    build=DecoderModel,
    from_specs=from_specs,
    settings={
        **{name: functools.partial(_is_setting, name) for name in STATED},
        "mlp_activations": are_activations,
        **dict.fromkeys(STATED_ROPES, _is_rope),
    },
    parts=(Rope,),
    states_model=True,
)
