"""Sparse upcycling of dense checkpoints into Mixture-of-Experts models, in the shape of T5X.

From Python: `open_checkpoint`, `build_model`, `plan_conversion`, `plan_text`, `convert_checkpoint`,
`prove_conversion`, `load_params` and `save_params`; docs/python.md shows them at work. docs/api.md
lists them, and what gin files name.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from upcycle_jax.api import (
        CheckpointReader,
        Conversion,
        Model,
        Plan,
        Proof,
        Recipe,
        build_model,
        convert_checkpoint,
        load_params,
        open_checkpoint,
        plan_conversion,
        plan_text,
        prove_conversion,
        save_params,
    )

__all__ = [
    "CheckpointReader",
    "Conversion",
    "Model",
    "Plan",
    "Proof",
    "Recipe",
    "__version__",
    "build_model",
    "convert_checkpoint",
    "load_params",
    "open_checkpoint",
    "plan_conversion",
    "plan_text",
    "prove_conversion",
    "save_params",
]


def __getattr__(name: str) -> Any:
    # Commands import this package, and answer --help without jax: what needs it comes when asked.
    # No name here is a command's: importing that module would put it in the function's place.
    if name in __all__:
        return getattr(importlib.import_module("upcycle_jax.api"), name)
    raise AttributeError(f"module 'upcycle_jax' has no attribute {name!r}")
