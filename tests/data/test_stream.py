"""The training stream: a pure function of configuration and seed, found again exactly, divided
without overlap.
"""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from upcycle_jax.data import BatchIterator, DatasetConfig, Position
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.data.position import DamagedPositionError
from upcycle_jax.features import EncoderDecoderFeatures

pytest.importorskip("seqio", reason="SeqIO tasks need seqio")

pytestmark = pytest.mark.usefixtures("short_shuffle")
FEATURES = EncoderDecoderFeatures()
BATCHES = 12
SAVED_AT = 5


def assert_same(stream, expected):
    for number, (batch, want) in enumerate(zip(stream, expected, strict=True)):
        assert batch.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(
                batch[name], want[name], err_msg=f"batch {number}, {name}"
            )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


@pytest.fixture(scope="module")
def saved(make_config, tmp_path_factory, short_shuffle):
    """Twelve batches of an uninterrupted run that saved its position after the fifth, and the
    folder it saved to.
    """
    folder = tmp_path_factory.mktemp("position")
    iterator = open_dataset(make_config(), FEATURES).train_iterator()
    assert isinstance(iterator, BatchIterator)
    batches = take(iterator, SAVED_AT)
    iterator.save(folder)
    batches += take(iterator, BATCHES - SAVED_AT)
    assert iterator.position == BATCHES
    return batches, folder


def test_features_are_seqios(saved):
    batch = saved[0][0]
    shapes = {name: array.shape for name, array in batch.items()}
    assert shapes == {
        "encoder_input_tokens": (8, 64),
        "decoder_input_tokens": (8, 16),
        "decoder_target_tokens": (8, 16),
        "decoder_loss_weights": (8, 16),
    }
    assert all(array.dtype == np.int32 for array in batch.values())
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_target_tokens"] > 0)
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], batch["decoder_target_tokens"][:, :-1]
    )
    assert (batch["decoder_input_tokens"][:, 0] == 0).all()


@pytest.fixture(scope="module")
def iterator(make_config, short_shuffle):
    """One iterator of the same stream for the tests that move it about: building one takes a second
    or more.
    """
    return open_dataset(make_config(), FEATURES).train_iterator()


def test_same_seed_same_stream(saved, iterator):
    assert_same(take(iterator, 3), saved[0][:3])


def test_restore_continues_bit_for_bit(saved, iterator):
    batches, folder = saved
    next(iterator)  # an iterator that has moved is put right too
    iterator.restore(folder)
    assert iterator.position == SAVED_AT
    assert_same(take(iterator, BATCHES - SAVED_AT), batches[SAVED_AT:])


def test_seek_agrees_with_restore_forwards_and_backwards(saved, iterator):
    batches, folder = saved
    iterator.restore(folder)
    iterator.seek(SAVED_AT + 2)
    assert_same(take(iterator, 2), batches[SAVED_AT + 2 : SAVED_AT + 4])
    iterator.seek(1)
    assert_same(take(iterator, 2), batches[1:3])
    with pytest.raises(ValueError, match="cannot seek to batch -1"):
        iterator.seek(-1)


@pytest.fixture(scope="module")
def elsewhere(saved, make_config, tmp_path_factory, short_shuffle):
    """Another process, and the tokens that it read: one for all that is said of one, since the
    import of TensorFlow takes longer than the rest.
    """
    path = tmp_path_factory.mktemp("elsewhere") / "tokens.npy"
    config = make_config()
    program = f"""
import os, sys
import numpy as np
from upcycle_jax.data import DatasetConfig, opening, tensorflow_import
DatasetConfig("t", {{"inputs": 4, "targets": 4}})
print([name for name in ("tensorflow", "seqio", "t5") if name in sys.modules])
sys.stderr.write("before\\n")
with tensorflow_import._without_chatter():
    os.write(2, b"E0000 00:00:1.5 7 cuda_platform.cc:52] failed call to cuInit\\nsomething else\\n")
tensorflow_import.quietly()
import tensorflow as tf
assert tf.constant(1) + 1 == 2
sys.stderr.write("after\\n")
from upcycle_jax.data import sources
sources.SHUFFLE_BUFFER = {short_shuffle}
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
config = DatasetConfig({config.mixture_or_task_name!r}, {config.task_feature_lengths!r},
                       batch_size=8, seed=0, text_files={config.text_files!r})
iterator = open_dataset(config, EncoderDecoderFeatures()).train_iterator()
iterator.restore({str(saved[1])!r})
rows = [next(iterator)["encoder_input_tokens"] for _ in range({BATCHES - SAVED_AT})]
np.save({str(path)!r}, np.stack(rows))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=180
    )
    return done, np.load(path)


def test_another_process_restores_the_same_stream(saved, elsewhere):
    """Nothing of the position lives in the memory of the process that saved it."""
    want = np.stack([batch["encoder_input_tokens"] for batch in saved[0][SAVED_AT:]])
    np.testing.assert_array_equal(elsewhere[1], want)


def test_importing_the_package_does_not_import_tensorflow(elsewhere):
    assert elsewhere[0].stdout.splitlines()[0] == "[]"


def test_lines_about_missing_gpus_are_left_out_and_nothing_else(elsewhere):
    """What the first import of TensorFlow writes."""
    lines = elsewhere[0].stderr.splitlines()
    assert lines[: lines.index("after")] == ["before", "something else"]


def test_unreadable_iterator_falls_back_to_seeking(saved, iterator, tmp_path, caplog):
    batches, folder = saved
    (tmp_path / "position.json").write_text(
        (folder / "position.json").read_text()
    )  # the iterator's own files are lost
    iterator.restore(tmp_path)
    assert_same(take(iterator, 3), batches[SAVED_AT : SAVED_AT + 3])
    assert "cannot be restored" in caplog.text


def test_position_of_another_stream_is_refused(saved, iterator, tmp_path):
    position = json.loads((saved[1] / "position.json").read_text())
    for (name, *rest), value, message in (
        (("seed",), 3, r"seed: was 3, is 0"),
        (("batch_size",), 4, r"batch_size: was 4, is 8"),
        (("task_feature_lengths", "inputs"), 32, r"task_feature_lengths/inputs: was 32, is 64"),
    ):
        changed = json.loads(json.dumps(position))
        inner = changed["fingerprint"][name] if rest else changed["fingerprint"]
        inner[rest[0] if rest else name] = value
        (tmp_path / "position.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=rf"belongs to another stream(.|\n)*{message}(.|\n)*new MODEL_DIR"
        ):
            iterator.restore(tmp_path)


def test_missing_and_damaged_positions(iterator, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data position at .*position\.json.*seek"):
        iterator.restore(tmp_path)
    iterator.save(tmp_path)
    good = json.loads((tmp_path / "position.json").read_text())
    changes = (
        {"batches": -1},
        {"batches": "3"},
        {"batches": 1.5},
        {"seed": None},
        {"process_count": 0},
        {"fingerprint": [1]},
        {"packing": {"window": "x", "first_row": 0}},
        {"packing": {"window": 0}},
        {"other": 1},
    )
    for text in ("{", "", "3", "null", "[" * 10**5, *(json.dumps(good | c) for c in changes)):
        (tmp_path / "position.json").write_text(text)
        with pytest.raises(DamagedPositionError, match=r"position\.json is damaged"):
            iterator.restore(tmp_path)


@pytest.fixture(scope="module")
def words(make_config, text_folder):
    """Makes configurations of one domain, whose pipelines take half the time to build."""
    files = [str(text_folder / "words.txt")]
    return lambda **changes: make_config(
        mixture_or_task_name="words_alone", text_files=files, **changes
    )


def test_other_seeds_are_other_streams_and_a_drawn_one_is_restored(words, tmp_path):
    first, second = (open_dataset(words(seed=None), FEATURES).train_iterator() for _ in range(2))
    assert first.seed != second.seed
    ours, theirs = (take(iterator, 2)[0]["encoder_input_tokens"] for iterator in (first, second))
    assert (ours != theirs).any()
    first.save(tmp_path)
    second.restore(tmp_path)
    assert second.seed == first.seed == Position.read(tmp_path).seed
    assert_same(take(second, 2), take(first, 2))


def test_processes_read_disjoint_documents_that_cover_all(make_config):
    from upcycle_jax.data import resolve

    seqio = pytest.importorskip("seqio")
    for task in resolve.tasks(make_config()):
        shards = [
            [
                bytes(example["targets"])
                for example in task.source.get_dataset(
                    "train", seed=0, shard_info=seqio.ShardInfo(index, 3)
                ).as_numpy_iterator()
            ]
            for index in range(3)
        ]
        together = sorted(itertools.chain(*shards))
        assert together == sorted(task.source.corpus.splits["train"])
        assert len(set(together)) == len(together)


def test_two_processes_share_a_batch_and_take_up_the_position_of_one(saved, make_config, caplog):
    parts = [
        open_dataset(make_config(), FEATURES).train_iterator(process_index=index, process_count=2)
        for index in range(2)
    ]
    tokens = [next(part)["encoder_input_tokens"] for part in parts]
    assert [array.shape for array in tokens] == [(4, 64), (4, 64)] and (
        tokens[0] != tokens[1]
    ).any()
    parts[1].restore(saved[1])
    assert parts[1].position == SAVED_AT
    assert "saved by 1 processes and is continued by 2" in caplog.text
    with pytest.raises(ValueError, match=r"seed is None with 2 processes.*set DatasetConfig\.seed"):
        open_dataset(make_config(seed=None), FEATURES).train_iterator(
            process_index=0, process_count=2
        )
    with pytest.raises(ValueError, match="batch_size 8 does not divide by 3 processes"):
        open_dataset(make_config(), FEATURES).train_iterator(process_index=0, process_count=3)


def test_epochs_are_shuffled_anew(make_config):
    from upcycle_jax.data import resolve

    source = resolve.tasks(make_config())[0].source
    twice = [
        bytes(example["targets"])
        for example in source.get_dataset("train", seed=0).repeat(2).as_numpy_iterator()
    ]
    first, second = twice[: len(twice) // 2], twice[len(twice) // 2 :]
    assert first != second and sorted(first) == sorted(second)


def test_packing_numbers_segments_and_positions(words, tmp_path):
    config = words(pack=True, task_feature_lengths={"inputs": 128, "targets": 40})
    iterator = open_dataset(config, FEATURES).train_iterator()
    batch = next(iterator)
    assert {
        "encoder_segment_ids",
        "encoder_positions",
        "decoder_segment_ids",
        "decoder_positions",
    } <= batch.keys()
    for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        segments, positions = batch[f"{side}_segment_ids"], batch[f"{side}_positions"]
        np.testing.assert_array_equal(segments > 0, batch[tokens] > 0)
        starts = np.pad(segments[:, :-1], [(0, 0), (1, 0)]) != segments
        assert (positions[starts & (segments > 0)] == 0).all()
        assert (np.diff(positions, axis=1)[~starts[:, 1:] & (segments[:, 1:] > 0)] == 1).all()
    iterator.save(tmp_path)
    want = take(iterator, 2)
    again = open_dataset(config, FEATURES).train_iterator()
    again.restore(tmp_path)
    assert_same(take(again, 2), want)


def test_fingerprint_is_small_json_with_hashes(make_config):
    fingerprint = open_dataset(make_config(), FEATURES).fingerprint()
    text = json.dumps(fingerprint)
    assert len(text) < 5000
    assert json.loads(text) == fingerprint
    assert set(fingerprint["tasks"]) == {"small_text_code", "small_text_words"}
    for task in fingerprint["tasks"].values():
        assert len(task["source"]["train"]["sha256"]) == 64 and task["rate"] == 1.0
    assert fingerprint["vocabularies"]["inputs"] == {"kind": "ByteVocabulary", "size": 359}


def test_configuration_is_checked_at_once():
    lengths = {"inputs": 64, "targets": 16}
    for settings, message in (
        ({"mixture_or_task_name": ""}, "mixture_or_task_name is ''"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"text_files": []}, "text_files names no file"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DatasetConfig(
                **{"mixture_or_task_name": "t", "task_feature_lengths": lengths, **settings}
            )
    with pytest.raises(ValueError, match="it needs a length of at least 1 for 'targets'"):
        open_dataset(DatasetConfig("t", {"inputs": 64}), FEATURES)


def registered(name, rows, *, python=False, features=("inputs", "targets")):
    """Registers a task over (input, target) rows; `python`: read through a Python generator, whose
    state TensorFlow cannot save.
    """
    import seqio
    import tensorflow as tf

    def examples(split, shuffle_files, seed=None):
        made = [{"inputs": source, "targets": target} for source, target in rows]
        kinds = {feature: tf.TensorSpec([], tf.string) for feature in ("inputs", "targets")}
        if python or not made:
            return tf.data.Dataset.from_generator(lambda: iter(made), output_signature=kinds)
        return tf.data.Dataset.from_tensor_slices(
            {feature: [row[feature] for row in made] for feature in kinds}
        )

    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(examples, splits=("train",)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={
                feature: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for feature in features
            },
            metric_fns=[],
        )
    return name


def small_config(name):
    return DatasetConfig(name, {"inputs": 16, "targets": 12}, batch_size=4, seed=0)


ROWS = [(f"question {n}", f"answer {n % 3}") for n in range(40)]


def test_a_task_over_python_saves_its_position_alone_and_resumes(tmp_path, caplog):
    config = small_config(registered("from_python", ROWS, python=True))
    iterator = open_dataset(config, FEATURES).train_iterator()
    take(iterator, 3)
    iterator.save(tmp_path / "a")
    iterator.save(tmp_path / "b")  # the warning comes once
    assert caplog.text.count("PyFunc is stateful") == 1 and "cache_tasks" in caplog.text
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["position.json"]
    expected = take(iterator, 4)
    resumed = open_dataset(config, FEATURES).train_iterator()
    resumed.restore(tmp_path / "a")
    assert_same(take(resumed, 4), expected)


def mixture(name, parts):
    import seqio

    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, parts)
    return name


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"rows": 1.0, "none": 1.0}, r"'none_rows' in 'mix_0' has no example in the split 'train'"),
        ({"rows": 1.0, "more": -1.0}, r"mixing rates of 'mix_1' are \{'more_rows': -1\.0\}"),
        ({"rows": 0.0, "more": 0.0}, r"mixing rates of 'mix_2' are .*one of them above 0"),
        ({"rows": 1.0, "more": lambda task: None}, r"rate of 'more_rows' in 'mix_3' cannot be"),
    ],
)
def test_an_unusable_part_of_a_mixture_is_named(rates, message):
    for part, rows in (("rows", ROWS), ("more", ROWS), ("none", [])):
        registered(f"{part}_rows", rows)
    number = re.search(r"mix_(\d)", message).group(1)
    name = mixture(f"mix_{number}", [(f"{part}_rows", rate) for part, rate in rates.items()])
    with pytest.raises(ValueError, match=message):
        next(open_dataset(small_config(name), FEATURES).train_iterator())


def test_a_task_without_inputs_is_refused():
    name = registered("targets_alone", ROWS, features=("targets",))
    with pytest.raises(ValueError, match=r"'targets_alone' has no feature \['inputs'\]"):
        open_dataset(small_config(name), FEATURES).train_iterator()
