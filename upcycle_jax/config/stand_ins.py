"""The configuration of a training run that is only looked at: what the run itself would need may
stay open.
"""

from upcycle_jax.config.build import Config, load
from upcycle_jax.config.flags import Flags

STAND_INS = {
    "MODEL_DIR": "none",
    "MIXTURE_OR_TASK_NAME": "none",
    "TRAIN_STEPS": 1_000_000,
    "INITIAL_CHECKPOINT_PATH": "none",
}
"""Macros that are needed to build a run, and of no consequence for its programs."""
_OF_IMAGES = {"MIXTURE_OR_TASK_NAME": "glyphs"}
"""The same of runs on images, which know tasks by name."""


def stand_ins(loaded: Config) -> list[str]:
    """Bindings of those macros that the files ask for and nothing sets."""
    macros = loaded.bindings.macros
    values = STAND_INS | (_OF_IMAGES if "IMAGE_ARRAYS" in macros else {})
    return [
        f"{name}={value!r}"
        for name, value in values.items()
        if name in macros and not loaded.has_macro(name)
    ]


def load_with_stand_ins(flags: Flags, loaded: Config) -> Config:
    """What a command has loaded, with `stand_ins`."""
    bindings = (*flags.gin_bindings, *stand_ins(loaded))
    return load(flags.gin_file, bindings, flags.gin_search_paths)
