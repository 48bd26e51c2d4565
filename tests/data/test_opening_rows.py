"""Language modelling over one's own files: every document once, divided by EOS and by segments; the
same from a cache as through SeqIO; found again exactly.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig, configure, fingerprints
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import DecoderOnlyFeatures, EncoderDecoderFeatures

seqio = pytest.importorskip("seqio", reason="caches are written by SeqIO")

pytestmark = pytest.mark.usefixtures("short_shuffle")
FEATURES = DecoderOnlyFeatures()
TOKENS, SEGMENTS = "decoder_target_tokens", "decoder_segment_ids"
LENGTH, EOS = 32, 1


def documents_of(domain):
    generator = np.random.default_rng(len(domain))
    return [
        f"{domain}{number}:" + domain[0] * int(generator.integers(0, 90)) for number in range(60)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for domain in ("cats", "dog"):
        lines = (json.dumps({"text": text}) + "\n" for text in documents_of(domain))
        (folder / f"{domain}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def make_config(folder, short_shuffle):
    """Makes configurations of two domains, which are cached too."""
    from upcycle_jax.data.cache import writer

    def make(**changes):
        settings = {
            "mixture_or_task_name": "rows_of_text",
            "task_feature_lengths": {"targets": LENGTH},
            "batch_size": 8,
            "seed": 0,
            "text_files": {domain: [str(folder / f"{domain}.jsonl")] for domain in ("cats", "dog")},
            "objective": "language_modeling",
        }
        return DatasetConfig(**{**settings, **changes})

    writer.write_caches(make(), writer.CacheOptions(folder / "cache", report=lambda line: None))
    configure(cache_dirs=[str(folder / "cache")])
    yield make
    configure()


def assert_same(batches, expected):
    for batch, want in zip(batches, expected, strict=True):
        assert batch.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(batch[name], want[name], err_msg=name)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def text_of(tokens):
    return bytes(int(token) - 3 for token in tokens).decode()


@pytest.mark.parametrize("use_cached", [False, True])
def test_a_pass_holds_each_document_once(make_config, use_cached):
    found = {}
    for split in ("train", "validation"):
        config = make_config(split=split, use_cached=use_cached)
        for name, start in open_dataset(config, FEATURES).eval_batches().items():
            batches = list(start())
            real = np.concatenate([batch[SEGMENTS].ravel() > 0 for batch in batches])
            assert real[: real.sum()].all()  # only the end of the last row is padding
            stream = np.concatenate([batch[TOKENS].ravel() for batch in batches])[real]
            assert stream[-1] == EOS
            ends = np.flatnonzero(stream == EOS)
            documents = [
                text_of(part) for part in np.split(stream, ends + 1)[:-1] for part in [part[:-1]]
            ]
            found.setdefault(name.rpartition("_")[2], []).extend(documents)
            assert len(documents) > (3 if split == "validation" else 40) - 3
    assert {domain: sorted(texts) for domain, texts in found.items()} == {
        domain: sorted(documents_of(domain)) for domain in ("cats", "dog")
    }


def test_a_segment_ends_with_its_document(make_config):
    (batch, *_) = open_dataset(make_config(use_cached=True), FEATURES).eval_batches()[
        "rows_of_text_cats"
    ]()
    tokens, segments = batch[TOKENS], batch[SEGMENTS]
    starts = np.diff(segments, axis=1) == 1
    np.testing.assert_array_equal(starts, tokens[:, :-1] == EOS)
    np.testing.assert_array_equal(batch["decoder_positions"][:, 1:] == 0, starts)
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], np.where(starts, 0, tokens[:, :-1])
    )
    assert starts.sum() > 3 and (segments[:, 0] == 1).all()
    whole = DecoderOnlyFeatures(mask_documents=False)
    (batch, *_) = open_dataset(make_config(use_cached=True), whole).eval_batches()[
        "rows_of_text_cats"
    ]()
    np.testing.assert_array_equal(batch[TOKENS], tokens)
    assert (batch[SEGMENTS] == 1).all()


@pytest.mark.parametrize(("mask_documents", "pack"), [(True, False), (False, True)])
def test_a_cache_gives_what_seqio_gives(make_config, mask_documents, pack):
    features = DecoderOnlyFeatures(bos_id=2, mask_documents=mask_documents)
    domain = make_config(
        mixture_or_task_name="rows_of_text_cats", text_files=None, split="validation", pack=pack
    )
    read, cached = (
        open_dataset(dataclasses.replace(domain, use_cached=cached), features)
        for cached in (False, True)
    )
    assert read.vocabulary_size() == cached.vocabulary_size() == 359
    passes = read.eval_batches()
    assert passes.keys() == cached.eval_batches().keys()
    for name, start in passes.items():
        assert_same(list(cached.eval_batches()[name]()), list(start()))


@pytest.mark.parametrize("use_cached", [False, True])
def test_a_stream_is_full_and_found_again(make_config, tmp_path, use_cached):
    config = make_config(use_cached=use_cached)
    dataset = open_dataset(config, FEATURES)
    iterator = dataset.train_iterator()
    batches = take(iterator, 4)
    iterator.save(tmp_path)
    batches += take(iterator, 8)
    # Beyond an epoch (some 50 rows a domain): no row has padding.
    assert all((batch[SEGMENTS] > 0).all() for batch in batches)
    iterator.restore(tmp_path)
    assert_same(take(iterator, 8), batches[4:])
    again = dataset.train_iterator()
    again.restore(tmp_path)
    assert_same(take(again, 3), batches[4:7])
    again.seek(1)
    assert_same(take(again, 2), batches[1:3])
    rows = np.concatenate([batch[TOKENS] for batch in batches])
    cats = sum("c" in text_of(row[row > EOS]) for row in rows)
    assert 0.3 < cats / len(rows) < 0.7  # both domains
    other = open_dataset(dataclasses.replace(config, seed=1), FEATURES).train_iterator()
    assert (next(other)[TOKENS] != batches[0][TOKENS]).any()


def test_processes_share_the_documents(make_config):
    whole = open_dataset(make_config(use_cached=True), FEATURES).train_iterator()
    parts = [
        open_dataset(make_config(use_cached=True), FEATURES).train_iterator(i, 2) for i in range(2)
    ]
    for batch in take(whole, 3):
        halves = [next(part) for part in parts]
        for name in batch:
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(joined, batch[name])
    # On the fly each process reads documents of its own.
    config = make_config(mixture_or_task_name="rows_of_text_cats", text_files=None)
    seen = []
    for process in range(2):
        iterator = open_dataset(config, FEATURES).train_iterator(process, 2)
        stream = np.concatenate([batch[TOKENS] for batch in take(iterator, 20)])
        names = {text_of(row[row > EOS]) for row in stream}
        seen.append({word for text in names for word in _whole_names(text)})
    assert len(seen[0]) > 10 < len(seen[1]) and not seen[0] & seen[1]


def _whole_names(text):
    """'cats12' of rows in which both ends of the name are seen."""
    return {part.rpartition("cats")[2] for part in text.split(":")[:-1] if "cats" in part}


def test_the_fingerprint_tells_the_objective(make_config, folder):
    config = make_config(use_cached=True)
    (mine,) = {
        json.dumps(task["steps"])
        for task in open_dataset(config, FEATURES).fingerprint()["tasks"].values()
    }
    assert json.loads(mine) == [
        {
            "step": "denoise",
            "denoisers": [{"kind": "causal", "eos_id": 1, "prefix_ids": [], "weight": 1.0}],
        }
    ]
    on_the_fly = open_dataset(make_config(), FEATURES).fingerprint()
    steps = on_the_fly["tasks"]["rows_of_text_cats"]["steps"]
    assert steps == ["tokenize", "append_eos", "CacheDatasetPlaceholder", "language_modeling"]
    assert (
        fingerprints.differences(on_the_fly, open_dataset(make_config(), FEATURES).fingerprint())
        == []
    )
    with pytest.raises(ValueError, match="objective was 'language_modeling' and is 'prefix_lm'"):
        open_dataset(
            make_config(
                use_cached=True,
                objective="prefix_lm",
                task_feature_lengths={"inputs": 8, "targets": 8},
            ),
            EncoderDecoderFeatures(),
        )


def test_what_does_not_suit_the_model_is_told(make_config):
    with pytest.raises(ValueError, match=r"'rows_of_text_cats' has no feature \['inputs'\]"):
        lengths = {"inputs": 8, "targets": 8}
        open_dataset(make_config(task_feature_lengths=lengths), FEATURES).train_iterator()
    corrupted = make_config(mixture_or_task_name="corrupted", objective="span_corruption")
    with pytest.raises(ValueError, match=r"has \['inputs'\], which task_feature_lengths"):
        open_dataset(corrupted, FEATURES).train_iterator()


def test_one_document_is_divided_and_several_are_kept_whole(tmp_path):
    from upcycle_jax.data.text import files

    long = " ".join(f"word{number}" for number in range(3000))
    (tmp_path / "a.txt").write_text(long)
    corpus = files.load_corpus("one", [str(tmp_path / "a.txt")], whole_documents=True)
    assert sum(map(len, corpus.splits.values())) == -(-len(long) // 4096)
    (tmp_path / "b.txt").write_text(long[::-1])
    corpus = files.load_corpus("two", [str(tmp_path / "*.txt")], whole_documents=True)
    assert {text.decode() for texts in corpus.splits.values() for text in texts} == {
        long,
        long[::-1],
    }
