"""Recipes as JSON and back: what a converted checkpoint records about itself."""

from typing import Any

from upcycle_jax.models import config_json
from upcycle_jax.models.config_json import to_json
from upcycle_jax.surgery.recipe import PARTS

__all__ = ["from_json", "to_json"]


def from_json(value: Any) -> Any:
    """The recipe, or part of one, that `to_json` made.

    Raises:
      ValueError: see `config_json.from_json`.
    """
    return config_json.from_json(value, PARTS, "the recipe")
