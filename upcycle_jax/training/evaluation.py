"""Teacher-forced evaluation, task by task."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from upcycle_jax.distributed import in_turn
from upcycle_jax.models import expert_similarity, metrics
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import batches
from upcycle_jax.training.progress import host_values
from upcycle_jax.types import Batch, PyTree

TaskBatches = Mapping[str, Callable[[], Iterable[Batch]]]


class Evaluator:
    """Runs a model over batches and merges its metrics; compiled once per batch shape.

    Args:
      model: the model.
      partitioner: the mesh on which parameters live.
      num_shards: number of parts in which processes load a batch, see `batches.data_layout`.
    """

    def __init__(self, model: Model, partitioner: Partitioner, *, num_shards: int = 1):
        self._partitioner, self.num_shards = partitioner, num_shards
        self._metrics = jax.jit(model.eval_fn, out_shardings=partitioner.replicated)
        self._merge = jax.jit(metrics.merge, donate_argnums=0)
        specs = model.param_specs()
        self._similarity = jax.jit(
            lambda params: expert_similarity.metrics(params, specs),
            out_shardings=partitioner.replicated,
        )

    def evaluate(self, params: PyTree, task_batches: TaskBatches) -> dict[str, dict[str, Any]]:
        """Metrics of every task: floats, or arrays for vector metrics, and
        `timing/evaluation_seconds`.

        `experts/<layer>/similarity` follows from the parameters alone and is the same for all
        tasks.

        Raises:
          ValueError: a task gave no batch.
        """
        if not task_batches:
            return {}
        with self._partitioner.activate():
            similarity = host_values(self._similarity(params))
        return {
            task: self._one_task(task, params, make_batches) | similarity
            for task, make_batches in task_batches.items()
        }

    def _one_task(
        self, task: str, params: PyTree, make_batches: Callable[[], Iterable[Batch]]
    ) -> dict[str, Any]:
        started, total = time.monotonic(), None
        for batch in make_batches():
            on_device = batches.to_global(batch, self._partitioner, self.num_shards)
            with self._partitioner.activate():
                more = in_turn(self._metrics(params, on_device))
                total = more if total is None else self._merge(total, more)
        if total is None:
            raise ValueError(
                f"evaluation of {task!r} got no batch: its split is empty or smaller than one"
                " batch. Lower the batch size"
            )
        return host_values(total) | {"timing/evaluation_seconds": time.monotonic() - started}
