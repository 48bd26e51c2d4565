"""Evaluation passes per domain, the resolution of names, and vocabularies."""

import itertools
import pathlib

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")

pytestmark = pytest.mark.usefixtures("short_shuffle")
FEATURES = EncoderDecoderFeatures()
LENGTHS = {"inputs": 64, "targets": 16}


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(
        split="validation", validation_fraction=0.2, mixture_or_task_name="small_text_eval"
    )


@pytest.fixture(scope="module")
def whole(config):
    """All evaluation batches of each task."""
    return {
        task: list(start()) for task, start in open_dataset(config, FEATURES).eval_batches().items()
    }


def test_one_entry_per_task_and_each_pass_equal(config, whole):
    passes = open_dataset(config, FEATURES).eval_batches()
    assert list(passes) == ["small_text_eval_code", "small_text_eval_words"]
    for task, start in passes.items():
        for _ in range(2):  # the second comes from memory
            for batch, want in zip(start(), whole[task], strict=True):
                for name in want:
                    np.testing.assert_array_equal(batch[name], want[name])


def test_last_batch_is_filled_without_loss_weight(whole):
    for batches in whole.values():
        assert {batch["decoder_loss_weights"].shape for batch in batches} == {(8, 16)}
        real = batches[-1]["decoder_loss_weights"].sum(axis=1) > 0
        assert real.any() and (np.sort(real)[::-1] == real).all()
        assert (batches[-1]["encoder_input_tokens"][~real] == 0).all()


def test_a_pass_holds_the_whole_split(config, whole):
    from upcycle_jax.data import resolve

    for task in resolve.tasks(config):
        text = b"".join(task.source.corpus.splits["validation"])
        ids = np.concatenate(
            [
                np.concatenate(
                    [batch["encoder_input_tokens"].ravel(), batch["decoder_target_tokens"].ravel()]
                )
                for batch in whole[task.name]
            ]
        )
        assert np.isin(ids, range(3, 259)).sum() == len(
            text
        )  # every byte once, in inputs or targets


def test_fixed_number_of_batches(config, whole):
    passes = open_dataset(config, FEATURES).eval_batches(2)
    for task, start in itertools.islice(passes.items(), 1):
        batches = list(start())
        assert len(batches) == 2
        np.testing.assert_array_equal(
            batches[1]["encoder_input_tokens"], whole[task][1]["encoder_input_tokens"]
        )
    with pytest.raises(ValueError, match="num_batches is 0"):
        open_dataset(config, FEATURES).eval_batches(0)


def test_processes_share_each_batch(config, whole):
    parts = [
        open_dataset(config, FEATURES).eval_batches(3, process_index=index, process_count=2)
        for index in range(2)
    ]
    for task, batches in itertools.islice(whole.items(), 1):
        for batch, first, second in zip(
            itertools.islice(batches, 3), parts[0][task](), parts[1][task](), strict=True
        ):
            together = np.concatenate(
                [first["decoder_target_tokens"], second["decoder_target_tokens"]]
            )
            np.testing.assert_array_equal(together, batch["decoder_target_tokens"])


def test_unknown_split_and_name(make_config):
    with pytest.raises(
        ValueError, match=r"'small_text' has no split 'test': it has \['train', 'validation'\]"
    ):
        open_dataset(make_config(split="test"), FEATURES).eval_batches()
    with pytest.raises(
        ValueError,
        match=(
            "no SeqIO task or mixture is named 'embedded_text_span_coruption': did you mean"
            " 'embedded_text_span_c"
        ),
    ):
        open_dataset(DatasetConfig("embedded_text_span_coruption", LENGTHS), FEATURES).task_names()
    with pytest.raises(
        ValueError, match="MIXTURE_OR_TASK_MODULE names 'no_such_module', which is not importable"
    ):
        open_dataset(
            DatasetConfig("anything", LENGTHS, module="no_such_module"), FEATURES
        ).task_names()


def test_a_taken_name_is_refused(make_config, text_folder):
    open_dataset(make_config(), FEATURES).task_names()
    with pytest.raises(
        ValueError,
        match="the name 'small_text' is taken by another SeqIO task or mixture: choose another",
    ):
        open_dataset(make_config(text_files=[str(text_folder / "code.txt")]), FEATURES).task_names()


def test_bad_files_register_nothing(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xff\xfe\x00")
    config = DatasetConfig("bad_text", LENGTHS, text_files={"good": [__file__], "bad": [str(path)]})
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text"):
        open_dataset(config, FEATURES).train_iterator()
    assert not {"bad_text", "bad_text_good", "bad_text_bad"} & {
        *seqio.TaskRegistry.names(),
        *seqio.MixtureRegistry.names(),
    }


def test_sentencepiece_vocabulary_by_path(make_config, text_folder, tmp_path):
    model = (
        pathlib.Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model"
    )
    if not model.exists():
        pytest.skip("this seqio has no test vocabulary")
    config = make_config(
        vocabulary=str(model),
        mixture_or_task_name="small_text_pieces",
        text_files=[str(text_folder / "words.txt")],
    )
    plain = seqio.SentencePieceVocabulary(str(model), extra_ids=100)
    assert open_dataset(config, FEATURES).vocabulary_size() == plain.vocab_size
    tokens = next(open_dataset(config, FEATURES).train_iterator())["encoder_input_tokens"]
    assert 0 < tokens.max() < plain.vocab_size
    assert "sha256" in open_dataset(config, FEATURES).fingerprint()["vocabularies"]["inputs"]
    with pytest.raises(
        FileNotFoundError, match=r"vocabulary '.*absent.*': no such file; give 'bytes'"
    ):
        open_dataset(
            make_config(vocabulary=str(tmp_path / "absent"), mixture_or_task_name="n1"), FEATURES
        ).vocabulary_size()
    (tmp_path / "fake").write_text("no model")
    with pytest.raises(ValueError, match=r"is not a SentencePiece model"):
        open_dataset(
            make_config(vocabulary=str(tmp_path / "fake"), mixture_or_task_name="n2"), FEATURES
        ).vocabulary_size()


def test_byte_vocabulary_size(make_config):
    assert open_dataset(make_config(), FEATURES).vocabulary_size() == 3 + 256 + 100
