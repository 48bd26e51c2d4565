"""The command that writes caches: what it leaves on disk, how it goes on, and what it refuses; and
the errors of bad caches.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from upcycle_jax import cache_tasks, check, leases
from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.cache import format as cache_format
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

seqio = pytest.importorskip("seqio", reason="caches are written by SeqIO")
from upcycle_jax.data.cache import writer  # noqa: E402

FEATURES = EncoderDecoderFeatures()
MODULE = "cached_tasks"
LENGTHS = {"inputs": 24, "targets": 12}


@pytest.fixture(scope="module")
def tasks():
    """The module of small tasks, importable by its name."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    yield __import__(MODULE)
    sys.path.remove(str(pathlib.Path(__file__).parent))


@pytest.fixture
def cache(tmp_path, tasks):
    """Runs the command on a task of `cached_tasks`; returns its exit code."""
    tasks.register()

    def run(name=tasks.NAME, *flags):
        return cache_tasks.main(
            [
                f"--tasks={name}",
                f"--output_cache_dir={tmp_path / 'cache'}",
                f"--module_import={MODULE}",
                *flags,
            ]
        )

    configure(cache_dirs=[str(tmp_path / "cache")])
    yield run
    configure()


def config(name="small_sums", **changes):
    return DatasetConfig(
        name,
        **{
            "task_feature_lengths": LENGTHS,
            "batch_size": 4,
            "seed": 0,
            "use_cached": True,
            **changes,
        },
    )


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_records_hold_every_kind_of_feature():
    example = {
        "targets": np.array([1, 2, 300], np.int64),
        "idx": np.int32(7),
        "text": b"words",
        "answers": np.array([b"one", b"two"], object),
        "table": np.arange(6, dtype=np.float32).reshape(2, 3),
        "sure": np.bool_(True),
    }
    back = cache_format.decode(
        cache_format.encode(example, token_dtypes={"targets": "uint16"}),
        token_dtypes={"targets": "uint16"},
    )
    assert back["targets"].tolist() == [1, 2, 300] and back["targets"].dtype == np.int32
    assert (back["idx"], back["text"], back["answers"], back["sure"]) == (
        7,
        b"words",
        [b"one", b"two"],
        True,
    )
    np.testing.assert_array_equal(back["table"], example["table"])
    assert (
        cache_format.token_dtype(65536) == "uint16" and cache_format.token_dtype(65537) == "int32"
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 65536], "'targets' holds the token id 65536, which its vocabulary does not have"),
        ([-1, 5], "'targets' holds the token id -1, "),
        ([0.5], "'targets' holds float64 values: only token ids"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_not_wrapped(tokens, message):
    with pytest.raises(ValueError, match=message):
        cache_format.encode({"targets": np.array(tokens)}, token_dtypes={"targets": "uint16"})
    dtypes = {"targets": "int32"}
    none = cache_format.encode({"targets": np.array([])}, token_dtypes=dtypes)
    assert cache_format.decode(none, token_dtypes=dtypes)["targets"].tolist() == []


def test_the_manifest_says_what_was_cached(cache, tmp_path, capsys):
    assert cache() == 0
    out = capsys.readouterr().out
    # Targets 'is n' of n + n % 7 below 10, 100 or 97: tokens are bytes, counted before EOS.
    tokens = sum(len(f"is {n + n % 7}") for n in range(90))
    assert re.search(rf"small_sums, train: 90 examples, .*{tokens:,} tokens of targets", out)
    folder = tmp_path / "cache" / "small_sums"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["splits"]["train"]["records"] == 90
        and manifest["splits"]["validation"]["tokens"]["targets"] == 21 * 7
    )
    assert manifest["features"]["targets"] | {"vocabulary": None} == {
        "add_eos": True,
        "dtype": "uint16",
        "eos_id": 1,
        "vocabulary": None,
    }
    assert manifest["features"]["targets"]["vocabulary"]["size"] == 359 and manifest["steps"] == [
        {"step": "append_eos"}
    ]
    assert (
        manifest["versions"].keys() == {"seqio", "tensorflow", "array_record"}
        and manifest["identity"]["seed"] == 0
    )
    names = {
        file["name"]
        for split in manifest["splits"].values()
        for file in (*split["files"], split["index"])
    }
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}
    assert not (tmp_path / "cache" / "small_sums.unfinished").exists()
    for split in manifest["splits"].values():
        for file in (*split["files"], split["index"]):
            assert cache_format.sha256_of_file(folder / file["name"]) == file["sha256"]


def test_a_finished_cache_is_left_alone_and_another_is_not_replaced_unasked(
    cache, tmp_path, capsys
):
    assert cache() == 0
    folder = tmp_path / "cache" / "small_sums"
    before = files_of(folder)
    assert cache() == 0 and "cached already" in capsys.readouterr().out
    assert cache("small_sums", "--seed=3") == 2
    message = capsys.readouterr().err
    assert re.search(
        r"small_sums holds another cache of 'small_sums':\n  seed: was 0, is 3\n.*--overwrite",
        message,
    )
    assert files_of(folder) == before
    assert cache("small_sums", "--seed=3", "--overwrite") == 0
    assert json.loads((folder / "manifest.json").read_text())["identity"]["seed"] == 3
    left = (
        folder.parent / "small_sums.replaced"
    )  # by a call that was killed after it had replaced the cache
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert cache("small_sums", "--overwrite") == 0
    assert [path.name for path in folder.parent.iterdir()] == ["small_sums"]


def test_a_dry_run_writes_nothing(cache, tmp_path, capsys):
    assert cache("small_sums", "--dry_run") == 0
    assert (
        "small_sums: train in 1 parts, validation in 1 parts; when it is read: append_eos"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "cache").exists()


KILLED = """
import pathlib, sys, time
from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.cache import writer
text, folder = sys.argv[1:]
encode = writer.cache_format.encode
def slowly(*args, **kwargs):
    time.sleep(0.1)
    return encode(*args, **kwargs)
writer.cache_format.encode = slowly
config = DatasetConfig("killed_text", {"inputs": 64, "targets": 16}, text_files=[text])
options = writer.CacheOptions(output_cache_dir=pathlib.Path(folder), num_shards=4)
writer.write_caches(config, options)
"""


def test_killed_and_started_again_it_ends_with_the_same_files(tmp_path, text_folder):
    text = str(text_folder / "words.txt")
    config = DatasetConfig("killed_text", {"inputs": 64, "targets": 16}, text_files=[text])

    def write(folder):
        options = writer.CacheOptions(output_cache_dir=tmp_path / folder, num_shards=4)
        writer.write_caches(config, options)

    write("whole")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, text, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    work = tmp_path / "killed" / "killed_text.unfinished"
    deadline = time.monotonic() + 200
    while not (work / "train-00001-of-00004.json").exists():
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    first = work / "train-00000-of-00004.array_record"
    written = first.stat().st_mtime_ns
    write("killed")
    done = tmp_path / "killed" / "killed_text"
    assert files_of(done) == files_of(tmp_path / "whole" / "killed_text")
    assert (done / first.name).stat().st_mtime_ns == written and not work.exists()


def test_unfinished_work_of_something_else_is_told(cache, tmp_path, capsys):
    assert cache() == 0
    folder = tmp_path / "cache" / "small_sums"
    work = folder.with_name("small_sums.unfinished")
    folder.rename(work)
    (work / "plan.json").write_text(
        json.dumps(json.loads((work / "manifest.json").read_text())["identity"] | {"seed": 9})
    )
    assert cache() == 2
    assert re.search(
        r"unfinished is an unfinished cache of something else:\n  seed: was 9, is 0",
        capsys.readouterr().err,
    )
    assert cache("small_sums", "--overwrite") == 0 and not work.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks=small_sum"],
            r"no SeqIO task or mixture is named 'small_sum': did you mean 'small_sums'",
        ),
        (
            ["--tasks=small_sums", "--splits=test"],
            r"'small_sums' has no split \['test'\]: it has \['train', 'validation'\]",
        ),
        (["--tasks=small_sums", "--num_shards=0"], r"--num_shards is 0: give at least 1"),
        ([], r"no task is named: give --tasks, or a gin file with MIXTURE_OR_TASK_NAME"),
        (
            ["--tasks=small_sums", "--output_cache_dir=gs://bucket/cache"],
            r"'gs:/+bucket/cache': ArrayRecord files are written to local",
        ),
        (
            ["--tasks=small_sums", "--output_cache_dir=/dev/null/cache"],
            r"in /dev/null/cache cannot be written to .*: choose another --output_cache_dir",
        ),
    ],
)
def test_bad_flags(cache, tasks, tmp_path, capsys, flags, message):
    assert (
        cache_tasks.main(
            [f"--output_cache_dir={tmp_path / 'cache'}", f"--module_import={MODULE}", *flags]
        )
        == 2
    )
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "cache").exists()


def test_steps_of_ones_own_are_frozen_for_given_lengths(cache, tasks, capsys):
    name = tasks.register_with_own_step("small_questions")
    assert cache(name) == 2
    assert re.search(
        r"cannot be cached before these steps: shout\(mark='\?'\), append_eos\."
        r" .*task_feature_lengths",
        capsys.readouterr().err,
    )
    assert cache(name, f"--gin.DatasetConfig.task_feature_lengths={LENGTHS}") == 0
    assert (
        "these steps run once and are the same in every epoch: shout(mark='?')"
        in capsys.readouterr().out
    )
    (batches,) = open_dataset(config(name, split="validation"), FEATURES).eval_batches(1).values()
    (on_the_fly,) = (
        open_dataset(config(name, split="validation", use_cached=False), FEATURES)
        .eval_batches(1)
        .values()
    )
    for ours, theirs in zip(batches(), on_the_fly(), strict=True):
        for feature in theirs:
            np.testing.assert_array_equal(ours[feature], theirs[feature])
    with pytest.raises(
        ValueError,
        match=(
            r"examples were made for lengths .*'inputs': 24.* but task_feature_lengths is"
            r" .*'inputs': 8.*--overwrite"
        ),
    ) as error:
        open_dataset(
            config(name, task_feature_lengths={"inputs": 8, "targets": 8}), FEATURES
        ).train_iterator()
    told = re.search(r"`python -m upcycle_jax.cache_tasks (.*?)`", str(error.value)).group(1)
    assert cache_tasks.main(shlex.split(told)) == 0
    shapes = {
        rows.shape
        for rows in next(
            open_dataset(
                config(name, task_feature_lengths={"inputs": 8, "targets": 8}), FEATURES
            ).train_iterator()
        ).values()
    }
    assert shapes == {(4, 8)}


def test_a_missing_cache_names_the_command(tmp_path):
    configure()
    command = (
        "python -m upcycle_jax.cache_tasks --tasks=small_sums --output_cache_dir=cache"
        " --module_import=cached_tasks"
    )
    where = r"is not cached \(looked in no folder: name it with --seqio_additional_cache_dirs\)\."
    with pytest.raises(FileNotFoundError, match=rf"{where} Prepare it with `{command}`"):
        open_dataset(config(module=MODULE), FEATURES).train_iterator()
    configure(cache_dirs=[str(tmp_path)])
    words = tmp_path / "words.txt"
    words.write_text(
        "\n\n".join(
            f"Paragraph {n} has words of its own, {n * n} of them. " * 60 for n in range(30)
        )
    )
    own = config(
        "own",
        text_files=[str(words)],
        vocabulary="bytes",
        objective="prefix_lm",
        task_feature_lengths={"inputs": 32, "targets": 32},
    )
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(own, FEATURES).vocabulary_size()
    told = re.search(r"`python -m upcycle_jax.cache_tasks (.*?)`", str(error.value)).group(1)
    assert (
        cache_tasks.main(shlex.split(told)) == 0
    )  # the command that the error names is the one that helps
    assert next(open_dataset(own, FEATURES).train_iterator())["encoder_input_tokens"].shape == (
        4,
        32,
    )
    with pytest.raises(
        ValueError,
        match=r"objective was 'prefix_lm' and is 'ul2'\. Cache it again: `python .*--overwrite`",
    ):
        open_dataset(
            DatasetConfig(
                "own",
                {"inputs": 64, "targets": 64},
                text_files=[str(words)],
                objective="ul2",
                use_cached=True,
            ),
            FEATURES,
        ).train_iterator()
    configure()


def test_check_tells_the_command(tmp_path, capsys):
    flags = [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=runs/pretrain.gin",
        "--gin.MIXTURE_OR_TASK_NAME='c4_span_corruption'",
    ]
    flags += [
        "--gin.USE_CACHED_TASKS=True",
        "--gin.TRAIN_STEPS=1",
        f"--gin.MODEL_DIR='{tmp_path}/run'",
        "--gin.BATCH_SIZE=8",
    ]
    assert check.main([*flags, f"--seqio_additional_cache_dirs={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"PROBLEM  data \(c4_span_corruption, train\): .*`python -m upcycle_jax.cache_tasks"
        rf" --tasks=c4_span_corruption --output_cache_dir={tmp_path}`",
        out,
    )


def test_damage_is_told_with_the_remedy(cache, tmp_path, capsys):
    assert cache() == 0
    folder = tmp_path / "cache" / "small_sums"
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)

    def restored():
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)

    remedy = (
        r"`python -m upcycle_jax.cache_tasks --tasks=small_sums --output_cache_dir=.*cache"
        r" --overwrite`"
    )
    (file,) = folder.glob("train*.array_record")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        ValueError,
        match=(rf"'small_sums' is damaged: .*train-.* has [\d,]+ bytes, not [\d,]+\. .*{remedy}"),
    ):
        open_dataset(config(), FEATURES).train_iterator()
    restored()
    file.unlink()
    with pytest.raises(ValueError, match=rf"is damaged: .*array_record is missing\. .*{remedy}"):
        open_dataset(config(), FEATURES).vocabulary_size()
    restored()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=rf"manifest\.json cannot be read .*{remedy}"):
        open_dataset(config(), FEATURES).fingerprint()
    restored()
    task = cache_format.CachedTask.open(folder, remedy="r")
    task.verify()
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(ValueError, match="has other content than was written. To make it again: r"):
        task.verify()
    with pytest.raises(ValueError, match=r"'small_sums' is damaged: .*other content"):
        open_dataset(config(), FEATURES).verify()  # what `check` calls
    assert cache("small_sums", "--verify") == 2
    assert "is damaged" in capsys.readouterr().err
    restored()
    data = bytearray(file.read_bytes())
    middle = [place for place in range(200, len(data)) if data[place]][len(data) // 400]
    data[middle : middle + 4] = bytes(byte ^ 0x5A for byte in data[middle : middle + 4])
    file.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=rf"is damaged: .*small_sums, split 'train'.*To make it again: {remedy}"
    ):
        [
            next(iterator)
            for iterator in [open_dataset(config(), FEATURES).train_iterator()]
            for _ in range(30)
        ]
    restored()
    (index,) = folder.glob("train.ends.npy")
    ends = np.load(index)
    ends[5, 0] += 1  # as long as before, and wrong
    np.save(index, ends)
    with pytest.raises(ValueError, match=r"holds \d+ tokens of 'inputs', its index says \d+"):
        [
            next(iterator)
            for iterator in [open_dataset(config(), FEATURES).train_iterator()]
            for _ in range(30)
        ]
    restored()
    assert (
        cache("small_sums", "--verify") == 0
        and "every file as it was written" in capsys.readouterr().out
    )
    with pytest.raises(
        ValueError,
        match=r"the cache of 'small_sums' has no split 'test': it has \['train', 'validation'\]",
    ):
        open_dataset(config(split="test"), FEATURES).train_iterator()


def test_another_vocabulary_is_told(cache, tmp_path, tasks):
    assert cache() == 0
    with pytest.raises(ValueError, match=r"has 100 extra ids, DatasetConfig\.extra_ids is 8"):
        open_dataset(config(vocabulary="bytes", extra_ids=8), FEATURES).train_iterator()
    model = (
        pathlib.Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model"
    )
    if not model.exists():
        pytest.skip("this SeqIO ships no SentencePiece model")
    with pytest.raises(
        ValueError,
        match=r"'inputs' was tokenised with ByteVocabulary, VOCABULARY is '.*sentencepiece\.model'",
    ):
        open_dataset(config(vocabulary=str(model)), FEATURES).train_iterator()
    assert cache("small_sums", f"--gin.DatasetConfig.vocabulary='{model}'", "--overwrite") == 0
    assert (
        open_dataset(config(vocabulary=str(model)), FEATURES).vocabulary_size()
        == open_dataset(config(), FEATURES).vocabulary_size()
        != 359
    )
    copy = tmp_path / "copy.model"
    shutil.copy(model, copy)
    assert (
        open_dataset(config(vocabulary=str(copy)), FEATURES).vocabulary_size()
        == open_dataset(config(), FEATURES).vocabulary_size()
    )  # the same model elsewhere
    copy.write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(
        ValueError,
        match=r"was tokenised with .*sentencepiece\.model, VOCABULARY is '.*copy\.model'",
    ):
        open_dataset(config(vocabulary=str(copy)), FEATURES).train_iterator()


def test_a_mixture_that_lacks_a_task_is_told(cache, tmp_path, tasks):
    tasks.register("small_sums_again")
    tasks.register_mixture("two_sums", {"small_sums": 1.0, "small_sums_again": 1.0})
    assert cache("two_sums") == 0
    assert json.loads((tmp_path / "cache" / "two_sums" / "mixture.json").read_text())["tasks"] == {
        "small_sums": 1.0,
        "small_sums_again": 1.0,
    }
    shutil.rmtree(tmp_path / "cache" / "small_sums_again")
    with pytest.raises(
        FileNotFoundError,
        match=r"'small_sums_again' of the mixture 'two_sums' is not cached.*--tasks=two_sums",
    ):
        open_dataset(config("two_sums"), FEATURES).train_iterator()


def write_as_seqio(folder, split, examples):
    """What SeqIO's own cache command leaves for one split (its Beam pipeline is not needed for so
    few examples).
    """
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    features = {name: {"shape": [None], "dtype": "int32"} for name in ("inputs", "targets")}
    info = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(examples)}))
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for example in examples:
            writer.write(seqio.utils.dict_to_tfexample(example).SerializeToString())


def test_seqios_own_cache_is_read_and_left_alone(cache, tasks, tmp_path, capsys):
    name = tasks.register("small_sums_of_seqio")
    folder = tmp_path / "cache" / name
    for split in ("train", "validation"):
        write_as_seqio(
            folder,
            split,
            [{"inputs": np.array([n, n + 1]), "targets": np.array([n + 2])} for n in range(10, 30)],
        )
    (folder / "COMPLETED").write_text("")
    assert open_dataset(config(name), FEATURES).vocabulary_size() == 359
    batch = next(open_dataset(config(name, shuffle=False), FEATURES).train_iterator())
    assert batch["encoder_input_tokens"][:, :4].tolist() == [
        [n, n + 1, 1, 0] for n in range(10, 14)
    ]  # EOS comes when it is read
    (batches,) = open_dataset(config(name, split="validation"), FEATURES).eval_batches(1).values()
    assert next(batches())["decoder_target_tokens"][0, :3].tolist() == [12, 1, 0]
    with pytest.raises(
        ValueError, match=r"vocabulary is set with use_cached, and the cache is SeqIO's"
    ):
        open_dataset(config(name, vocabulary="bytes"), FEATURES).train_iterator()
    assert cache(name, "--overwrite") == 2
    assert (
        "is there and is no cache of this command (SeqIO's own?): choose another --output_cache_dir"
        in capsys.readouterr().err
    )
    assert (folder / "COMPLETED").exists()


def test_a_call_beside_another_is_refused_and_a_finished_cache_needs_no_lease(
    cache, tmp_path, capsys
):
    folder = tmp_path / "cache"
    lease = {"what": "it", "remedy": "wait"}
    with leases.hold(folder / ".small_sums.lease.json", **lease):
        before = sorted(folder.iterdir())
        assert cache("small_sums") == 2
        assert "the cache of 'small_sums' in" in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before
    assert cache("small_sums") == 0
    with leases.hold(folder / ".small_sums.lease.json", **lease):
        assert cache("small_sums") == 0
