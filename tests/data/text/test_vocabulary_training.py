"""A trained vocabulary loses nothing, has T5's special ids, is repeatable, and serves a task."""

import numpy as np
import pytest

from upcycle_jax import train_vocab
from upcycle_jax.data.text import vocabulary_training

sentencepiece = pytest.importorskip("sentencepiece", reason="comes with seqio")


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    """A vocabulary of 512 pieces, made by the command."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    arguments = [f"--text_files={text_folder / '*.txt'}", "--vocab_size=512", f"--output={path}"]
    assert train_vocab.main(arguments) == 0
    return path, arguments


def test_special_ids_are_t5s(trained):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained[0]))
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (
        0,
        1,
        2,
        -1,
    )
    assert processor.get_piece_size() == 512


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\tif x:\n        return  {'a': 12}\n\n",
        "  leading",
        "ünï ∀ 漢字 \u00a0",
        "a\r\nb",
        "",
    ],
)
def test_nothing_is_lost(trained, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained[0]))
    assert processor.decode(processor.encode(text)) == text


def test_tensorflow_reads_it_alike(trained):
    seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    vocabulary = seqio.SentencePieceVocabulary(str(trained[0]), extra_ids=100)
    text = "def f(x):\n    return  x\n"
    assert vocabulary.vocab_size == 612
    np.testing.assert_array_equal(vocabulary.encode_tf(text), vocabulary.encode(text))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_the_same_text_gives_the_same_model(trained, text_folder, tmp_path):
    texts = vocabulary_training.read_texts([str(text_folder / "*.txt")])
    vocabulary_training.train_vocabulary(texts, tmp_path / "again.model", size=512)
    assert (tmp_path / "again.model").read_bytes() == trained[0].read_bytes()


def test_a_sample_is_spread_over_the_texts():
    texts = [str(n) * 1000 for n in range(10)]
    sample = vocabulary_training._sample(texts, 500)
    assert sum(map(len, sample)) <= 500 and {text[0] for text in sample} == set("0123456789")
    assert vocabulary_training._sample(texts, 10_000) == texts


def test_bad_requests_name_the_remedy(trained, text_folder, tmp_path, capsys):
    _, arguments = trained
    assert train_vocab.main(arguments) == 1
    assert "is there already, and checkpoints may depend on it" in capsys.readouterr().err
    assert train_vocab.main([*arguments[:1], "--vocab_size=100", f"--output={tmp_path / 'v'}"]) == 1
    assert "vocab_size is 100: 261 pieces are fixed" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("A few words only.")
    assert (
        train_vocab.main([f"--text_files={tmp_path / 'short.txt'}", f"--output={tmp_path / 'v'}"])
        == 1
    )
    assert "cannot be trained on 17 characters of text" in capsys.readouterr().err
    assert (
        train_vocab.main([f"--text_files={tmp_path / 'none*'}", f"--output={tmp_path / 'v'}"]) == 1
    )
    assert "nothing matches" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()
