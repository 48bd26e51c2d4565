"""Another kind of model brings its converter, and everything in data/ serves it: batches padded and
packed, from a cache and on the fly, examples one by one.
"""

import dataclasses

import jax
import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import (
    DecoderOnlyFeatures,
    EncoderDecoderFeatures,
    FeatureConverter,
    check_lengths,
    sequences,
)

seqio = pytest.importorskip("seqio", reason="caches are written by SeqIO")


@dataclasses.dataclass(frozen=True)
class LineFeatures:
    """A decoder alone, which learns the targets: the features of `seqio.LMFeatureConverter`."""

    task_features = ("targets",)
    optional_features = ()
    annotations = ()
    targets = "decoder_target_tokens"

    def specs(self, batch_size, lengths, *, packed=False):
        check_lengths(self, lengths)
        names = ["decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights"]
        names += ["decoder_segment_ids", "decoder_positions"] if packed else []
        return dict.fromkeys(names, jax.ShapeDtypeStruct((batch_size, lengths["targets"]), "int32"))

    def pad(self, examples, lengths, rows):
        tokens = sequences.padded([e["targets"] for e in examples], rows, lengths["targets"])
        return {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": sequences.shifted(tokens),
            "decoder_loss_weights": sequences.loss_weights(tokens),
        }

    def pack(self, rows, lengths):
        tokens, segments, positions = sequences.packed(
            [[example["targets"] for example in row] for row in rows], lengths["targets"]
        )
        return {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": sequences.shifted(tokens, positions),
            "decoder_loss_weights": sequences.loss_weights(tokens),
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
        }

    def row_capacity(self, lengths):
        return (lengths["targets"],)

    def row_usage(self, sizes):
        return sizes

    def random(self, vocab_size, *, batch_size=2, length=32, seed=0):
        tokens = np.random.default_rng(seed).integers(1, vocab_size, (batch_size, length), np.int32)
        return self.pad([{"targets": row} for row in tokens], {"targets": length}, batch_size)

    def real_targets(self, batch):
        return batch["decoder_target_tokens"] > 0

    def describe(self, batch):
        rows, length = np.shape(batch["decoder_target_tokens"])
        return f"{rows} x {length} targets"

    def seqio_converter(self, *, pack):
        return seqio.LMFeatureConverter(pack=pack)


LINE: FeatureConverter = LineFeatures()
LENGTHS = {"targets": 12}


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Makes configurations of a small task of sums, which is cached."""
    from tests.data.cache import cached_tasks
    from upcycle_jax.data.cache.writer import CacheOptions, write_caches

    folder = tmp_path_factory.mktemp("cache")
    name = cached_tasks.register("sums_of_a_line")
    write_caches(DatasetConfig(name, {}), CacheOptions(folder, report=lambda line: None))
    configure(cache_dirs=[str(folder)])

    def make(**changes):
        return DatasetConfig(
            name, **{"task_feature_lengths": LENGTHS, "batch_size": 4, "seed": 0, **changes}
        )

    yield make
    configure()


# The cache and SeqIO give one and the same, see below.
@pytest.mark.parametrize(
    ("use_cached", "pack"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_a_decoder_reads_the_targets_alone(sums, use_cached, pack):
    config = sums(use_cached=use_cached, pack=pack)
    batch = next(open_dataset(config, LINE).train_iterator())
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in LINE.specs(4, LENGTHS, packed=pack).items()
    }
    assert (batch["decoder_target_tokens"][:, 0] > 0).all()
    if pack:
        assert batch["decoder_segment_ids"].max() > 1
        begins = batch["decoder_positions"] == 0
        assert not batch["decoder_input_tokens"][begins].any()


@pytest.mark.parametrize("use_cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_questions_and_answers_share_rows(sums, use_cached):
    """'7 + 0' and 'is 7', each with EOS, of a decoder-only model: 6 + 5 tokens, or two more."""
    lengths = {"inputs": 24, "targets": 16}
    config = sums(use_cached=use_cached, pack=True, task_feature_lengths=lengths, batch_size=8)
    features = DecoderOnlyFeatures()
    batch = next(open_dataset(config, features).train_iterator())
    tokens, segments = batch["decoder_target_tokens"], batch["decoder_segment_ids"]
    assert tokens.shape == (8, 40) and (segments.max(axis=1) >= 2).all()
    for row in range(8):
        for segment in range(1, segments[row].max() + 1):
            here = segments[row] == segment
            learnt = batch["decoder_loss_weights"][row][here] == 1
            text = bytes(max(0, int(token) - 3) for token in tokens[row][here]).decode()
            question, answer, end = text.split("\0")
            first, second = map(int, question.split(" + "))
            assert (answer, end) == (f"is {first + second}", "") and second == first % 7
            assert learnt.tolist() == [False] * (len(question) + 1) + [True] * (len(answer) + 1)


def test_the_cache_gives_what_seqio_gives(sums):
    cached, on_the_fly = (
        [
            batch
            for start in open_dataset(sums(split="validation", use_cached=used), LINE)
            .eval_batches()
            .values()
            for batch in start()
        ]
        for used in (True, False)
    )
    assert len(cached) == len(on_the_fly) == 6
    for ours, theirs in zip(cached, on_the_fly, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_examples_one_by_one_are_batches_too(sums):
    from upcycle_jax.data.examples import task_examples

    (task,) = task_examples(sums(split="validation", use_cached=True), LINE)
    found = list(task.examples(limit=3))
    batch = task.batch(found, 4)
    assert LINE.describe(batch) == "4 x 12 targets" and not batch["decoder_target_tokens"][3].any()
    assert task.decode(batch["decoder_target_tokens"][0]).startswith("is 10")


def test_what_a_task_or_a_length_lacks_is_named(sums):
    from upcycle_jax.data.examples import task_examples
    from upcycle_jax.data.prompts import FewShot

    with pytest.raises(ValueError, match="it needs a length of at least 1 for 'inputs'"):
        open_dataset(sums(), EncoderDecoderFeatures())
    with pytest.raises(ValueError, match="FewShot needs a length for 'inputs'"):
        task_examples(sums(split="validation"), LINE, FewShot(num_shots=1))

    class Pictures(LineFeatures):
        task_features = ("image", "targets")

    config = sums(task_feature_lengths={"image": 4, "targets": 12})
    with pytest.raises(ValueError, match=r"no feature \['image'\].*: the model needs 'image' and"):
        open_dataset(config, Pictures()).train_iterator()
    config = dataclasses.replace(config, use_cached=True)
    with pytest.raises(ValueError, match=r"it has no feature \['image'\]"):
        open_dataset(config, Pictures())
