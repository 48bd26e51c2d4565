"""A disk that fills while something is written is one line that says what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator

from upcycle_jax.checkpoints.storage import storage_errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(ValueError):
    """There is no room for what must be written."""


@contextlib.contextmanager
def explained(what: str, *, kept: str) -> Iterator[None]:
    """Turns errors of a full disk, however deep inside other libraries, into a `DiskFullError`.

    Args:
      what: what is written to, e.g. 'MODEL_DIR /data/run'.
      kept: what is not lost, e.g. 'Finished checkpoints are whole'.
    """
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        if reason is None or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            f"{what}: writing failed, {reason}. {kept}: make room, then run the same command to go"
            " on"
        ) from error


def reason_of(error: BaseException | None) -> str | None:
    """In words why the disk takes no more, where that is what the error or one of its causes says;
    else None.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        code = error.errno if isinstance(error, OSError) else storage_errno(str(error))
        if code in _FULL:
            name = getattr(error, "filename", None)
            return os.strerror(code) + (f" ({name})" if isinstance(name, str) else "")
        error = error.__cause__ or error.__context__
    return None
