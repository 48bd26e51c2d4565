"""The programs of a run are compiled while its data are opened: the compiler needs shapes alone,
and works beside Python.

What comes of it is used where it is exactly what would be compiled later: the same shapes, dtypes
and shardings, in a thread with the same settings of jax. Else, and where compiling fails, it is
done again at its place, where an error belongs.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.text import duration
from upcycle_jax.training.prepare import PreparedRun
from upcycle_jax.training.restore import Start
from upcycle_jax.training.spikes import OnSpike
from upcycle_jax.training.train_state import TrainState, from_state_dict, initial_state_program
from upcycle_jax.training.train_step import TrainStep, jitted_train_step
from upcycle_jax.types import PyTree

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class EarlyPrograms:
    """What is compiled on threads of its own, from the moment on that this is made.

    Several processes compile at the same place, one by one as they come to it: nothing is begun
    early there.
    """

    def __init__(self, run: PreparedRun):
        self._run = run
        self._pool = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="compile")
        self._fresh: concurrent.futures.Future[Callable[[], TrainState] | None] | None = None
        self._step: concurrent.futures.Future[TrainStep | None] | None = None
        if jax.process_count() > 1:
            return
        here = _settings_of_jax()
        if run.source.start == Start.SCRATCH:
            self._fresh = self._pool.submit(_or_nothing, _fresh_state, run, here)
        self._step = self._pool.submit(_or_nothing, _early_step, run, here)

    def fresh_state(self) -> Callable[[], TrainState] | None:
        """Makes the state of a run that starts from scratch, once; None: not compiled early."""
        return self._fresh.result() if self._fresh is not None else None

    def step(
        self, run: PreparedRun, state: TrainState, batch: Mapping[str, Any], *rest: jax.Array
    ) -> TrainStep:
        """The compiled train step.

        Args:
          run: as it is by now; it may start from another checkpoint than it was to.
          state: what it will be called with, or arrays of the same kind.
          batch: the same.
          rest: the same.
        """
        if self._step is not None and run.source is self._run.source:
            found = self._step.result()
            if found is not None and _kinds((state, batch, *rest)) == _kinds(_expected(run)):
                return found
        return compiled_step(run, state, batch, *rest)

    def close(self) -> None:
        """Begins nothing more; what is under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def compiled_step(
    run: PreparedRun, state: PyTree, batch: Mapping[str, Any], *rest: Any
) -> TrainStep:
    """The train step of a run, compiled for arguments of these kinds."""
    settings, started = run.settings, time.monotonic()
    jitted = jitted_train_step(
        settings.model,
        run.trainer,
        partitioner=settings.partitioner,
        shardings=settings.partitioner.shardings(run.specs),
        seed=settings.random_seed,
    )
    with settings.partitioner.activate():
        compiled: TrainStep = jitted.lower(state, batch, *rest).compile()
    _log.info("the train step compiled in %s", duration(time.monotonic() - started))
    return compiled


def _or_nothing(
    make: Callable[[PreparedRun], Result], run: PreparedRun, there: Mapping[str, Any]
) -> Result | None:
    """The result; None where this thread has other settings of jax, or something is wrong: that
    is said where the result was to be used, by making it there.
    """
    if _settings_of_jax() != there:
        return None
    try:
        return make(run)
    except Exception:
        return None


def _fresh_state(run: PreparedRun) -> Callable[[], TrainState]:
    settings = run.settings
    with settings.partitioner.activate():
        program = initial_state_program(
            settings.model,
            settings.trainer.optimizer,
            seed=settings.random_seed,
            shardings=settings.partitioner.shardings(run.specs),
            groups=settings.trainer.parameter_groups,
        )
        compiled: Callable[[], TrainState] = program.lower().compile()
    return compiled


def _early_step(run: PreparedRun) -> TrainStep:
    state, batch, *rest = _expected(run)
    return compiled_step(run, state, batch, *rest)


def _expected(run: PreparedRun) -> tuple[Any, ...]:
    """The kinds of what the step will be called with."""
    settings, partitioner = run.settings, run.settings.partitioner
    shardings = partitioner.shardings(run.specs)
    state = from_state_dict(
        {
            path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path])
            for path, spec in run.specs.items()
        }
    )
    cfg = settings.train_dataset_cfg
    features = settings.model.input_specs(cfg.batch_size, cfg.task_feature_lengths, packed=cfg.pack)
    # Of rows for one device, `batches.to_global` makes no arrays of jax.
    rows = partitioner.batch_sharding
    sharding = rows if rows.num_devices > 1 else None
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in features.items()
    }
    spikes = settings.trainer.loss_spikes
    if spikes is None or spikes.policy != OnSpike.SKIP:
        return state, batch
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=partitioner.replicated)
    return state, batch, limit


def _kinds(arguments: PyTree) -> Any:
    """Structure, shapes, dtypes and shardings of arrays or of specs of them."""
    leaves, structure = jax.tree.flatten(arguments)
    kinds = [
        (tuple(leaf.shape), np.dtype(leaf.dtype), getattr(leaf, "sharding", None))
        for leaf in leaves
    ]
    return structure, kinds


def _settings_of_jax() -> dict[str, Any]:
    """Every setting of jax, as this thread has it."""
    return {name: getattr(jax.config, name, None) for name in jax.config.values}
