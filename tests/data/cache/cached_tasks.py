"""Small tasks with labels for the tests of caches. Not a test module."""

import functools

import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
NAME = "small_sums"


def _examples(split, shuffle_files, seed=None):
    count = {"train": 90, "validation": 21}[split]
    first = 1000 if split == "validation" else 0
    rows = [(f"{n} + {n % 7}", f"is {n + n % 7}", n) for n in range(first, first + count)]
    inputs, targets, numbers = (list(column) for column in zip(*rows, strict=True))
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": inputs, "targets": targets, "idx": np.array(numbers, np.int32)}
    )


def exact(targets, predictions):
    """Share of equal strings."""
    return {"exact": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def shout(dataset, *, mark="!"):
    """A step of one's own: it puts a mark before the targets' tokens."""
    ids = tf.constant(VOCABULARY.encode(mark), tf.int32)
    return dataset.map(
        lambda example: {**example, "targets": tf.concat([ids, example["targets"]], 0)}
    )


def register(name=NAME, *, after=(), placeholder=True):
    """Registers a task of sums with bytes and EOS, once, and returns its name."""
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                _examples,
                splits=("train", "validation"),
                num_input_examples={"train": 90, "validation": 21},
            ),
            preprocessors=[
                seqio.preprocessors.tokenize,
                *([seqio.CacheDatasetPlaceholder()] if placeholder else []),
                *after,
                seqio.preprocessors.append_eos,
            ],
            output_features={
                name: seqio.Feature(VOCABULARY, add_eos=True) for name in ("inputs", "targets")
            },
            metric_fns=[exact],
        )
    return name


def register_mixture(name, tasks):
    """Registers a mixture with rates, once."""
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, list(tasks.items()))
    return name


def register_with_own_step(name):
    """A task whose last steps are not known to the cache."""
    return register(name, after=[functools.partial(shout, mark="?")])
