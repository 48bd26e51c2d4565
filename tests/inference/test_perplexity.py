"""Perplexities by hand, and counts of text over rows that are cut anywhere."""

import math

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.inference.perplexity import Counts, TextCounter, over_processes, perplexities

# EOS, and pieces that begin, end or hold words.
TEXTS = [b"", b"one", b" two", b" ", b"th", b"ree\n fo", b"ur", b" \t"]


def test_perplexities_by_hand():
    # 12 nats: 3 for each of 4 tokens, 2 for each of 6 bytes, 6 for each of 2 words.
    got = perplexities(3.0, Counts(tokens=4, text_bytes=6, words=2))
    want = {
        "perplexity": math.exp(3),
        "bits_per_byte": 2 / math.log(2),
        "byte_perplexity": math.exp(2),
        "word_perplexity": math.exp(6),
    }
    assert got == pytest.approx(want)
    assert perplexities(3.0, Counts(tokens=4)) == pytest.approx({"perplexity": math.exp(3)})
    assert perplexities(1e4, Counts(tokens=4))["perplexity"] == math.inf


def test_text_is_counted_across_tokens():
    features = DecoderOnlyFeatures()
    rows = [[1, 2, 3, 4, 5, 6, 0], [7, 6, 2, 7, 1], [6, 6]]
    batch = features.pad([{"targets": row} for row in rows], {"targets": 7}, 4)
    counted = TextCounter(TEXTS).of_batch(batch)
    texts = [b"".join(TEXTS[token] for token in row) for row in rows]
    assert texts == [b"one two three\n four", b" \tur two \tone", b"urur"]
    assert counted == Counts(
        tokens=14,
        text_bytes=sum(map(len, texts)),
        words=sum(len(text.split()) for text in texts),  # 4 + 3 + 1
    )
    # In a packed row documents do not run into each other, and after EOS a word begins.
    packed = features.pack(
        [[{"targets": row} for row in rows], [{"targets": [6, 0, 6]}]], {"targets": 14}
    )
    more = TextCounter(TEXTS).of_batch(packed)
    assert more == counted + Counts(tokens=3, text_bytes=4, words=2)


def test_inputs_are_not_counted():
    batch = DecoderOnlyFeatures().pad(
        [{"inputs": [1, 2], "targets": [4, 5]}], {"inputs": 3, "targets": 3}, 1
    )
    # "three\n fo": the first piece begins a word, whatever was read before.
    assert TextCounter(TEXTS).of_batch(batch) == Counts(tokens=2, text_bytes=9, words=2)
    assert TextCounter(None).of_batch(batch) == Counts(tokens=2)


def test_counts_are_those_of_the_last_pass():
    batch = DecoderOnlyFeatures().pad([{"targets": [1]}], {"targets": 2}, 1)
    counter = TextCounter(TEXTS)
    batches = counter.counting(lambda: [batch, batch])
    for _ in range(2):
        np.testing.assert_equal(len(list(batches())), 2)
        assert counter.counts == Counts(tokens=2, text_bytes=6, words=2)
    assert over_processes(counter.counts, 1) == counter.counts


@pytest.mark.parametrize(("num_shards", "tokens"), [(2, 12 + 2**40), (1, (12 + 2**40) // 2)])
def test_counts_of_processes_are_added(num_shards, tokens, monkeypatch):
    """Two processes read a part each, or both the whole. Numbers are kept that jax would cut."""
    own, other = Counts(10, 4, 2), Counts(2 + 2**40, 4, 2)

    def gathered(values):
        theirs = np.array([other.tokens, other.text_bytes, other.words], np.int64)
        return np.stack([values, theirs.view(np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    whole = Counts(tokens, 4 * num_shards, 2 * num_shards)
    assert over_processes(own, num_shards) == whole
