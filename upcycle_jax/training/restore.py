"""Where a run starts: found out and checked before anything is written, then loaded.

Precedence, first that applies:
  1. resume: MODEL_DIR holds a finished checkpoint of this run. A recipe is never applied again.
  2. upcycle: `RestoreCheckpointConfig.path` with a recipe; the surgeon builds the state while it is
    read.
  3. continue: `RestoreCheckpointConfig.path` without a recipe; the trees must be equal.
  4. scratch.
"""

import dataclasses
import enum
import errno
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from upcycle_jax import axes, surgery, trees
from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.checkpoints.checksums import checksum
from upcycle_jax.checkpoints.loading import load_leaves
from upcycle_jax.checkpoints.manager import CheckpointManager, listing_error
from upcycle_jax.checkpoints.steps import check_name, step_folders
from upcycle_jax.checkpoints.verification import (
    DamagedCheckpointError,
    SavedContent,
    Verification,
    VerifiedReader,
    check_finite,
)
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.state_tree import PARAM_STATES, STEP, TARGET
from upcycle_jax.step_names import step_name
from upcycle_jax.text import shorten
from upcycle_jax.training import frozen_slots, manifest
from upcycle_jax.training.config import (
    CheckpointConfig,
    DataPosition,
    OptimizerState,
    RestoreCheckpointConfig,
    RestoreMode,
    StepPolicy,
)
from upcycle_jax.training.optimizers import Optimizer
from upcycle_jax.training.parameter_groups import ParameterGroup
from upcycle_jax.training.train_state import TrainState, from_state_dict, initial_state, model_hash
from upcycle_jax.trees import LeafSpec, Role

_log = logging.getLogger(__name__)

RECENT_LOSSES = "recent_losses"
"""Entry of a checkpoint's record: the losses that the next ones are compared with."""


class Start(enum.StrEnum):
    """How a run starts."""

    RESUME = "resume"
    UPCYCLE = "upcycle"
    CONTINUE = "continue"
    SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Source:
    """What a run starts from, decided and checked; nothing of it is loaded yet.

    Attributes:
      start: which of the four ways.
      step: the step of the state that `load` will give.
      data_position: where the training data begins.
      path: the checkpoint, or None from scratch.
      reader: its reader, or None from scratch.
      plan: of the conversion, for UPCYCLE.
      fresh_optimizer: CONTINUE with a new optimizer state.
      damaged: checkpoints of MODEL_DIR that cannot be read and are passed over, latest first.
      verify: compare with the checksums that were saved.
      fresh_slots: full paths of slots that start at zero beside others that are loaded: of
        parameters that are frozen for good now and were not, or the other way about.
    """

    start: Start
    step: int = 0
    data_position: DataPosition = DataPosition.STEP
    path: str | None = None
    reader: CheckpointReader | None = None
    plan: surgery.Plan | None = None
    fresh_optimizer: bool = False
    damaged: tuple[int, ...] = ()
    verify: bool = True
    fresh_slots: frozenset[str] = frozenset()

    def describe(self) -> str:
        """One line for the log and for `--dry_run`."""
        if self.start == Start.SCRATCH:
            return "from scratch, at step 0"
        what = {
            Start.RESUME: "resume from",
            Start.UPCYCLE: "upcycle",
            Start.CONTINUE: "continue from",
        }[self.start]
        fresh = ", with a fresh optimizer state" if self.fresh_optimizer else ""
        return (
            f"{what} {self.path}, at step {self.step}{fresh}{frozen_slots.told(self.fresh_slots)}"
        )

    def record(self) -> dict[str, Any]:
        """For the manifest and for the records of later checkpoints."""
        out: dict[str, Any] = {"start": str(self.start), "path": self.path, "step": self.step}
        if self.reader is not None and self.start != Start.RESUME:
            out["fingerprint"] = self.reader.fingerprint()
        return out


def find_source(
    model_dir: epath.PathLike,
    config: CheckpointConfig,
    specs: Mapping[str, LeafSpec],
    *,
    passed_over: Collection[int] = (),
) -> Source:
    """Decides where the run starts and checks that it fits; reads no arrays and writes nothing.

    Args:
      model_dir: the run's folder; it need not exist.
      config: what to restore.
      specs: specs of the run's whole state, from `state_specs`.
      passed_over: steps of MODEL_DIR that are known to be damaged.

    Raises:
      FileNotFoundError: the checkpoint to restore does not exist.
      ValueError: MODEL_DIR belongs to another model, the checkpoint is half-written or its tree
        does not fit.
    """
    model_dir = epath.Path(model_dir)
    check_owner(model_dir, specs)
    resumed = _resume(model_dir, specs, passed_over, verify=config.verify)
    # 1. Resume from the run's own latest checkpoint; whatever `config.restore` says was done when
    #   the run began.
    if resumed is not None:
        return resumed
    # 2. Upcycle: a path with a recipe.
    elif config.restore is not None and config.restore.recipe is not None:
        return _upcycle(config.restore, specs, verify=config.verify)
    # 3. Continue: a path without a recipe.
    elif config.restore is not None:
        return _continue(config.restore, specs, verify=config.verify)
    # 4. Scratch.
    else:
        return Source(Start.SCRATCH)


def check_owner(model_dir: epath.Path, specs: Mapping[str, LeafSpec]) -> None:
    """Raises a ValueError where the manifest in MODEL_DIR was written by a run of another model."""
    recorded = manifest.read(model_dir).get("model_hash")
    if recorded is not None and recorded != model_hash(_parameters(specs)):
        raise ValueError(
            f"{model_dir} belongs to a run of another model (its {manifest.MANIFEST_FILE} records"
            " other parameter names or shapes): choose another MODEL_DIR, or the model that it was"
            " started with"
        )


def _parameters(specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    return {
        path.removeprefix(TARGET): spec for path, spec in specs.items() if path.startswith(TARGET)
    }


def _resume(
    model_dir: epath.Path,
    specs: Mapping[str, LeafSpec],
    passed_over: Collection[int],
    *,
    verify: bool,
) -> Source | None:
    """The latest checkpoint of MODEL_DIR whose tree can be read, or None where there is none."""
    damaged = sorted(passed_over, reverse=True)
    folders = step_folders(model_dir)
    for step, path in folders.items():
        if path.name != step_name(step):
            raise ValueError(
                f"{path}: a run's own checkpoints are named without leading zeros. Rename it to"
                f" {step_name(step)} to resume from it, or choose another MODEL_DIR"
            )
    for step, path in reversed(folders.items()):
        if step not in damaged and (problem := listing_error(path)) is not None:
            warn_of_damage(path, problem)
            damaged.append(step)
    for step in reversed([step for step in folders if step not in damaged]):
        path = folders[step]
        try:
            reader = open_checkpoint(path)
            found = reader.specs()
            _check_records(reader, verify=verify)
        except Exception as error:
            if _is_no_damage(error):
                raise
            warn_of_damage(path, error)
            damaged.append(step)
            continue
        check_name(reader)
        fresh = frozen_slots.of_one_side(specs, found)
        difference = trees.diff(_but(specs, fresh), _but(found, fresh))
        if difference:
            raise ValueError(
                f"{model_dir} belongs to another model or optimizer: its {step_name(step)} (+) and"
                f" this run (-) differ:\n{_shortened(difference)}\nChoose another MODEL_DIR, or"
                " start this run with the model and optimizer that wrote it"
            )
        return Source(
            Start.RESUME,
            step=step,
            path=str(path),
            reader=reader,
            data_position=DataPosition.CHECKPOINT,
            damaged=tuple(damaged),
            verify=verify,
            fresh_slots=fresh,
        )
    if damaged:
        raise ValueError(
            f"no checkpoint in {model_dir} can be read (steps {', '.join(map(str, damaged))}): the"
            " log says why. Remove them to start the run again, or restore them from a copy"
        )
    return None


def _check_records(reader: CheckpointReader, *, verify: bool) -> None:
    """Reads what a checkpoint says of itself, and the step in it.

    Raises:
      Exception: of any kind, where one of them is damaged.
    """
    reader.model_settings()
    losses = reader.metadata().get(RECENT_LOSSES, [])
    if not all(isinstance(step, int) and isinstance(loss, float) for step, loss in losses):
        raise DamagedCheckpointError(f"{reader.path} has a damaged record: {RECENT_LOSSES}")
    saved = SavedContent.read(reader) if verify else None
    if STEP in reader.specs():
        step = reader.read(STEP)
        if saved is not None and saved.leaves.get(STEP) != checksum(step):
            raise DamagedCheckpointError(
                f"{reader.path}: the step in it, {step}, is not what was saved"
            )


def any_process(damaged: bool) -> bool:
    """Whether any process of the run has found damage: each reads other parts of a checkpoint."""
    if jax.process_count() == 1:
        return damaged
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(damaged))))


def warn_of_damage(path: epath.PathLike | None, error: Exception | str) -> None:
    """Says that a checkpoint of the run is passed over."""
    _log.warning("CHECKPOINT %s IS DAMAGED and is passed over: %s", path, error)


def _is_no_damage(error: Exception) -> bool:
    """Whether this machine lacks something, so that an earlier checkpoint would fail alike."""
    lacking = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in lacking)
        or "RESOURCE_EXHAUSTED" in str(error)
    )


def set_aside(model_dir: epath.PathLike, steps: Collection[int]) -> None:
    """Renames damaged checkpoints, so that the run can save those steps again and nothing restores
    them.
    """
    for step in steps:
        path = epath.Path(model_dir) / step_name(step)
        if jax.process_index() == 0 and path.exists():
            path.rename(path.parent / f"damaged_{path.name}_{time.time_ns()}")
            _log.warning("%s is kept as damaged_%s_*", path, path.name)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("damaged checkpoints set aside")


def _upcycle(
    restore: RestoreCheckpointConfig, specs: Mapping[str, LeafSpec], *, verify: bool
) -> Source:
    readers: list[Any] = [
        VerifiedReader(_open(path, restore.mode), checksums=verify) for path in restore.paths
    ]
    reader: Any = surgery.join(readers)
    plan = surgery.make_plan(reader.specs(), specs, restore.recipe)
    step = surgery.result_step(plan, reader)
    return Source(
        Start.UPCYCLE,
        step=step,
        path=str(reader.path),
        reader=reader,
        plan=plan,
        data_position=DataPosition(restore.data_position),
        verify=verify,
    )


def _continue(
    restore: RestoreCheckpointConfig, specs: Mapping[str, LeafSpec], *, verify: bool
) -> Source:
    reader = _open(restore.paths[0], restore.mode)
    found = reader.specs()
    has_optimizer = any(path.startswith(PARAM_STATES) for path in found)
    fresh = restore.optimizer_state == OptimizerState.RESET or not has_optimizer
    if not has_optimizer:
        _log.info("%s holds no optimizer state: the optimizer starts afresh", reader.path)
    of_frozen = frozenset() if fresh else frozen_slots.of_one_side(specs, found)
    expected, actual = (
        {
            path: spec
            for path, spec in _but(side, of_frozen).items()
            if path.startswith(TARGET) or (path.startswith(PARAM_STATES) and not fresh)
        }
        for side in (specs, found)
    )
    difference = trees.diff(expected, actual)
    if difference:
        raise ValueError(
            f"{reader.path} (+) does not fit the model of this run"
            f" (-):\n{_shortened(difference)}\n{_remedy(expected, actual)}"
        )
    step = 0 if restore.step == StepPolicy.RESET else reader.step
    return Source(
        Start.CONTINUE,
        step=step,
        path=str(reader.path),
        reader=reader,
        data_position=DataPosition(restore.data_position),
        fresh_optimizer=fresh,
        verify=verify,
        fresh_slots=of_frozen,
    )


def _but(specs: Mapping[str, LeafSpec], paths: Collection[str]) -> dict[str, LeafSpec]:
    return {path: spec for path, spec in specs.items() if path not in paths}


def _open(path: os.PathLike | str, mode: str) -> CheckpointReader:
    reader = open_checkpoint(path)
    if mode == RestoreMode.SPECIFIC and epath.Path(reader.path).name != epath.Path(path).name:
        raise ValueError(
            f"{path} is a folder of checkpoints, but the restore mode is 'specific': name one, e.g."
            f" {reader.path}"
        )
    check_name(reader)
    return reader


def _remedy(expected: Mapping[str, LeafSpec], actual: Mapping[str, LeafSpec]) -> str:
    want_experts, have_experts = (
        any(spec.role is Role.EXPERT for spec in side.values()) for side in (expected, actual)
    )
    if want_experts and not have_experts:
        return (
            "The checkpoint is dense and the model has experts: set RestoreCheckpointConfig.recipe"
            " = @Recipe() to upcycle it"
        )
    if have_experts and not want_experts:
        return (
            "The checkpoint has experts and the model has none: choose the upcycled model file, or"
            " merge the experts with a MergeRecipe"
        )
    if any(
        axes.POSITIONS in spec.axes and path in actual and actual[path].shape != spec.shape
        for path, spec in expected.items()
    ):
        return (
            "The checkpoint is of images of another size: set RestoreCheckpointConfig.recipe ="
            " @Recipe() with Recipe.position_interpolation = 'bilinear' (as big_vision and V-MoE)"
            " or 'bicubic' (Hugging Face), or IMAGE_SIZE to the checkpoint's"
        )
    parameters = [{path for path in side if path.startswith(TARGET)} for side in (expected, actual)]
    shapes_agree = parameters[0] == parameters[1] and all(
        expected[path].shape == actual[path].shape for path in parameters[0]
    )
    if shapes_agree:
        return (
            "Only the optimizer state differs: set RestoreCheckpointConfig.optimizer_state ="
            " 'reset', or choose the optimizer that wrote it"
        )
    return "Choose the model file that belongs to the checkpoint, or the checkpoint of this model"


def _shortened(difference: trees.TreeDiff, limit: int = 40) -> str:
    return "\n".join(shorten(str(difference).splitlines(), limit))


def load(
    source: Source,
    *,
    model: Model,
    optimizer: Optimizer,
    groups: Sequence[ParameterGroup] = (),
    seed: int,
    specs: Mapping[str, LeafSpec],
    partitioner: Partitioner,
    manager: CheckpointManager | None = None,
) -> TrainState:
    """The state that the run starts with, on the devices, each leaf with its sharding.

    Args:
      source: from `find_source`.
      model: for fresh parameters.
      optimizer: for fresh slots.
      groups: parameters that they never train have no slots.
      seed: of fresh parameters.
      specs: specs of the whole state.
      partitioner: the mesh.
      manager: the `CheckpointManager` of MODEL_DIR, for RESUME.

    Raises:
      DamagedCheckpointError: leaves are not what was saved; for RESUME, whatever else keeps the
        checkpoint from being read, too.
      NonFiniteParameterError: parameters hold NaN or infinite values.
    """
    shardings = partitioner.shardings(specs)
    with partitioner.activate():
        if source.start == Start.SCRATCH:
            return initial_state(model, optimizer, seed=seed, shardings=shardings, groups=groups)
        if source.start == Start.RESUME:
            assert manager is not None
            return _load_own(source, manager, specs, shardings)
        assert source.reader is not None
        if source.start == Start.UPCYCLE:
            return _load_upcycled(source, shardings)
        return _load_equal(source, specs, shardings)


def _load_own(
    source: Source,
    manager: CheckpointManager,
    specs: Mapping[str, LeafSpec],
    shardings: Mapping[str, jax.sharding.NamedSharding],
) -> TrainState:
    assert source.reader is not None
    stored = {
        path: dataclasses.replace(specs[path], dtype=spec.dtype)
        for path, spec in source.reader.specs().items()
        if path not in source.fresh_slots
    }
    flat, failure = {}, None
    try:
        verification = Verification(source.reader, checksums=source.verify)
        flat = trees.flatten(
            manager.restore(source.step, stored, shardings, ignored=source.fresh_slots)
        )
    except Exception as error:  # Orbax and TensorStore raise many types
        if _is_no_damage(error):
            raise
        failure = error
    # Before any computation: it would wait for the process that could not read its part.
    if any_process(failure is not None):
        raise DamagedCheckpointError(
            f"{source.path} cannot be read: {failure or 'another process found it damaged'}"
        ) from failure
    verification.check(flat)
    verification.finish(
        f"The run spoilt it before it was saved: move {source.path} away to go on from the"
        " checkpoint before it, with a lower learning rate"
    )
    flat |= _zeros(source.fresh_slots, specs, shardings)
    for path, spec in specs.items():
        if flat[path].dtype != spec.dtype:
            flat[path] = flat[path].astype(spec.dtype)
    return from_state_dict(flat)


def _load_upcycled(
    source: Source, shardings: Mapping[str, jax.sharding.NamedSharding]
) -> TrainState:
    assert source.reader is not None and source.plan is not None
    flat = surgery.apply_online(source.plan, source.reader, shardings)
    reader: Any = source.reader
    for parent in getattr(reader, "readers", (reader,)):
        parent.verification.finish("Upcycle another checkpoint")
    # Parts of a source that were read onto the host are in the result only.
    check_finite(
        {path: leaf for path, leaf in flat.items() if path.startswith(TARGET)},
        where=f"upcycled from {source.path}",
        remedy="Upcycle another checkpoint, or with less noise",
    )
    return from_state_dict(flat)


def _load_equal(
    source: Source,
    specs: Mapping[str, LeafSpec],
    shardings: Mapping[str, jax.sharding.NamedSharding],
) -> TrainState:
    assert source.reader is not None
    slots = {path for path in specs if path.startswith(PARAM_STATES)}
    fresh = slots if source.fresh_optimizer else source.fresh_slots
    flat = load_leaves(
        source.reader,
        {path: spec for path, spec in _but(specs, fresh).items() if path != STEP},
        shardings,
        verify=source.verify,
        remedy="Continue from another checkpoint",
    )
    flat[STEP] = jax.device_put(np.int32(source.step), shardings[STEP])
    return from_state_dict(flat | _zeros(fresh, specs, shardings))


def _zeros(
    paths: Collection[str],
    specs: Mapping[str, LeafSpec],
    shardings: Mapping[str, jax.sharding.NamedSharding],
) -> dict[str, jax.Array]:
    """Slots that start afresh, by full path, made where they stay."""
    if not paths:
        return {}
    made: dict[str, jax.Array] = jax.jit(
        lambda: {path: jnp.zeros(specs[path].shape, specs[path].dtype) for path in paths},
        out_shardings={path: shardings[path] for path in paths},
    )()
    return made
