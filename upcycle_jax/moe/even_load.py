"""Tracing MoE layers for counting what they do, not for running them."""

import contextlib
import contextvars
from collections.abc import Iterator

_ACTIVE = contextvars.ContextVar("even_load", default=False)


@contextlib.contextmanager
def even_load() -> Iterator[None]:
    """Models that are traced inside have programs whose every size is known: rows of dropless
    routers are as many as there are choices, and no expert is looped over.
    """
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_active() -> bool:
    """Whether this is inside `even_load`."""
    return _ACTIVE.get()
