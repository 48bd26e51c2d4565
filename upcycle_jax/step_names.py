"""How the checkpoint of a step is called in a MODEL_DIR: `checkpoint_<step>`, as in T5X."""

import re

_NAME = re.compile(r"checkpoint_([0-9]+)")


def step_name(step: int) -> str:
    """The name of a step's checkpoint.

    >>> step_name(12)
    'checkpoint_12'
    """
    return f"checkpoint_{step}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint by its name, zeros before it or not; None for any other name.

    >>> step_of("checkpoint_0012"), step_of("checkpoint_12.partial")
    (12, None)
    """
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None
