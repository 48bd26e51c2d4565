"""TensorFlow's import, without its lines about accelerators that it does not find: it reads data
here, and a machine without them is nothing to warn of.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_CHATTER = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|"
    rb"[IWE]\d{4} .*(?:oneDNN|cuda|cpu_feature_guard)|"
    rb"To enable the following instructions"
)
"""Lines that TensorFlow writes below Python's logging, before any setting of it could apply."""


def quietly() -> None:
    """Imports TensorFlow, and keeps it off accelerators: it would take their memory.

    Raises:
      ModuleNotFoundError: there is none.
    """
    loaded = "tensorflow" in sys.modules
    with contextlib.nullcontext() if loaded else _without_chatter():
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            # No such kind, or somebody has used TensorFlow before.
            with contextlib.suppress(RuntimeError, ValueError):
                tf.config.set_visible_devices([], kind)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Holds back what is written to the process's standard error, then writes it but for
    `_CHATTER`.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing to hold back
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            lines = [line for line in held.read().splitlines(True) if not _CHATTER.match(line)]
            os.write(2, b"".join(lines))
