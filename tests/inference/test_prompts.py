"""Answers to choose from, and solved examples in front of inputs."""

import pathlib
import sys

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.examples import task_examples
from upcycle_jax.data.prompts import FewShot
from upcycle_jax.features import EncoderDecoderFeatures

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_tasks

FEATURES = EncoderDecoderFeatures()
LENGTHS = {"inputs": 80, "targets": 8}


def task(name, *, few_shot=None, inputs=80, split="validation"):
    (found,) = task_examples(
        DatasetConfig(name, {**LENGTHS, "inputs": inputs}, split=split), FEATURES, few_shot
    )
    return found


def text(ids):
    return small_tasks.VOCABULARY.decode([int(token) for token in ids if token > 1])


def test_answers_come_from_the_caller_the_example_or_the_post_processor():
    labels, own = task("small_labels"), task("small_options")
    example = next(labels.examples())
    assert labels.options(example) == ("even", "odd", "neither")
    assert labels.options(example, ("yes", "no")) == ("yes", "no")
    assert labels.options(example, {"small_labels": ["a", "b"], "other": ["c", "d"]}) == ("a", "b")
    assert [own.options(example) for example in own.examples(2)] == [
        ("even", "small_options 0"),
        ("odd", "small_options 1"),
    ]


def test_answers_that_nobody_gives_or_that_are_none(tmp_path):
    plain = task("small_parity")
    example = next(plain.examples())
    with pytest.raises(
        ValueError,
        match=(
            r"'small_parity' does not say which answers it allows: give them \(RANK_OPTIONS ="
            r" .*'options'"
        ),
    ):
        plain.options(example)
    with pytest.raises(
        ValueError, match=r"are \('a', 'a'\): there must be at least two different ones"
    ):
        plain.options(example, ("a", "a"))
    with pytest.raises(
        ValueError,
        match=(
            r"the answer 'too long for it' .* has 16 tokens: raise"
            r" TASK_FEATURE_LENGTHS\['targets'\] \(8\)"
        ),
    ):
        plain.answered(example, "too long for it")


def test_an_answered_example_is_tokenized_as_the_task_tokenizes():
    labels = task("small_labels")
    for example in labels.examples(4):
        again = labels.answered(
            example,
            small_tasks.VOCABULARY.decode([int(token) for token in example["targets"][:-1]]),
        )
        np.testing.assert_array_equal(again["targets"], example["targets"])  # EOS included


def test_shots_are_fixed_by_the_seed_and_in_front_of_every_input():
    """The train split has three examples; 'small_parity 1' is 14 characters, ' odd' 4, the
    separator 2.
    """
    shots = FewShot(num_shots=2, seed=3)
    first, second = list(task("small_parity", few_shot=shots).examples(2))
    prompt = text(first["inputs"])
    assert (
        prompt.endswith("\n\nsmall_parity 0") and int(first["inputs"][-1]) == 1
    )  # the task's inputs end with EOS
    assert text(second["inputs"]) == prompt[:-1] + "1"
    assert [int(example["num_shots"]) for example in (first, second)] == [2, 2]
    before = prompt.split("\n\n")[:-1]
    assert len(before) == 2 and set(before) <= {
        "small_parity 0 even",
        "small_parity 1 odd",
        "small_parity 2 even",
    }
    assert text(next(task("small_parity", few_shot=shots).examples())["inputs"]) == prompt
    others = {
        text(
            next(task("small_parity", few_shot=FewShot(num_shots=2, seed=seed)).examples())[
                "inputs"
            ]
        )
        for seed in range(8)
    }
    assert len(others) > 1
    # Another task of a mixture draws for itself.
    assert "small_parity_again" in text(
        next(task("small_parity_again", few_shot=shots).examples())["inputs"]
    )


def test_templates_and_what_stays_of_an_example():
    shots = FewShot(
        num_shots=1,
        template="Q: {inputs}\nA: {targets}",
        separator="\n--\n",
        query="Q: {inputs}\nA:",
    )
    example = next(task("small_parity", few_shot=shots).examples())
    assert text(example["inputs"]).endswith("\n--\nQ: small_parity 0\nA:")
    assert (
        example["inputs_pretokenized"].decode() == text(example["inputs"])
        and example["targets_pretokenized"] == b"even"
    )


def test_inputs_without_room_lose_whole_shots():
    """A shot is 18 or 19 characters and the separator 2: 14 + 21 + 21 + EOS do not fit into 40,
    14 + 21 do, none fits into 20.
    """
    counts = {
        room: int(
            next(task("small_parity", few_shot=FewShot(num_shots=2), inputs=room).examples())[
                "num_shots"
            ]
        )
        for room in (80, 40, 20)
    }
    assert counts == {80: 2, 40: 1, 20: 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shots": 0}, r"num_shots must be at least 1, got 0"),
        ({"num_shots": 5, "pool": 4}, r"pool is 4, below num_shots 5"),
        ({"template": "{inputs}"}, r"the template needs \{inputs\} and \{targets\}"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        FewShot(**arguments)


def test_splits_that_cannot_serve():
    with pytest.raises(
        ValueError,
        match=(
            r"FewShot.split is 'test', but the task 'small_parity' has the splits \['train',"
            r" 'validation'\]"
        ),
    ):
        task("small_parity", few_shot=FewShot(split="test"))
    with pytest.raises(
        ValueError,
        match=r"num_shots is 4, but the split 'train' of the task 'small_parity' has 3 examples",
    ):
        task("small_parity", few_shot=FewShot(num_shots=4))
