"""Labelled tasks without a download: their labels, their counts, no leakage between splits, their
metrics.
"""

import collections
import json

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig, shipped_tasks
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.tasks import label_metrics, python_labels

FEATURES = EncoderDecoderFeatures()
NAMES = sorted(python_labels.LABELS)


@pytest.fixture(scope="module")
def pairs():
    """(input, target) of every task and split."""
    return {name: labels.pairs() for name, labels in python_labels.LABELS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_labels(pairs, name):
    train, validation = pairs[name]["train"], pairs[name]["validation"]
    assert len(train) >= 1500 and len(validation) >= 80
    assert (
        len(train) <= python_labels.MOST["train"]
        and len(validation) <= python_labels.MOST["validation"]
    )
    classes = python_labels.LABELS[name].classes
    labels = collections.Counter(target for _, target in [*train, *validation])
    if classes is not None:
        assert set(labels) <= set(classes) and len(labels) >= min(5, len(classes))
    # No answer is so common that nothing is left to learn.
    assert max(labels.values()) / labels.total() < 0.75
    assert max(len(text) for text, _ in [*train, *validation]) <= 400


@pytest.mark.parametrize("name", NAMES)
def test_no_leakage_between_splits(pairs, name):
    sides = [{text for text, _ in pairs[name][split]} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and all(
        len(side) == len(pairs[name][split]) for side, split in zip(sides, pairs[name], strict=True)
    )


def test_validation_files_are_those_that_pretraining_holds_out():
    """The beginning of each file (300 characters, within its first passage) is on one side of
    `python_source`: the side of its examples.
    """
    from upcycle_jax.tasks import python_environment

    text = {
        split: b"\n".join(passages)
        for split, passages in python_environment.python_source().splits.items()
    }
    sources = [
        (file, source)
        for file, source in python_labels._sources()
        if len(source) > 5000 and "/encodings/" not in file
    ]
    files = [
        (file, source[100:400].encode()) for file, source in sources
    ]  # the encodings' files begin alike
    held_out = [beginning for file, beginning in files if python_labels.is_held_out(file)]
    others = [beginning for file, beginning in files if not python_labels.is_held_out(file)]
    assert len(held_out) > 5 and len(others) > 100
    assert all(
        beginning in text["validation"] and beginning not in text["train"] for beginning in held_out
    )
    assert all(
        beginning in text["train"] and beginning not in text["validation"] for beginning in others
    )


def test_files_divide_by_the_hash_of_their_name():
    # sha256('stdlib/...') decides: 5 of 100 names in validation on average, standard deviation 2.2
    # of 100.
    held_out = sum(python_labels.is_held_out(f"stdlib/module_{n}.py") for n in range(2000))
    assert 50 < held_out < 150
    examples = [
        python_labels.Example(f"stdlib/module_{n}.py", f"question {n}", "A") for n in range(2000)
    ]
    divided = python_labels.divide([*examples, *examples[:10]])
    assert len(divided["validation"]) == held_out and len(divided["train"]) == 2000 - held_out


def test_hand_worked_facts():
    source = (
        'def area(width, height=2, *, unit="cm", make=list()):\n    """Area of a rectangle. Nothing'
        ' else.\n\n    More."""\n'
    )
    import ast

    function = python_labels._function(ast.parse(source).body[0], "f.py")
    assert function.signature == "area(width, height=2, *, unit='cm', make=list())"
    assert function.defaults == {
        "height": "2",
        "unit": "'cm'",
    }  # what is computed is no fact of the text
    assert function.summary == "Area of a rectangle."


def test_choices_name_the_functions_own_description(pairs):
    summaries = collections.defaultdict(set)
    for function in python_labels.functions():
        summaries[function.signature].add(function.summary)
    for text, letter in pairs["choice"]["validation"]:
        signature, _, listed = text.removeprefix("choice function: ").partition(" A: ")
        options = dict(zip("ABCD", python_labels.re.split(r" [BCD]: ", listed), strict=True))
        assert options[letter] in summaries[signature]


def test_reading_again_gives_the_same(pairs):
    again = python_labels.LABELS["match"].pairs()
    assert again == pairs["match"]


def test_metrics_by_hand():
    # Targets 0 0 1 2, predictions 0 1 1 -1: 2 of 4 right. F1: class 0 2*1/(2+1), class 1 2*1/(1+2),
    # class 2 0; mean (2/3 + 2/3 + 0) / 3.
    assert label_metrics.accuracy([0, 0, 1, 2], [0, 1, 1, -1]) == {"accuracy": 50.0}
    assert label_metrics.macro_f1([0, 0, 1, 2], [0, 1, 1, -1])["f1"] == pytest.approx(100 * 4 / 9)
    assert (
        label_metrics.label_to_class(
            " no ", label_classes=("yes", "no"), example=None, is_target=True
        )
        == 1
    )
    assert (
        label_metrics.label_to_class("maybe", label_classes=("yes", "no")) == label_metrics.UNKNOWN
    )
    # 'the red car' for 'red car': 2 shared words, 2*2/(2+3); "None" for "None." is the same word
    # but not the same answer.
    assert label_metrics.word_f1(["red car", "None."], ["the red car", "None"])[
        "f1"
    ] == pytest.approx(100 * (0.8 + 1.0) / 2)
    assert label_metrics.exact_match(["'a b'", "None."], ["'a b' ", "None"]) == {"em": 50.0}
    assert label_metrics.word_f1(["''"], ["x"]) == {"f1": 0.0} and label_metrics.word_f1(
        ["''"], ["''"]
    ) == {"f1": 100.0}


def test_majority_answers_score_what_they_should(pairs):
    """The task's own metrics, through SeqIO's machinery, on a constant answer."""
    pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    from upcycle_jax.data.examples import task_examples

    config = DatasetConfig(
        "offline_suite_match", {"inputs": 512, "targets": 8}, split="validation", seed=0
    )
    (task,) = task_examples(config, FEATURES)
    examples = list(task.examples())
    yes = sum(target == "yes" for _, target in pairs["match"]["validation"])
    assert len(examples) == len(pairs["match"]["validation"])
    answer = np.array([*b"yes"], np.int32) + 3
    result = task.evaluate(examples, {"prediction": [answer] * len(examples)})
    share = yes / len(examples)
    # All 'yes': F1 of 'yes' is 2 yes / (yes + all), of 'no' 0.
    assert result.metrics == pytest.approx(
        {"accuracy": 100 * share, "f1": 100 * share / (1 + share)}
    )


def test_the_mixture_and_its_classes():
    seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    config = DatasetConfig(
        "offline_suite_finetune", {"inputs": 512, "targets": 32}, batch_size=20, seed=0
    )
    dataset = open_dataset(config, FEATURES)
    assert dataset.task_names() == tuple(f"offline_suite_{name}" for name in NAMES)
    assert dataset.vocabulary_size() == 359
    assert set(shipped_tasks.MODULES["upcycle_jax.tasks.offline_suite"]) == {
        "offline_suite_finetune",
        *dataset.task_names(),
    }
    for name, labels in python_labels.LABELS.items():
        task = seqio.TaskRegistry.get(f"offline_suite_{name}")
        assert getattr(task.postprocessor, "keywords", {}).get("label_classes") == labels.classes
        assert {metric.__name__ for metric in task.metric_fns} == (
            {"accuracy", "macro_f1"} if labels.classes else {"exact_match", "word_f1"}
        )
    batch = next(open_dataset(config, FEATURES).train_iterator())
    texts = [
        bytes(int(token) - 3 for token in row if 3 <= token < 259).decode(errors="replace")
        for row in batch["encoder_input_tokens"]
    ]
    assert len({text.split()[0] for text in texts}) >= 3
    fingerprint = open_dataset(config, FEATURES).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert len(fingerprint["tasks"]["offline_suite_match"]["source"]["train"]["sha256"]) == 64
