"""The stream from a cache: a function of configuration and seed, the same on any number of
processes, found again at once.
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib

import grain
import numpy as np
import pytest

from upcycle_jax.data import BatchIterator, DatasetConfig, Position, configure, packing
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

pytest.importorskip("seqio", reason="caches are written by SeqIO")

pytestmark = pytest.mark.usefixtures("short_shuffle")
FEATURES = EncoderDecoderFeatures()
BATCHES, SAVED_AT = 12, 5
TOKENS = "encoder_input_tokens"


def load_tasks():
    spec = importlib.util.spec_from_file_location(
        "cached_tasks", pathlib.Path(__file__).with_name("cached_tasks.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(stream, expected):
    for number, (batch, want) in enumerate(zip(stream, expected, strict=True)):
        assert batch.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(
                batch[name], want[name], err_msg=f"batch {number}, {name}"
            )


@pytest.fixture(scope="module")
def write():
    """Caches a configuration's tasks into a folder, in several files each."""
    from upcycle_jax.data.cache.writer import CacheOptions, write_caches

    def write(config, folder, **options):
        lines = []
        settings = {"num_shards": 3, "report": lines.append, **options}
        config = dataclasses.replace(config, use_cached=False)
        written = write_caches(
            config, CacheOptions(output_cache_dir=pathlib.Path(folder), **settings)
        )
        return written, lines

    return write


@pytest.fixture(scope="module")
def folder(make_config, write, tmp_path_factory):
    """A cache folder with both text domains under three objectives, and a task of sums."""
    folder = tmp_path_factory.mktemp("caches")
    tasks = load_tasks()
    for objective, lengths in (
        ("span_corruption", (64, 16)),
        ("prefix_lm", (64, 64)),
        ("ul2", (64, 64)),
    ):
        config = make_config(
            mixture_or_task_name=f"cached_{objective}",
            objective=objective,
            task_feature_lengths=dict(zip(("inputs", "targets"), lengths, strict=True)),
        )
        write(config, folder)
    tasks.register_mixture(
        "cached_sums_and_text", {tasks.register(): 1.0, "cached_prefix_lm_words": 3.0}
    )
    for name in ("cached_sums_and_text", tasks.NAME):
        write(DatasetConfig(name, {"inputs": 64, "targets": 64}), folder)
    return folder


@pytest.fixture(autouse=True)
def cache_dirs(folder):
    configure(cache_dirs=[str(folder)])
    yield
    configure()


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(mixture_or_task_name="cached_span_corruption", use_cached=True)


@pytest.fixture(scope="module")
def saved(config, folder, tmp_path_factory):
    """Twelve batches of an uninterrupted run that saved its position after the fifth, and the
    folder it saved to.
    """
    configure(cache_dirs=[str(folder)])
    place = tmp_path_factory.mktemp("position")
    iterator = open_dataset(config, FEATURES).train_iterator()
    assert isinstance(iterator, BatchIterator)
    batches = take(iterator, SAVED_AT)
    iterator.save(place)
    return batches + take(iterator, BATCHES - SAVED_AT), place


def sums(**changes):
    return DatasetConfig(
        "small_sums",
        **{
            "task_feature_lengths": {"inputs": 24, "targets": 12},
            "use_cached": True,
            "seed": 0,
            **changes,
        },
    )


def test_features_are_those_of_the_fly(saved, config):
    domain = dataclasses.replace(
        config, mixture_or_task_name="cached_span_corruption_words", text_files=None
    )
    on_the_fly = next(
        open_dataset(dataclasses.replace(domain, use_cached=False), FEATURES).train_iterator()
    )
    batch = saved[0][0]
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in on_the_fly.items()
    }
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_target_tokens"] > 0)
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], batch["decoder_target_tokens"][:, :-1]
    )
    assert (batch[TOKENS] > 0).all() and (batch[TOKENS][:, -1] == 1).all()


@pytest.mark.parametrize(
    ("pack", "processes"),
    [
        (False, 2),
        (True, 4),
        pytest.param(False, 4, marks=pytest.mark.slow),
        pytest.param(True, 2, marks=pytest.mark.slow),
    ],
)
def test_global_batches_do_not_depend_on_the_number_of_processes(
    config, pack, processes, monkeypatch
):
    monkeypatch.setattr(packing, "WINDOW", 128)  # what is planned at a time, for the first batch
    wanted = dataclasses.replace(config if not pack else sums(), pack=pack, batch_size=8)
    whole = take(open_dataset(wanted, FEATURES).train_iterator(), 6)
    parts = [
        take(open_dataset(wanted, FEATURES).train_iterator(index, processes), 6)
        for index in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[number][name] for part in parts]) for name in whole[0]}
        for number in range(6)
    ]
    assert_same(joined, whole)


def test_a_position_is_taken_up_on_another_number_of_processes(saved, config):
    batches, place = saved
    parts = [open_dataset(config, FEATURES).train_iterator(index, 4) for index in range(4)]
    for part in parts:
        next(part)  # an iterator that has moved is put right too
        part.restore(place)
        assert part.position == SAVED_AT
    steps = [[next(part) for part in parts] for _ in range(BATCHES - SAVED_AT)]
    assert_same(
        [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in steps
        ],
        batches[SAVED_AT:],
    )


def test_seek_forwards_and_backwards(saved, config):
    batches, _ = saved
    iterator = open_dataset(config, FEATURES).train_iterator()
    for number in (7, 1, 0):
        iterator.seek(number)
        assert iterator.position == number
        assert_same(take(iterator, 2), batches[number : number + 2])
    iterator.seek(10**9)
    assert next(iterator)[TOKENS].shape == (8, 64)
    with pytest.raises(ValueError, match="cannot seek to batch -1"):
        iterator.seek(-1)


def test_packed_position_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 128)
    config = sums(pack=True, batch_size=4, task_feature_lengths={"inputs": 48, "targets": 32})
    iterator = open_dataset(config, FEATURES).train_iterator()
    take(iterator, 30)  # beyond the first window of the plan
    iterator.save(tmp_path)
    assert Position.read(tmp_path).packing["window"] >= 1
    want = take(iterator, 3)
    again = open_dataset(config, FEATURES).train_iterator()
    again.restore(tmp_path)
    assert_same(take(again, 3), want)
    again.seek(30)
    assert_same(take(again, 1), want[:1])
    batch = want[0]
    assert (
        batch["encoder_segment_ids"].max() >= 3
        and (batch["encoder_positions"][batch["encoder_segment_ids"] == 0] == 0).all()
    )


def test_another_stream_is_refused(saved, config, tmp_path):
    position = json.loads((saved[1] / "position.json").read_text())
    position["fingerprint"]["tasks"]["cached_span_corruption_code"]["source"]["cache"] = "0"
    (tmp_path / "position.json").write_text(json.dumps(position))
    with pytest.raises(
        ValueError,
        match=r"belongs to another stream(.|\n)*cached_span_corruption_code/source/cache: was '0'",
    ):
        open_dataset(config, FEATURES).train_iterator().restore(tmp_path)


def test_seeds(saved, config):
    assert_same(take(open_dataset(config, FEATURES).train_iterator(), 2), saved[0][:2])
    other = next(open_dataset(dataclasses.replace(config, seed=1), FEATURES).train_iterator())
    assert (other[TOKENS] != saved[0][0][TOKENS]).any()
    drawn = dataclasses.replace(config, seed=None)
    first, second = (
        open_dataset(drawn, FEATURES).train_iterator(),
        open_dataset(drawn, FEATURES).train_iterator(),
    )
    assert first.seed != second.seed
    with pytest.raises(ValueError, match=r"seed is None with 2 processes"):
        open_dataset(drawn, FEATURES).train_iterator(0, 2)


def decode(row):
    return bytes(int(token) - 3 for token in row if 3 <= token < 259).decode()


def test_every_epoch_has_each_example_once_in_another_order():
    iterator = open_dataset(sums(batch_size=30), FEATURES).train_iterator()
    epochs = [
        [decode(row) for batch in take(iterator, 3) for row in batch[TOKENS]] for _ in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{n} + {n % 7}" for n in range(90))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    ordered = open_dataset(sums(batch_size=30, shuffle=False), FEATURES).train_iterator()
    assert [decode(row) for batch in take(ordered, 3) for row in batch[TOKENS]] == [
        f"{n} + {n % 7}" for n in range(90)
    ]


def count_reads(view):
    """The numbers of the records that a view reads from now on."""
    records, read = view._records, []

    class Counting:
        def __getitem__(self, number):
            read.append(number)
            return records[number]

    view._records = Counting()
    return read


def test_a_record_is_read_once_for_an_example():
    from upcycle_jax.data.cache import lookup, views

    ((task, _),) = lookup.find(sums(), FEATURES).tasks
    view = views.open_view(task, "train", sums().task_feature_lengths, FEATURES.task_features)
    read = count_reads(view)
    examples = view.examples([views.Draw(place, 0, place) for place in (7, 3)], key=0)
    assert [decode(example["inputs"]) for example in examples] == ["7 + 0", "3 + 3"] and read == [
        7,
        3,
    ]


@pytest.mark.parametrize("held", [True, False])
def test_a_small_text_is_read_once_and_a_large_one_at_each_segment(config, held, monkeypatch):
    """Two passes over the first records: the same tokens from memory and from disk."""
    from upcycle_jax.data.cache import lookup, views

    (task, *_) = [task for task, _ in lookup.find(config, FEATURES).tasks]
    if not held:
        monkeypatch.setattr(views, "HELD_TOKENS", 1)
    view = views.open_view(task, "train", config.task_feature_lengths, FEATURES.task_features)
    text = np.concatenate([view._records[number]["targets"] for number in range(4)])
    read = count_reads(view)
    starts = range(0, len(text) - 20, max(1, len(text) // 40))
    for _ in range(2):
        for start in starts:
            np.testing.assert_array_equal(view._tokens(start, start + 20), text[start:][:20])
    assert (max(read.count(number) for number in read) == 1) == held


def test_shuffling_is_global(config):
    """The first batch of a long text comes from all over it."""
    from upcycle_jax.data.cache import lookup, views

    task = {task.manifest.task: task for task, _ in lookup.find(config, FEATURES).tasks}[
        "cached_span_corruption_code"
    ]
    count = len(views.open_view(task, "train", config.task_feature_lengths, FEATURES.task_features))
    places = [grain.MapDataset.range(count).shuffle(seed=0)[n] for n in range(64)]
    assert len(set(places)) == 64 and min(places) < count / 8 and max(places) > count * 7 / 8


def test_noise_and_cuts_are_fresh_in_each_epoch(make_config):
    config = make_config(
        mixture_or_task_name="cached_span_corruption_words",
        text_files=None,
        use_cached=True,
        shuffle=False,
        batch_size=1,
    )
    iterator = open_dataset(config, FEATURES).train_iterator()
    views = iterator._source._examples._views
    per_epoch = len(views[0])
    first = [next(iterator)[TOKENS][0] for _ in range(20)]
    iterator.seek(per_epoch)
    second = [next(iterator)[TOKENS][0] for _ in range(20)]
    places = (
        [tuple(np.flatnonzero(row >= 259)) for row in first],
        [tuple(np.flatnonzero(row >= 259)) for row in second],
    )
    assert sum(a == b for a, b in zip(*places, strict=True)) < 10  # other noise
    assert decode(first[0])[:8] != decode(second[0])[:8]  # other cuts


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm", "ul2"])
def test_one_pass_holds_the_whole_text_once(objective, make_config):
    """Inputs and targets together are the text, in its order: noise loses nothing and no token is
    read twice.
    """
    lengths = {"span_corruption": (64, 16)}.get(objective, (64, 64))
    config = make_config(
        mixture_or_task_name=f"cached_{objective}",
        objective=objective,
        task_feature_lengths=dict(zip(("inputs", "targets"), lengths, strict=True)),
        use_cached=True,
        split="validation",
    )
    from upcycle_jax.data import resolve

    corpora = {
        task.name: task.source.corpus
        for task in resolve.tasks(dataclasses.replace(config, use_cached=False))
    }
    for name, start in open_dataset(config, FEATURES).eval_batches().items():
        text = b"".join(corpora[name].splits["validation"])
        rows = [
            pair
            for batch in start()
            for pair in zip(batch[TOKENS], batch["decoder_target_tokens"], strict=True)
        ]
        pieces = [
            reassemble(inputs, targets, prefixed=objective == "ul2") for inputs, targets in rows
        ]
        assert b"".join(pieces) == text
        again = list(start())
        assert_same(again, list(start()))


def reassemble(inputs, targets, *, prefixed):
    """Text of a corrupted pair: the k-th sentinel of the inputs stands for what follows the k-th
    sentinel of the targets.
    """
    inputs, targets = ([int(token) for token in row if token > 1] for row in (inputs, targets))
    text = bytearray()
    if not any(token >= 259 for token in inputs):  # a prefix and its continuation
        text = bytearray(token - 3 for token in [*inputs, *targets])
    else:
        hidden: dict = {}
        for token in targets:
            if token >= 259:
                current = hidden.setdefault(token, [])
            else:
                current.append(token - 3)
        for token in inputs:
            text.extend(hidden.pop(token) if token >= 259 else [token - 3])
    if prefixed and text:
        assert text[:6] in (b"[NLU] ", b"[NLG] ", b"[S2S] ")
        del text[:6]
    return bytes(text)


def test_ul2_uses_all_its_denoisers(make_config):
    config = make_config(
        mixture_or_task_name="cached_ul2",
        objective="ul2",
        task_feature_lengths={"inputs": 64, "targets": 64},
        use_cached=True,
        batch_size=70,
    )
    batch = next(open_dataset(config, FEATURES).train_iterator())
    modes = [decode(row)[:5] for row in batch[TOKENS]]
    # Seven denoisers in equal shares: [NLU] 2/7, [NLG] 4/7, [S2S] 1/7 of 70, each within 5 standard
    # deviations (at most 4.1).
    assert (
        abs(modes.count("[NLU]") - 20) < 20
        and abs(modes.count("[NLG]") - 40) < 21
        and 0 < modes.count("[S2S]") < 26
    )
    assert len(modes) == modes.count("[NLU]") + modes.count("[NLG]") + modes.count("[S2S]")


def test_mixtures_follow_their_rates_exactly():
    config = DatasetConfig(
        "cached_sums_and_text",
        {"inputs": 64, "targets": 64},
        batch_size=400,
        use_cached=True,
        seed=0,
    )
    assert (
        open_dataset(config, FEATURES).task_names() == ("cached_prefix_lm_words", "small_sums")
        and open_dataset(config, FEATURES).vocabulary_size() == 359
    )
    texts = [decode(row) for row in next(open_dataset(config, FEATURES).train_iterator())[TOKENS]]
    assert sum(" + " in text for text in texts) == 100  # rates 1 and 3


def test_evaluation_shares_batches_and_fills_the_last():
    config = sums(split="validation", batch_size=8)
    (whole,) = (list(start()) for start in open_dataset(config, FEATURES).eval_batches().values())
    texts = [decode(row) for batch in whole for row in batch[TOKENS]]
    assert texts == [f"{n} + {n % 7}" for n in range(1000, 1021)] + [""] * 3
    assert not whole[-1]["decoder_loss_weights"][5:].any()
    parts = [
        list(
            open_dataset(config, FEATURES).eval_batches(2, process_index=index, process_count=2)[
                "small_sums"
            ]()
        )
        for index in range(2)
    ]
    for batch, first, second in zip(whole[:2], *parts, strict=True):
        np.testing.assert_array_equal(
            np.concatenate([first[TOKENS], second[TOKENS]]), batch[TOKENS]
        )
    with pytest.raises(ValueError, match="num_batches is 0"):
        open_dataset(config, FEATURES).eval_batches(0)
    on_the_fly = list(
        open_dataset(dataclasses.replace(config, use_cached=False), FEATURES).eval_batches()[
            "small_sums"
        ]()
    )
    assert_same(whole, on_the_fly)


def test_fingerprints_are_small_and_name_the_cache(config):
    fingerprint = open_dataset(config, FEATURES).fingerprint()
    assert (
        json.loads(json.dumps(fingerprint)) == fingerprint and len(json.dumps(fingerprint)) < 5000
    )
    assert fingerprint["tasks"]["cached_span_corruption_code"]["source"].keys() == {"cache"}
    assert fingerprint["vocabularies"]["inputs"]["kind"] == "ByteVocabulary"


def test_metrics_of_a_cached_task_need_its_text_only():
    """Prediction reads the cache, with everything that the task keeps, and the task's own
    metrics.
    """
    from upcycle_jax.data.examples import task_examples

    for limit, use_cached in ((None, True), (4, False)):
        (task,) = task_examples(sums(split="validation", use_cached=use_cached), FEATURES)
        examples = list(task.examples(limit))
        assert task.record(examples[2]) == {
            "inputs_pretokenized": "1002 + 1",
            "targets_pretokenized": "is 1003",
        }
        assert [int(example["idx"]) for example in examples[:3]] == [1000, 1001, 1002]
        assert examples[2]["targets"].tolist() == [*(byte + 3 for byte in b"is 1003"), 1]
    (task,) = task_examples(sums(split="validation"), FEATURES)
    assert len(list(task.examples())) == 21 and len(list(task.examples(shard=1, num_shards=4))) == 5
    answers = [example["targets"][:-1] for example in task.examples()]
    result = task.evaluate(list(task.examples()), {"prediction": [*answers[:7], *answers[:14]]})
    assert result.metrics == {"exact": 7 / 21}
    (text,) = task_examples(
        DatasetConfig(
            "cached_ul2_words",
            {"inputs": 64, "targets": 64},
            use_cached=True,
            split="validation",
            seed=0,
        ),
        FEATURES,
    )
    assert {"inputs", "targets"} <= next(text.examples()).keys()
