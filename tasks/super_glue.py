"""SuperGLUE as the paper fine-tunes on it: T5's text-to-text tasks in one mixture, in proportion to
their sizes.

Imports the package `t5`, which registers `super_glue_v102_proportional` (with WSC in T5's simple
form and DPR) and its tasks, `super_glue_<name>_v102`, with SuperGLUE's own metrics. The paper: 200k
steps, batch 128, 512 inputs and 62 targets. Data come from TFDS.
"""

import importlib

try:
    importlib.import_module("t5.data.mixtures")
except ImportError as error:
    raise ImportError(
        f"SuperGLUE's tasks come from the package t5 ({error}): pip install 'upcycle_jax[t5]'"
    ) from error

MIXTURE = "super_glue_v102_proportional"
