"""Configuration: the only room that imports gin. It finds, parses, checks and resolves gin files
into plain objects.

    loaded = config.load(["models/t5_1_1_base.gin", "runs/pretrain.gin"], ["TRAIN_STEPS=10"])
    run = loaded.build("train")()    # Train(model=..., ...): plain objects, nothing of gin
    model = loaded.macro("MODEL")
    loaded.operative_text()          # what was used, as gin text

Commands are written with `upcycle_jax.config.command`.
"""

from upcycle_jax.config.build import Config, load
from upcycle_jax.config.parse import ConfigError

__all__ = ["Config", "ConfigError", "load"]
