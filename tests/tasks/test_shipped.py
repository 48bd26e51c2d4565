"""Shipped names resolve without naming a module; the paper's tasks say how to get their data, and
read what T5 reads.
"""

import importlib

import pytest

from upcycle_jax.data import DatasetConfig, configure, fingerprints, resolve, shipped_tasks
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")

FEATURES = EncoderDecoderFeatures()
LENGTHS = {"inputs": 512, "targets": 114}


@pytest.fixture
def with_t5():
    pytest.importorskip("t5.data.mixtures", reason="t5 is an extra")


@pytest.fixture
def empty_tfds(tmp_path):
    """TFDS looks for data in an empty folder."""
    configure(tfds_data_dir=str(tmp_path))
    yield tmp_path
    configure()
    seqio.set_tfds_data_dir_override(None)


@pytest.mark.parametrize("module", shipped_tasks.MODULES)
def test_modules_register_what_they_say(module, with_t5):
    importlib.import_module(module)
    assert set(shipped_tasks.MODULES[module]) <= {
        *seqio.TaskRegistry.names(),
        *seqio.MixtureRegistry.names(),
    }


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("c4_span_corruption", "c4/en:3.1.0"), ("super_glue_boolq_v102", "super_glue/boolq:1.0.2")],
)
def test_unprepared_data_are_named_with_the_command_that_prepares_them(
    name, dataset, with_t5, empty_tfds
):
    with pytest.raises(
        ValueError,
        match=(
            rf"task '{name}' \(TFDS {dataset}\) are not prepared in {empty_tfds}: .*`tfds build"
            rf" {dataset}"
        ),
    ):
        open_dataset(DatasetConfig(name, LENGTHS, vocabulary="bytes"), FEATURES).train_iterator()


def test_c4_is_learnt_in_rows_by_decoder_only_models():
    for module in ("c4", "embedded_text"):
        importlib.import_module(f"upcycle_jax.tasks.{module}")
    c4, embedded = (
        seqio.TaskRegistry.get(f"{name}_language_modeling") for name in ("c4", "python_source")
    )
    steps = fingerprints.preprocessors(c4)
    assert steps[1:] == fingerprints.preprocessors(embedded)
    assert steps[-3:] == ["append_eos", "CacheDatasetPlaceholder", "language_modeling"]
    assert c4.output_features.keys() == embedded.output_features.keys()


def test_super_glue_mixture_is_proportional(with_t5):
    config = DatasetConfig(
        "super_glue_v102_proportional", {"inputs": 512, "targets": 62}, vocabulary="bytes"
    )
    assert {"super_glue_boolq_v102", "super_glue_record_v102", "dpr_v001_simple"} <= set(
        open_dataset(config, FEATURES).task_names()
    )


def _with_examples(name, examples):
    """A registered copy of a task over given examples."""
    import tensorflow as tf

    columns = {key: [example[key] for example in examples] for key in examples[0]}
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
        splits=["train", "validation"],
    )
    copy = seqio.get_mixture_or_task(name).replace(name=f"{name}_given", source=source)
    if copy.name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add_provider(copy.name, copy)
    return copy.name


def test_boolq_in_t5s_words_and_any_vocabulary(with_t5):
    importlib.import_module("upcycle_jax.tasks.super_glue")
    examples = [
        {"question": "is water wet", "passage": "Water is wet.", "label": 1, "idx": 0},
        {"question": "is fire cold", "passage": "Fire is hot.", "label": 0, "idx": 1},
    ]
    name = _with_examples("super_glue_boolq_v102", examples)
    config = DatasetConfig(
        name,
        {"inputs": 96, "targets": 8},
        batch_size=4,
        split="validation",
        vocabulary="bytes",
        seed=0,
    )
    (batch,) = open_dataset(config, FEATURES).eval_batches()[name]()
    decode = resolve.task_or_mixture(config).output_features["targets"].vocabulary.decode
    rows = [
        (decode(x.tolist()), decode(y.tolist()))
        for x, y in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
    ]
    assert rows[0] == ("boolq passage: Water is wet. question: is water wet", "True")
    assert rows[1] == ("boolq passage: Fire is hot. question: is fire cold", "False")
    assert batch["decoder_loss_weights"].sum(axis=1).tolist() == [
        5,
        6,
        0,
        0,
    ]  # the words' bytes and EOS; two rows of filling


def test_c4_is_corrupted_as_every_text():
    import numpy as np

    importlib.import_module("upcycle_jax.tasks.c4")
    documents = [{"text": f"Document {n} tells of {n} things. " * 60} for n in range(20)]
    config = DatasetConfig(
        _with_examples("c4_span_corruption", documents),
        LENGTHS,
        batch_size=4,
        vocabulary="bytes",
        seed=0,
    )
    batch = next(open_dataset(config, FEATURES).train_iterator())
    assert (batch["encoder_input_tokens"] > 0).all() and (
        batch["decoder_target_tokens"] > 0
    ).mean() > 0.97
    assert (
        np.sum(batch["encoder_input_tokens"] >= 259, axis=1) == 28
    ).all()  # 28 noise spans in 568 tokens, a sentinel each
