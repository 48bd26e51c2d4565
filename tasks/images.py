"""Image classification from TFDS, for those who have prepared it: name its folder with
--tfds_data_dir. ImageNet has to be downloaded by hand (TFDS says how); CIFAR is not downloaded at
run time either.

Registers `imagenet2012` (TFDS 5.1.0; the last 1 % of its training images are the split
'validation', on which settings are chosen, and its validation images 'test'), `cifar10` and
`cifar100` (TFDS 3.0.2; the last 10 %, and 'test').

An example is a file, not decoded, and a label: views are made where it is read.
"""

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

IMAGE, LABEL = "image", "label"


def image_and_label(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Leaves out what else TFDS gives."""
    return dataset.map(
        lambda example: {IMAGE: example[IMAGE], LABEL: tf.cast(example[LABEL], tf.int32)},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def features(num_classes: int) -> dict[str, seqio.Feature]:
    """Of a task of images: a file, and a class."""
    return {
        IMAGE: seqio.Feature(
            seqio.PassThroughVocabulary(1), add_eos=False, rank=0, dtype=tf.string
        ),
        LABEL: seqio.Feature(
            seqio.PassThroughVocabulary(num_classes), add_eos=False, rank=0, dtype=tf.int32
        ),
    }


def add(name: str, tfds_name: str, num_classes: int, splits: dict[str, str]) -> None:
    """Registers a task."""
    seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(
            tfds_name=tfds_name, splits=splits, decoders={IMAGE: tfds.decode.SkipDecoding()}
        ),
        preprocessors=[image_and_label],
        output_features=features(num_classes),
        metric_fns=[],
    )


add(
    "imagenet2012",
    "imagenet2012:5.1.0",
    1000,
    {"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
)
for _name, _classes in (("cifar10", 10), ("cifar100", 100)):
    add(
        _name,
        f"{_name}:3.0.2",
        _classes,
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
    )
