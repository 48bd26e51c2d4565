"""Pipelines are built without AutoGraph, with the same values, and with it where they need it."""

import functools

import numpy as np
import pytest

pytest.importorskip("seqio", reason="SeqIO tasks need seqio")

import tensorflow as tf

from upcycle_jax.data import seqio_dataset
from upcycle_jax.data.plain_graphs import without_autograph
from upcycle_jax.features import EncoderDecoderFeatures

pytestmark = pytest.mark.usefixtures("short_shuffle")
CONVERTS = tf.__internal__.autograph.control_status_ctx


def values(dataset):
    return [int(value) for value in dataset]


def test_what_needs_no_autograph_is_built_once_without_it():
    seen = []

    def build():
        seen.append(CONVERTS().status.name)
        return tf.data.Dataset.range(5).map(lambda x: x * 2 if len(seen) else x)

    assert values(without_autograph(build)) == [0, 2, 4, 6, 8]
    assert seen == ["DISABLED"]


def choose(x):
    if x > 2:
        return x * 10
    return x


def count(x):
    total = tf.constant(0, tf.int64)
    while total * total < x:
        total += 1
    return total


def add_up(x):
    total = tf.constant(0, tf.int64)
    for number in tf.range(x):
        total += number
    return total


def both(x):
    return tf.cast(x > 1 and x < 4, tf.int64)


def either(x):
    return tf.cast(x < 1 or x > 1, tf.int64)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (choose, [0, 1, 2, 30, 40]),
        (count, [0, 1, 2, 2, 2]),
        (add_up, [0, 0, 1, 3, 6]),
        (both, [0, 0, 1, 1, 0]),
        (either, [1, 0, 1, 1, 1]),
    ],
)
def test_a_step_that_needs_autograph_has_it(step, wanted):
    seen = []

    def build():
        seen.append(CONVERTS().status.name)
        return tf.data.Dataset.range(5).map(step)

    assert values(without_autograph(build)) == wanted
    assert seen[0] == "DISABLED" and len(seen) == 2 and seen[1] != "DISABLED"


def test_what_is_wrong_either_way_is_raised_as_it_is():
    def build():
        return tf.data.Dataset.range(5).map(lambda x: tf.constant([1, 2]) + tf.constant([1, 2, 3]))

    with pytest.raises(ValueError, match="Dimensions must be equal"):
        without_autograph(build)


# A packed pipeline has every step of the other one, and more; each domain has the same ones.
@pytest.mark.parametrize(
    ("pack", "domains"),
    [
        (True, 1),
        pytest.param(True, 2, marks=pytest.mark.slow),
        pytest.param(False, 2, marks=pytest.mark.slow),
    ],
)
def test_batches_and_saved_positions_are_those_of_autograph(
    make_config, text_folder, pack, domains, tmp_path
):
    alone = {"mixture_or_task_name": "alone", "text_files": [str(text_folder / "words.txt")]}
    build = functools.partial(
        seqio_dataset._train_dataset,
        make_config(pack=pack, **(alone if domains == 1 else {})),
        EncoderDecoderFeatures(),
        seed=3,
        process_index=0,
        process_count=1,
    )
    converted, plain = iter(build()), iter(without_autograph(build))

    def same(count):
        for _ in range(count):
            ours, theirs = next(plain), next(converted)
            assert ours.keys() == theirs.keys()
            for name, array in theirs.items():
                np.testing.assert_array_equal(ours[name], array)
                assert ours[name].dtype == array.dtype

    same(3)
    # A position that an earlier version saved.
    path = tf.train.Checkpoint(iterator=converted).write(str(tmp_path / "position"))
    plain = iter(without_autograph(build))
    tf.train.Checkpoint(iterator=plain).read(path).assert_consumed()
    same(3)
