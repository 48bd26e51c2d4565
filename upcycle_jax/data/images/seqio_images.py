"""Image tasks of SeqIO: examples with an 'image', a PNG or JPEG file, and a 'label'. Needs
TensorFlow.
"""

from collections.abc import Iterator, Sequence

import seqio

from upcycle_jax.data import resolve
from upcycle_jax.data.images.config import ImageDatasetConfig, NoSuchSplitError
from upcycle_jax.features.images import IMAGE, LABEL


def find(config: ImageDatasetConfig) -> seqio.Task:
    """The task that the configuration names, which has the split.

    Raises:
      ValueError: there is none, it is a mixture, holds no images, or has no such split.
    """
    provider = resolve.task_or_mixture(config)
    if not isinstance(provider, seqio.Task):
        raise ValueError(f"{provider.name!r} is a mixture: images are read from one task")
    if not {IMAGE, LABEL} <= set(provider.output_features):
        raise ValueError(
            f"the task {provider.name!r} has the features {sorted(provider.output_features)}: one"
            f" of images has {IMAGE!r} and {LABEL!r}"
        )
    have = resolve.splits(provider)
    if config.split not in have:
        raise NoSuchSplitError(
            f"the task {provider.name!r} has no split {config.split!r}: it has {sorted(have)}"
        )
    return provider


def mixture_of(config: ImageDatasetConfig) -> dict[str, float] | None:
    """The tasks of the mixture that the configuration names with their rates; None for a task.

    Raises:
      ValueError: nothing has that name.
    """
    provider = resolve.task_or_mixture(config)
    if not isinstance(provider, seqio.Mixture):
        return None
    return {task.name: float(provider.get_rate(task)) for task in resolve.tasks(config)}


def num_classes(task: seqio.Task) -> int:
    """The ids of its labels."""
    return int(task.output_features[LABEL].vocabulary.vocab_size)


def check_labels(task: seqio.Task, labels: Sequence[int]) -> None:
    """Raises a ValueError where a label is no class of the task, or there is no image."""
    if not labels:
        raise ValueError(f"the task {task.name!r} gave no image")
    if min(labels) < 0 or max(labels) >= num_classes(task):
        raise ValueError(
            f"the labels of {task.name!r} are {min(labels)} to {max(labels)}, its output_features"
            f" promise {num_classes(task)} classes"
        )


def examples(task: seqio.Task, split: str) -> Iterator[tuple[bytes, int]]:
    """Every image as a file, with its label, in the task's order.

    Raises:
      ValueError: an image is no byte string.
    """
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        num_epochs=1,
        try_in_mem_cache=False,
        trim_output_features=False,
    )
    for example in dataset.as_numpy_iterator():
        file = example[IMAGE]
        if not isinstance(file, bytes):
            raise ValueError(
                f"the images of {task.name!r} are arrays: its source has to skip decoding, as"
                " upcycle_jax.tasks.images does"
            )
        yield file, int(example[LABEL])
