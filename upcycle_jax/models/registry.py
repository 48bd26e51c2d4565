"""The families of models: what has to be known of one before there is a model of it. Everything
else is asked of the model (`base.Model`).

A family of the library stands in `_FAMILIES`; one of your own calls `register` where it is
imported, e.g. by an `import` line of a gin file.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from upcycle_jax.models.base import Family, Model, ModelConfig
from upcycle_jax.models.config_json import from_json
from upcycle_jax.models.decoder.family import DECODER
from upcycle_jax.models.t5.family import T5
from upcycle_jax.models.vit.family import VIT
from upcycle_jax.moe import routing
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.trees import LeafSpec

_FAMILIES: list[Family] = [T5, DECODER, VIT]

ROUTERS: tuple[type, ...] = tuple(
    kind
    for kind in vars(routing).values()
    if inspect.isclass(kind) and issubclass(kind, routing.Router) and not inspect.isabstract(kind)
)
"""Every router that a model may have."""


def register(family: Family) -> None:
    """Adds a family, or replaces the one of that name."""
    _FAMILIES[:] = [*(one for one in _FAMILIES if one.name != family.name), family]


def config_parts() -> tuple[type, ...]:
    """Every class that the configuration of a model is made of."""
    parts = ((one.config, one.moe, *one.parts) for one in _FAMILIES)
    return (*itertools.chain.from_iterable(parts), *ROUTERS)


def config_from_json(value: Any) -> Any:
    """The configuration that `config_json.to_json` made.

    Raises:
      ValueError: it has parts or fields that this version does not know.
    """
    return from_json(value, config_parts(), "the recorded model")


def states_model(config: object) -> bool:
    """Whether checkpoints of such a model state its whole configuration."""
    return any(family.states_model and isinstance(config, family.config) for family in _FAMILIES)


def known_settings() -> dict[str, Any]:
    """By name, whether a value is one of that setting of a forward pass
    (`ModelConfig.forward_settings`).
    """
    return {name: check for family in _FAMILIES for name, check in family.settings.items()}


def build(config: object) -> Model:
    """The model of a recorded configuration, with its family's usual loss.

    Raises:
      ValueError: it is no model's configuration.
    """
    for family in _FAMILIES:
        if isinstance(config, family.config):
            return family.build(config)
    known = " or ".join(family.config.__name__ for family in _FAMILIES)
    raise ValueError(f"the recorded model is {type(config).__name__}, no {known}")


def infer_dense(specs: Mapping[str, LeafSpec], stated: Mapping[str, Any]) -> Any:
    """The configuration of the dense model that a checkpoint holds; arguments as for `infer`.

    Raises:
      ValueError: the leaves are no family's, or damaged.
    """
    for family in _FAMILIES:
        dense = family.from_specs(specs, stated)
        if dense is not None:
            return dense
    known = " or ".join(f"a dense {family.name}" for family in _FAMILIES)
    raise ValueError(f"the leaves are not those of {known}: name the model's file with --gin_file")


def with_moe(config: ModelConfig, moe: MoeSettings | None = None, **changes: Any) -> Model:
    """The model of a configuration with other MoE layers, and its family's usual loss.

    Args:
      config: of a model.
      moe: in place of its own; None for its own.
      **changes: settings of them, by name.
    """
    layers = config.moe if moe is None else moe
    assert layers is not None  # There is something to change.
    other = dataclasses.replace(layers, **changes)
    return build(dataclasses.replace(config, moe=other))  # type: ignore[type-var]


def infer(
    specs: Mapping[str, LeafSpec], stated: Mapping[str, Any], moe: MoeSettings | None = None
) -> Model:
    """The sparse model that a dense checkpoint becomes.

    Args:
      specs: of every leaf of the checkpoint, by full path.
      stated: the settings of the forward pass that it states.
      moe: the MoE layers; None: the defaults of the family whose leaves these are.

    Raises:
      ValueError: the leaves are no family's, or damaged, or the MoE layers are another family's.
    """
    for family in _FAMILIES:
        dense = family.from_specs(specs, stated)
        if dense is None:
            continue
        layers = family.moe() if moe is None else moe
        if not isinstance(layers, family.moe):
            raise ValueError(
                f"the source is a {family.name}, whose MoE layers are a {family.moe.__name__}, got"
                f" {type(layers).__name__}"
            )
        return family.build(dataclasses.replace(dense, moe=layers))
    known = " or ".join(f"a dense {family.name}" for family in _FAMILIES)
    raise ValueError(
        f"the source's leaves are not those of {known}, so its model cannot be inferred: name a"
        " model file, --gin_file=models/t5_1_1_<size>_upcycled.gin"
    )
