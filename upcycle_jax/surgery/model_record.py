"""A model's configuration as JSON and back: what a converted checkpoint records, so that it can be
proved without a model file.
"""

from typing import Any

from upcycle_jax.models import registry
from upcycle_jax.models.base import Model
from upcycle_jax.models.config_json import to_json


def model_to_json(model: Model) -> Any:
    """The configuration of a model as plain JSON."""
    return to_json(model.config)


def model_from_json(value: Any, *, max_layers: int | None = None) -> Model:
    """The model of a recorded configuration, with its family's usual loss.

    Args:
      value: what `model_to_json` gave.
      max_layers: refuse a deeper model; None: trust the record.

    Raises:
      ValueError: it has parts or fields that this version does not know, or more layers.
    """
    config = registry.config_from_json(value)
    model = registry.build(config)
    depths = [stack.num_layers for stack in model.stacks.values()]
    if max_layers is not None and sum(depths) > max_layers:
        raise ValueError(
            f"the recorded model has {' + '.join(map(str, depths))} layers, more than the"
            f" checkpoint's {max_layers} leaves can be"
        )
    return model
