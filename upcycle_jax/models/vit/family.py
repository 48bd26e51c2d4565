"""Vision transformers as the registry of families has them."""

import functools
import typing
from typing import Any

from upcycle_jax import checks
from upcycle_jax.layers.mlp import are_activations
from upcycle_jax.models.base import Family
from upcycle_jax.models.vit.config import STATED, VitConfig, VitMoeConfig
from upcycle_jax.models.vit.from_specs import from_specs
from upcycle_jax.models.vit.model import VitModel

_HINTS = typing.get_type_hints(VitConfig, include_extras=True)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value out of a file is one of a field of `VitConfig`."""
    value = tuple(value) if isinstance(value, list) else value
    return checks.problem(value, _HINTS[name]) is None


VIT = Family(
    name="vision transformer",
    config=VitConfig,
    moe=VitMoeConfig,
    build=VitModel,
    from_specs=from_specs,
    settings={
        **{name: functools.partial(_is_setting, name) for name in STATED},
        "mlp_activations": are_activations,
    },
)
