"""A folder that one run at a time writes to: process 0 holds its lease, the others follow."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from upcycle_jax import distributed, leases


class Hold:
    """The right to write, as one process of a run has it: only process 0 can find it lost; where it
    stops the others do.
    """

    def __init__(self, lease: leases.Lease | None):
        self._lease = lease

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken over."""
        return self._lease is not None and self._lease.is_lost

    def require(self, *, look: bool = False) -> None:
        """Raises a `LeaseLostError` where another run has taken over (see `Lease.require`)."""
        if self._lease is not None:
            self._lease.require(look=look)


@contextlib.contextmanager
def hold(file: os.PathLike | str, *, what: str, remedy: str) -> Iterator[Hold]:
    """Holds a lease while entered, one for all processes of the run; the arguments are those of
    `leases.hold`.

    Raises:
      ValueError: another run that lives holds it (`leases.InUseError`), or the folder cannot be
        written to; in every process.
    """
    with contextlib.ExitStack() as stack:
        context = leases.hold(file, what=what, remedy=remedy)
        lease = distributed.first_decides(f"lease of {what}", lambda: stack.enter_context(context))
        yield Hold(lease)


def hold_model_dir(model_dir: os.PathLike | str) -> contextlib.AbstractContextManager[Hold]:
    """The lease of a training in MODEL_DIR."""
    return hold(
        epath.Path(model_dir) / leases.TRAINING_LEASE,
        what=f"MODEL_DIR {model_dir}",
        remedy="choose another folder",
    )


def training_in(model_dir: os.PathLike | str) -> str | None:
    """Looks whether a training in MODEL_DIR would be refused; writes nothing.

    Returns:
      What is known of a holder that may be dead, or None.

    Raises:
      ValueError: a training that lives holds it (`leases.InUseError`).
    """
    return leases.refuse_if_held(
        epath.Path(model_dir) / leases.TRAINING_LEASE,
        what=f"MODEL_DIR {model_dir}",
        remedy="choose another folder",
    )


def hold_results(
    folder: os.PathLike | str, name: str, *, setting: str
) -> contextlib.AbstractContextManager[Hold]:
    """The lease of what a call writes under a name in a folder that others write to as well.

    Args:
      folder: where.
      name: of the results, e.g. '<task>-<mode>-<part>'.
      setting: the setting that names the folder, for messages.
    """
    return hold(_results_file(folder, name), **_results(folder, name, setting))


def refuse_if_results_held(folder: os.PathLike | str, name: str, *, setting: str) -> None:
    """Raises a ValueError, in every process, where `hold_results` would find a holder that
    lives; writes nothing.
    """
    file, words = _results_file(folder, name), _results(folder, name, setting)
    distributed.first_decides(
        f"look at the lease of {name}", lambda: leases.refuse_if_held(file, **words)
    )


def _results_file(folder: os.PathLike | str, name: str) -> epath.Path:
    return epath.Path(folder) / f".{name.replace('/', '_')}.lease.json"


def _results(folder: os.PathLike | str, name: str, setting: str) -> dict[str, str]:
    return {"what": f"{name} in {folder}", "remedy": f"choose another {setting}"}
