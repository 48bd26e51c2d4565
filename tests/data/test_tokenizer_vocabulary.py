"""A Hugging Face tokenizer as the vocabulary of tasks: through SeqIO, from caches, with id 0 as a
token like others.
"""

import json
import shutil

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.data.text import tokenizer
from upcycle_jax.features import DecoderOnlyFeatures

seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
tf = pytest.importorskip("tensorflow")
vocabularies = pytest.importorskip("upcycle_jax.data.tokenizer_vocabulary")

TOKENS, SEGMENTS = "decoder_target_tokens", "decoder_segment_ids"
BOS, EOS = 400, 401


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder):
    return vocabularies.TokenizerVocabulary(tokenizer.load(str(tokenizer_folder)))


@pytest.fixture(scope="module")
def make_config(tmp_path_factory, tokenizer_folder):
    """Configurations of a text full of id 0, which is cached."""
    from upcycle_jax.data.cache import writer

    folder = tmp_path_factory.mktemp("shouts")
    texts = ["!" * (number % 7) + f" number {number} " + "!" * (number % 5) for number in range(90)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "shouts.jsonl").write_text(lines)

    def make(**changes):
        settings = {
            "mixture_or_task_name": "shouts",
            "task_feature_lengths": {"targets": 24},
            "batch_size": 4,
            "seed": 0,
            "text_files": [str(folder / "shouts.jsonl")],
            "objective": "language_modeling",
            "vocabulary": str(tokenizer_folder),
        }
        return DatasetConfig(**{**settings, **changes})

    make.texts = texts
    written = writer.write_caches(
        make(), writer.CacheOptions(folder / "cache", report=lambda line: None)
    )
    make.manifest = written[0].manifest
    configure(cache_dirs=[str(folder / "cache")])
    yield make
    configure()


def test_tensorflow_and_python_agree(vocabulary, tokenizer_folder):
    for text in ("", "!", "def f(x): return 漢字 !"):
        ids = vocabulary.encode(text)
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == text
    rows = tf.constant([[0, EOS, 0], [0, 0, EOS]])
    assert vocabulary.decode_tf(rows).numpy().tolist() == [b"!", b"!!"]
    assert vocabulary.decode([0, 0, EOS, 0]) == "!!"
    assert (vocabulary.vocab_size, vocabulary.extra_ids, vocabulary.pad_id) == (402, 0, EOS)
    again = vocabularies.TokenizerVocabulary(
        tokenizer.load(str(tokenizer_folder / "tokenizer.json"))
    )
    assert again == vocabulary and hash(again) == hash(vocabulary)


@pytest.mark.parametrize("use_cached", [False, True])
def test_documents_are_whole_with_id_0_in_them(make_config, vocabulary, use_cached):
    features, found = DecoderOnlyFeatures(bos_id=BOS), []
    for split in ("train", "validation"):
        dataset = open_dataset(make_config(split=split, use_cached=use_cached), features)
        assert dataset.vocabulary_size() == 402
        batches = list(dataset.eval_batches()["shouts"]())
        real = np.concatenate([features.real_targets(batch).ravel() for batch in batches])
        stream = np.concatenate([batch[TOKENS].ravel() for batch in batches])[real]
        assert (stream == 0).sum() > 10
        parts = np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1]
        found += [vocabulary.decode(part.tolist()) for part in parts]
        first = np.concatenate([batch["decoder_positions"] for batch in batches]).ravel() == 0
        inputs = np.concatenate([batch["decoder_input_tokens"].ravel() for batch in batches])
        assert (inputs[first & real] == BOS).all()
    assert sorted(found) == sorted(make_config.texts)


@pytest.mark.parametrize("use_cached", [False, True])
def test_a_stream_is_saved_at_once(make_config, tmp_path, use_cached, caplog):
    iterator = open_dataset(
        make_config(use_cached=use_cached), DecoderOnlyFeatures()
    ).train_iterator()
    for _ in range(3):
        next(iterator)
    iterator.save(tmp_path)
    expected = next(iterator)
    iterator.restore(tmp_path)
    batch = next(iterator)
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])
    assert "cannot save the position" not in caplog.text


def test_a_cache_is_one_tokenizers(make_config, tokenizer_folder, tmp_path):
    feature = make_config.manifest.features["targets"]
    assert feature["eos_id"] == EOS and feature["dtype"] == "uint16"
    assert feature["vocabulary"]["special_tokens"] == {"bos": "<s>", "eos": "</s>"}
    assert "sha256" in make_config.manifest.identity["vocabularies"]["targets"]
    moved = shutil.copytree(tokenizer_folder, tmp_path / "moved")

    def opened(vocabulary):
        config = make_config(use_cached=True, vocabulary=str(vocabulary))
        return open_dataset(config, DecoderOnlyFeatures())

    assert opened(moved).vocabulary_size() == 402
    (moved / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    with pytest.raises(
        ValueError, match=r"'targets' was tokenised with .*, VOCABULARY is '.*moved'"
    ):
        opened(moved)
    with pytest.raises(ValueError, match="VOCABULARY is 'bytes'"):
        opened("bytes")
    other = open_dataset(
        make_config(mixture_or_task_name="other", vocabulary=str(tokenizer_folder)),
        DecoderOnlyFeatures(),
    ).fingerprint()
    assert other["vocabularies"]["targets"]["sha256"] == feature["vocabulary"]["sha256"]


def test_another_start_of_texts_is_told(make_config, monkeypatch):
    from upcycle_jax.data import seqio_dataset

    told = []
    monkeypatch.setattr(
        seqio_dataset.logging, "log_first_n", lambda level, text, n, *args: told.append(text % args)
    )
    open_dataset(make_config(), DecoderOnlyFeatures(bos_id=BOS)).eval_batches()
    assert not told
    open_dataset(make_config(), DecoderOnlyFeatures()).eval_batches()
    assert len(told) == 1 and "bos_id is 0, " in told[0] and "begin with 400: set BOS_ID" in told[0]


def test_a_tokenizer_without_eos_is_refused(make_config, tokenizer_folder, tmp_path):
    silent = shutil.copytree(tokenizer_folder, tmp_path / "silent")
    (silent / "tokenizer_config.json").write_text("{}")
    config = make_config(mixture_or_task_name="silent", vocabulary=str(silent))
    with pytest.raises(ValueError, match=r"silent.*states no EOS, which language modelling puts"):
        open_dataset(config, DecoderOnlyFeatures()).train_iterator()


def test_inputs_go_on_with_targets(tokenizer_folder, vocabulary):
    """A labelled task over another vocabulary: no EOS between question and answer, loss on the
    answer alone.
    """
    from upcycle_jax.data.examples import task_examples
    from upcycle_jax.data.prompts import FewShot

    name = "answered_aloud"
    if name not in seqio.TaskRegistry.names():
        pairs = {"inputs": ["say wow!", "say ha!"], "targets": [" wow!", " ha!!"]}
        from upcycle_jax.data import sources

        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(pairs),
                splits=["train", "validation"],
            ),
            preprocessors=[
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=sources.output_features(seqio.ByteVocabulary()),
        )
    config = DatasetConfig(
        name,
        {"inputs": 10, "targets": 8},
        batch_size=2,
        split="validation",
        vocabulary=str(tokenizer_folder),
    )
    features = DecoderOnlyFeatures(bos_id=BOS)
    (batch,) = open_dataset(config, features).eval_batches()[name]()
    for row, question, answer in zip(
        range(2), ("say wow!", "say ha!"), (" wow!", " ha!!"), strict=True
    ):
        asked, answered = vocabulary.encode(question), [*vocabulary.encode(answer), EOS]
        count = len(asked) + len(answered)
        assert batch[TOKENS][row, :count].tolist() == asked + answered
        weights = [0] * len(asked) + [1] * len(answered) + [0] * (18 - count)
        assert batch["decoder_loss_weights"][row].tolist() == weights
        assert batch[SEGMENTS][row].tolist() == [1] * count + [0] * (18 - count)
    (task,) = task_examples(config, features)
    first, second = task.examples()
    assert task.eos_ids == (EOS,) and task.decode([0, 0]) == "!!"  # a prediction of full length
    assert task.decode([*vocabulary.encode(" ha!!"), EOS, 0, 0]) == " ha!!"
    padded = task.padded_targets(second)
    assert padded.shape == (8,) and task.decode(padded) == " ha!!"
    np.testing.assert_array_equal(task.batch([first], 1)[TOKENS][0], batch[TOKENS][0])
    (solved,) = task_examples(
        DatasetConfig(
            name,
            {"inputs": 40, "targets": 8},
            split="validation",
            vocabulary=str(tokenizer_folder),
        ),
        features,
        FewShot(num_shots=1, template="{inputs}{targets}", pool=2),
    )
    shown = next(iter(solved.examples()))
    text = vocabulary.decode(shown["inputs"].tolist())
    assert shown["num_shots"] == 1 and text.endswith("\n\nsay wow!") and EOS not in shown["inputs"]
    with pytest.raises(ValueError, match=r"has \['inputs'\], which task_feature_lengths"):
        task_examples(
            DatasetConfig(name, {"targets": 8}, split="validation", vocabulary="bytes"), features
        )
