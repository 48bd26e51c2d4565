"""The checkpoints that are asked for, and compiled prediction and scoring over host batches."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.checkpoints.steps import checkpoint_steps
from upcycle_jax.checkpoints.storage import absolute
from upcycle_jax.models.base import Generative, Model
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import batches
from upcycle_jax.types import Array, Batch, PyTree


def generative(model: Model) -> Generative:
    """The model as one that produces sequences.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(model, Generative):
        raise ValueError(
            f"{type(model).__name__} produces no sequences: it can be evaluated on tasks without"
            " metrics of their own, and gives no predictions and scores"
        )
    return model


def checkpoints(
    path: os.PathLike | str, steps: str | int | Sequence[int]
) -> list[CheckpointReader]:
    """The checkpoints that are meant, by rising step.

    Args:
      path: a checkpoint, or a folder of them.
      steps: 'latest', 'all', one step or several.

    Raises:
      FileNotFoundError: nothing is there, or a step is not.
      ValueError: `steps` is none of these, or steps are asked of a single checkpoint.
    """
    if steps == "latest":
        return [open_checkpoint(path)]
    folder = absolute(path)
    known = checkpoint_steps(folder) if folder.is_dir() else {}
    if not known:
        open_checkpoint(path)  # says what is wrong with the path, if anything is
        raise ValueError(
            f"{path} is a single checkpoint, so CHECKPOINT_STEPS must be 'latest', got {steps!r};"
            " or name the folder around it"
        )
    if steps == "all":
        wanted: Sequence[int] = sorted(known)
    elif isinstance(steps, int):
        wanted = [steps]
    elif isinstance(steps, list | tuple) and steps and all(isinstance(step, int) for step in steps):
        wanted = sorted(steps)
    else:
        raise ValueError(
            f"CHECKPOINT_STEPS must be 'latest', 'all', a step or a list of steps, got {steps!r}"
        )
    missing = [step for step in wanted if step not in known]
    if missing:
        raise FileNotFoundError(
            f"{path} has no checkpoint of step {missing[0]}; it has {', '.join(map(str, known))}"
        )
    return [open_checkpoint(known[step]) for step in wanted]


class Runner:
    """Predicts and scores batches; compiled once for each.

    Results come back whole on every process, in the order of the batch.

    Args:
      model: the model.
      partitioner: the mesh on which parameters live.
      batch_size: rows of a whole batch.
      decoder: how predictions are searched.
      eos_ids: the tokens that end a prediction. Whichever has, the first one stands in its place:
        vocabularies cut there.
      max_length: tokens of a prediction at most.
      seed: of decoders that draw. The key of an example is a fold of its number, so that it does
        not depend on batches.

    Raises:
      ValueError: the batch does not split over the mesh.
    """

    def __init__(
        self,
        model: Generative,
        partitioner: Partitioner,
        *,
        batch_size: int,
        decoder: DecodingAlgorithm,
        eos_ids: Sequence[int],
        max_length: int,
        seed: int = 0,
    ):
        self._partitioner, self.batch_size = partitioner, batch_size
        self._layout = batches.data_layout(partitioner, batch_size)

        def predict(params: PyTree, batch: Batch, numbers: jax.Array) -> Decoded:
            keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(
                numbers
            )
            decoded = model.predict_batch_with_aux(
                params, batch, decoder=decoder, keys=keys, eos_id=eos_ids, max_length=max_length
            )
            others = jnp.isin(decoded.tokens, jnp.asarray(eos_ids[1:], jnp.int32))
            tokens = jnp.where(others, eos_ids[0], decoded.tokens)
            return dataclasses.replace(decoded, tokens=tokens)

        self._predict = jax.jit(predict, out_shardings=partitioner.replicated)
        self._score = jax.jit(model.score_batch, out_shardings=partitioner.replicated)

    def predict(
        self, params: PyTree, batch: Mapping[str, np.ndarray], numbers: Sequence[int]
    ) -> Decoded:
        """NumPy arrays for the rows `[0, len(numbers))` of a whole batch; `numbers` tells examples
        apart.
        """
        rows = np.zeros(self.batch_size, np.uint32)
        rows[: len(numbers)] = numbers
        placed = self._place({**batch, "numbers": rows})
        with self._partitioner.activate():
            decoded = self._predict(
                params, {name: placed[name] for name in batch}, placed["numbers"]
            )
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(numbers)], decoded)

    def score(self, params: PyTree, batch: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Float32 `[rows]`: log-probabilities of the first rows' targets."""
        placed = self._place(batch)
        with self._partitioner.activate():
            return np.asarray(self._score(params, placed))[:rows]

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        local = self.batch_size // self._layout.num_shards
        mine = slice(self._layout.shard * local, (self._layout.shard + 1) * local)
        return batches.to_global(
            {name: np.asarray(rows)[mine] for name, rows in batch.items()},
            self._partitioner,
            self._layout.num_shards,
        )


def in_batches(examples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` examples, the last one possibly shorter."""
    held: list[Any] = []
    for example in examples:
        held.append(example)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
