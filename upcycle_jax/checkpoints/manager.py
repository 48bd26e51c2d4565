"""Saves and restores the checkpoints of a training run through Orbax, in T5X's layout. The only
module that imports orbax.
"""

import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from upcycle_jax import trees
from upcycle_jax.checkpoints import storage, verification
from upcycle_jax.checkpoints.formats import ORBAX_TEMPORARY
from upcycle_jax.checkpoints.orbax_metadata import STATE_ITEM
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader, find_item
from upcycle_jax.checkpoints.reader import METADATA_KEY
from upcycle_jax.checkpoints.verification import DamagedCheckpointError, SavedContent
from upcycle_jax.step_names import step_name, step_of
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import PyTree

DATASET_ITEM = "dataset"
COMMIT_MARK = "commit_success.txt"


_ORBAX = pathlib.PurePath(ocp.__file__).parent


def _is_news(record: logging.LogRecord) -> bool:
    """Not so for the errors that Orbax logs, some with one traceback a thread, when a save in the
    background fails: the next call of the manager raises them again, and one place reports them.
    """
    return not (record.exc_info and _ORBAX in pathlib.PurePath(record.pathname).parents)


def _without_abandoned_work(previous: Any) -> Any:
    """A hook that is silent about what Orbax leaves behind where one of its many reads or writes
    has failed: coroutines that nobody awaits any more, and writes of TensorStore that end after
    their event loop was closed. The first failure is raised and reported; these would be hundreds
    of tracebacks behind it.
    """

    def hook(unraisable: Any) -> None:
        error, code = unraisable.exc_value, getattr(unraisable.object, "cr_code", None)
        loop_closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        of_orbax = code is not None and _ORBAX in pathlib.PurePath(code.co_filename).parents
        if not loop_closed and not of_orbax:
            previous(unraisable)

    return hook


logging.getLogger("absl").addFilter(_is_news)
sys.unraisablehook = _without_abandoned_work(sys.unraisablehook)


class Saveable(Protocol):
    """A data iterator whose position can be saved and restored."""

    def save(self, directory: epath.Path) -> None: ...

    def restore(self, directory: epath.Path) -> None: ...


class DatasetHandler(ocp.CheckpointHandler):
    """Lets each process save its data iterator in a folder of its own:
    `dataset/process_<i>-of-<n>`, beside the digests of its files.
    """

    def save(self, directory: epath.Path, args: "SaveDataset") -> None:
        folder = process_folder(directory)
        folder.mkdir(parents=True, exist_ok=True)
        args.item.save(folder)
        verification.write_digests(folder, args.metadata)

    def restore(self, directory: epath.Path, args: "RestoreDataset") -> None:
        args.item.restore(process_folder(directory))


@ocp.args.register_with_handler(DatasetHandler, for_save=True)
@dataclasses.dataclass
class SaveDataset(ocp.args.CheckpointArgs):
    """The iterator to save, and the custom metadata of the checkpoint."""

    item: Saveable
    metadata: Mapping[str, Any]


@ocp.args.register_with_handler(DatasetHandler, for_restore=True)
@dataclasses.dataclass
class RestoreDataset(ocp.args.CheckpointArgs):
    """The iterator to restore into."""

    item: Saveable


def _remove_stale(model_dir: epath.Path) -> None:
    """Removes what saves that never finished have left: temporary folders; in a bucket, steps
    without Orbax's marker file.
    """
    if not model_dir.is_dir():
        return
    in_bucket = not storage.is_local(model_dir)
    for child in model_dir.iterdir():
        # T5X's older formats have no marker; their index file is written last.
        unmarked = (
            in_bucket
            and step_of(child.name) is not None
            and not any((child / mark).exists() for mark in (COMMIT_MARK, "checkpoint"))
        )
        name, temporary, _ = child.name.partition(ORBAX_TEMPORARY)
        if unmarked or (temporary and step_of(name) is not None):
            child.rmtree()


def process_folder(directory: epath.Path) -> epath.Path:
    """This process's folder in the dataset item, named as T5X names it."""
    return epath.Path(directory) / f"process_{jax.process_index()}-of-{jax.process_count()}"


def saved_process_folder(directory: epath.Path) -> epath.Path:
    """Where this process finds its data position in the dataset item: its own folder, or one that
    another number of processes saved.

    Positions count global batches, so every process's is as good; whether the data can go on from
    it is up to the iterator.

    Raises:
      FileNotFoundError: no process saved one.
    """
    own = process_folder(directory)
    if own.exists():
        return own
    others = sorted(
        folder
        for folder in epath.Path(directory).glob("process_*-of-*")
        if not folder.name.endswith(f"-of-{jax.process_count()}")
    )
    if not others:
        raise FileNotFoundError(
            f"{own} does not exist: the checkpoint was saved without its data iterator"
        )
    return others[0]


class CheckpointManager:
    """The checkpoints of one MODEL_DIR:
    `checkpoint_<step>/{state,dataset,_CHECKPOINT_METADATA,commit_success.txt}`.

    A save copies the arrays to the host and writes them in the background. It is renamed into place
    when complete, so a run that is killed leaves the earlier steps and a temporary folder, which
    the next manager removes.

    Args:
      model_dir: the run's folder; made if it is missing.
      keep: how many of the latest checkpoints to keep; None keeps all.
      keep_period: steps that are multiples of this are kept beyond `keep`.
      async_save: write in the background; False returns when the checkpoint is complete.
      read_only: never create, clean or delete anything.
    """

    def __init__(
        self,
        model_dir: os.PathLike | str,
        *,
        keep: int | None = None,
        keep_period: int | None = None,
        async_save: bool = True,
        read_only: bool = False,
    ):
        if keep is not None and keep < 1:
            raise ValueError(
                f"keep={keep}: at least the latest checkpoint must be kept; use None to keep all"
            )
        if keep_period is not None and keep_period < 1:
            raise ValueError(f"keep_period={keep_period} must be positive; use None for none")
        self.model_dir = storage.absolute(model_dir)
        if not read_only and jax.process_index() == 0:
            _remove_stale(self.model_dir)
        policies = ocp.checkpoint_managers.preservation_policy
        preserve: Any = policies.PreserveAll() if keep is None else policies.LatestN(n=keep)
        if keep is not None and keep_period is not None:
            preserve = policies.AnyPreservationPolicy(
                [preserve, policies.EveryNSteps(interval_steps=keep_period)]
            )
        options = ocp.CheckpointManagerOptions(
            step_prefix="checkpoint",
            create=not read_only,
            # `_remove_stale` did it: Orbax would take any folder of a bucket for a stale save.
            cleanup_tmp_directories=False,
            read_only=read_only,
            enable_async_checkpointing=async_save,
            preservation_policy=preserve,
            # The dataset handler writes at once, so the folder must exist by then.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(
            self.model_dir, options=options, item_names=(STATE_ITEM, DATASET_ITEM)
        )

    def all_steps(self) -> list[int]:
        """The steps of the finished checkpoints, in order; a save under way or cut short does not
        count.
        """
        return sorted(step for step in self._manager.all_steps() if self.path(step).exists())

    def latest_step(self) -> int | None:
        """The highest finished step, or None."""
        return max(self.all_steps(), default=None)

    def path(self, step: int) -> epath.Path:
        """The folder of a step."""
        return self.model_dir / step_name(step)

    def save(
        self,
        step: int,
        state_dict: PyTree,
        *,
        dataset: Saveable | None = None,
        metadata: Mapping[str, Any] | None = None,
        checksums: Mapping[str, str] | None = None,
    ) -> None:
        """Starts saving; the arrays may be donated or changed as soon as it returns.

        Args:
          step: training step.
          state_dict: `{'target': params, 'state': {'step': ..., 'param_states': ...}}`, nested, of
            jax or NumPy arrays.
          dataset: iterator with `save(directory)`; it is saved before this returns, so its position
            belongs to this step.
          metadata: JSON-serialisable record, kept in `_CHECKPOINT_METADATA` and returned by
            `CheckpointReader.metadata`.
          checksums: of every leaf of `state_dict` by full path, kept for `Verification`.

        Raises:
          ValueError: the step is not above the latest one in MODEL_DIR.
        """
        latest = self._manager.latest_step()  # The one under way included.
        if latest is not None and step <= latest:
            raise ValueError(
                f"cannot save step {step} in {self.model_dir}: it holds step {latest} already. Use"
                " another MODEL_DIR or remove later steps"
            )
        items: dict[str, Any] = {STATE_ITEM: ocp.args.PyTreeSave(state_dict)}
        custom = verification.saved_metadata(
            metadata or {}, checksums, has_dataset=dataset is not None
        )
        if dataset is not None:
            items[DATASET_ITEM] = SaveDataset(dataset, custom)
        if not self._manager.save(
            step, args=ocp.args.Composite(**items), custom_metadata=custom or None, force=True
        ):
            raise ValueError(
                f"Orbax refused to save step {step} in {self.model_dir}; its log says why"
            )

    def restore(
        self,
        step: int,
        specs: Mapping[str, LeafSpec],
        shardings: Mapping[str, jax.sharding.Sharding],
        *,
        ignored: Collection[str] = (),
    ) -> dict[str, Any]:
        """Restores a step; every process reads its own shards.

        Args:
          step: a finished step.
          specs: every leaf that the run needs, by full path.
          shardings: where each leaf goes, by the same names.
          ignored: leaves of the checkpoint that are not read, by full path.

        Returns:
          The nested state dict of jax arrays in the dtypes of `specs`.

        Raises:
          FileNotFoundError: no such step.
          ValueError: leaves are missing, superfluous or of another shape; both sides are shown.
        """
        path = self._existing(step)
        item = find_item(path)
        if item is None:
            raise ValueError(
                f"{path} holds no array tree: it is damaged or half-copied. Remove it to go on from"
                " an earlier step"
            )
        reader = OrbaxReader(path, item)
        stored = {name: spec for name, spec in reader.specs().items() if name not in ignored}
        difference = trees.diff(specs, stored)
        if difference:
            raise ValueError(
                f"the run's state and {path} do not match:\n{difference}\nRestore with the model"
                " and optimizer that saved it, or convert it"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
            for name, spec in specs.items()
        }
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                sharding=shardings[name], global_shape=spec.shape, dtype=spec.dtype
            )
            for name, spec in specs.items()
        }
        args = ocp.args.PyTreeRestore(
            item=trees.unflatten(wanted),
            restore_args=trees.unflatten(restore_args),
            partial_restore=bool(ignored),
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args))[STATE_ITEM]

    def restore_dataset(self, step: int, dataset: Saveable, *, verify: bool = True) -> None:
        """Calls `dataset.restore` with the folder that this process saved (see
        `saved_process_folder`).

        Args:
          step: a finished step.
          dataset: iterator with `restore(directory)`.
          verify: compare its files with the digests that were saved with them.

        Raises:
          FileNotFoundError: no such step, or it was saved without the iterator.
          DamagedCheckpointError: what the iterator saved is damaged or gone.
        """
        path = self._existing(step)
        directory = path / DATASET_ITEM
        try:
            folder = saved_process_folder(directory)
        except FileNotFoundError as error:
            saved = SavedContent.at(path) if verify else None
            if saved is not None and saved.has_dataset:
                raise DamagedCheckpointError(
                    f"{directory} is damaged: it was saved, and holds no data position"
                ) from error
            raise FileNotFoundError(
                f"{directory}: step {step} was saved without its data iterator. Restart the data"
                " from the beginning or from a batch number instead"
            ) from error
        if verify:
            verification.check_digests(folder, path)
        dataset.restore(folder)

    def metadata(self, step: int) -> dict[str, Any]:
        """The record that was saved with a step."""
        custom = self._manager.metadata(self._existing_step(step)).custom_metadata or {}
        return dict(custom.get(METADATA_KEY, {}))

    def wait(self) -> None:
        """Returns when the save under way is complete; raises what it raised."""
        self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what a save in the background has failed with, if one has; waits for nothing."""
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the save under way and frees the background threads."""
        self._manager.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _existing_step(self, step: int) -> int:
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"{self.model_dir} has no finished checkpoint of step {step}; it has"
                f" {self.all_steps() or 'none'}"
            )
        return step

    def _existing(self, step: int) -> epath.Path:
        return self.path(self._existing_step(step))


def listing_error(path: epath.Path) -> Exception | None:
    """Why a `CheckpointManager` cannot be opened on a MODEL_DIR that holds this checkpoint, or
    None: Orbax looks at the metadata of every step, and fails where one is damaged.
    """
    try:
        _ = ocp.path.step.Metadata(step=0, path=path).commit_timestamp
    except Exception as error:  # of many types
        return error
    return None


def host_state(state_dict: PyTree) -> dict[str, np.ndarray]:
    """A nested state dict as flat host arrays, by full path: for comparisons and tests."""
    return {name: np.asarray(leaf) for name, leaf in trees.flatten(state_dict).items()}
