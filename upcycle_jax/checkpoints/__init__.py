"""Reading and writing checkpoints: Orbax in T5X's layout, T5X's older formats, and Hugging Face T5
folders.

`open_checkpoint` reads any of them through one interface, `create_checkpoint` writes an Orbax
checkpoint piece by piece under bounded memory, and `CheckpointManager` is what a training run saves
with. Only `manager` imports orbax; it is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from upcycle_jax.checkpoints.formats import open_checkpoint
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.steps import latest_checkpoint
from upcycle_jax.checkpoints.writer import CheckpointWriter, create_checkpoint

if TYPE_CHECKING:
    from upcycle_jax.checkpoints.manager import CheckpointManager

__all__ = [
    "CheckpointManager",
    "CheckpointReader",
    "CheckpointWriter",
    "create_checkpoint",
    "latest_checkpoint",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "CheckpointManager":
        from upcycle_jax.checkpoints.manager import (
            CheckpointManager,
        )  # Orbax takes more than a second to import.

        return CheckpointManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
