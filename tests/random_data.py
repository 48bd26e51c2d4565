"""Random batches in place of a run's data, where a test is about everything else."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from upcycle_jax.data.opening import open_dataset


@dataclasses.dataclass(frozen=True)
class RandomData:
    """A `DatasetConfig` and the `Dataset` that it becomes.

    Attributes:
      batch: number of a batch -> its features.
      batch_size: rows.
      task_feature_lengths: by task feature.
      ids: size of the vocabulary.
    """

    batch: Callable[[int], Mapping[str, np.ndarray]]
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    mixture_or_task_name: str = "random"
    split: str = "train"
    pack: bool = False
    ids: int = 300

    @property
    def config(self):
        return self

    def vocabulary_size(self):
        return self.ids

    def fingerprint(self):
        return {"random": True}

    def train_iterator(self, process_index=0, process_count=1):
        return Stream(self)

    def eval_batches(self, num_batches=None, process_index=0, process_count=1):
        return {"random": lambda: iter([self.batch(0)])}


@open_dataset.register
def open_random(config: RandomData, features: Any) -> RandomData:
    return config


class Stream:
    """The train iterator of `RandomData`."""

    def __init__(self, data: RandomData, position: int = 0):
        self.data, self.position = data, position

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return self.data.batch(self.position)

    def fingerprint(self):
        return self.data.fingerprint()

    def prepare(self, first_batch, num_batches):
        pass

    def seek(self, num_batches):
        self.position = num_batches

    def save(self, directory):
        (pathlib.Path(directory) / "position.json").write_text(json.dumps(self.position))

    def restore(self, directory):
        self.position = json.loads((pathlib.Path(directory) / "position.json").read_text())
