"""Tiny text-to-text tasks with metrics of predictions and of scores, and a mixture. Imported as
MIXTURE_OR_TASK_MODULE.
"""

import functools

import numpy as np
import seqio

VOCABULARY = seqio.ByteVocabulary(extra_ids=0)
FEATURES = {
    name: seqio.Feature(vocabulary=VOCABULARY, add_eos=True) for name in ("inputs", "targets")
}
NUM_EXAMPLES = 11


def _source(name):
    def dataset(split, shuffle_files=False, seed=None):
        import tensorflow as tf

        del shuffle_files, seed
        numbers = np.arange(NUM_EXAMPLES if split == "validation" else 3)
        rows = {
            "inputs": [f"{name} {n}" for n in numbers],
            "targets": ["odd" if n % 2 else "even" for n in numbers],
            "idx": numbers,
        }
        return tf.data.Dataset.from_tensor_slices(rows)

    return seqio.FunctionDataSource(dataset, splits=("train", "validation"))


def exact_match(targets, predictions):
    return {
        "exact_match": 100.0 * np.mean([t == p for t, p in zip(targets, predictions, strict=True)])
    }


def mean_length(targets, predictions):
    del targets
    return {"mean_length": np.mean([len(p) for p in predictions])}


def mean_score(targets, scores):
    assert len(targets) == len(scores)
    return {"mean_score": float(np.mean(scores))}


def capitals(text, example=None, is_target=False):
    assert "idx" in example or is_target
    return text.upper()


for _name, _metrics in (
    ("small_parity", [exact_match, mean_length, mean_score]),
    ("small_parity_again", [exact_match]),
):
    if _name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            _name,
            source=_source(_name),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=FEATURES,
            postprocess_fn=capitals,
            metric_fns=_metrics,
        )
if "small_parities" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(
        "small_parities", [("small_parity", 1.0), ("small_parity_again", 1.0)]
    )


def label_number(text, example=None, is_target=False, label_classes=()):
    """Number of a label, -1 for another text, as T5's classification tasks post-process."""
    del example, is_target
    return label_classes.index(text) if text in label_classes else -1


def accuracy(targets, predictions):
    assert all(target >= 0 for target in targets)
    return {
        "accuracy": 100.0 * np.mean([t == p for t, p in zip(targets, predictions, strict=True)])
    }


def own_options(dataset):
    """Each example's own answers: its parity, and the number's name in the task."""
    return dataset.map(
        lambda example: {
            **example,
            "options": [example["targets_pretokenized"], example["inputs_pretokenized"]],
        }
    )


for _name, _steps, _post in (
    ("small_labels", [], functools.partial(label_number, label_classes=["even", "odd", "neither"])),
    ("small_options", [own_options], None),
):
    if _name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            _name,
            source=_source(_name),
            preprocessors=[seqio.preprocessors.tokenize, *_steps, seqio.preprocessors.append_eos],
            output_features=FEATURES,
            postprocess_fn=_post,
            metric_fns=[accuracy] if _post else [exact_match],
        )
