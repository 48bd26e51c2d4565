"""Passages lose nothing; splits are disjoint, keyed and stable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_jax.data.text.documents import Document, build_corpus, split_passages


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(2, 40))
def test_passages_join_to_the_text(text, characters):
    passages = list(split_passages(text, characters=characters))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= characters for passage in passages)


def test_passages_end_at_lines_before_sentences_before_words():
    assert list(split_passages("aaaa. bb\ncccccc dd", characters=12)) == ["aaaa. bb\n", "cccccc dd"]
    assert list(split_passages("aaaaaa bb. cccccc", characters=12)) == ["aaaaaa bb. ", "cccccc"]
    assert list(split_passages("aaaaaaaa bbbbbb", characters=12)) == ["aaaaaaaa ", "bbbbbb"]
    assert list(split_passages("a" * 15, characters=12)) == ["a" * 12, "aaa"]


def _documents(keyed):
    return [Document(f"document {n} " * 40, key=f"k{n % 50}" if keyed else "") for n in range(400)]


@pytest.mark.parametrize("keyed", [False, True])
def test_splits_are_disjoint_and_complete(keyed):
    corpus = build_corpus("d", _documents(keyed), origin={}, validation_fraction=0.2)
    train, validation = set(corpus.splits["train"]), set(corpus.splits["validation"])
    assert not train & validation
    assert train | validation == {document.text.encode() for document in _documents(keyed)}
    assert 0.1 < len(validation) / 400 < 0.3  # 20 % expected; a hash splits roughly


def test_documents_of_one_key_share_a_side():
    corpus = build_corpus("d", _documents(keyed=True), origin={}, validation_fraction=0.3)
    sides = {}
    for split, passages in corpus.splits.items():
        for passage in passages:
            sides.setdefault(int(passage.split()[1]) % 50, set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())


def test_equal_passages_are_kept_once():
    documents = [
        Document("the same licence text", key=f"file {n}") for n in range(100)
    ] + _documents(keyed=False)
    corpus = build_corpus("d", documents, origin={}, validation_fraction=0.3)
    passages = [passage for split in corpus.splits.values() for passage in split]
    assert passages.count(b"the same licence text") == 1


def test_order_of_documents_does_not_matter():
    documents = _documents(keyed=False)
    assert (
        build_corpus("d", documents, origin={}).fingerprint()
        == build_corpus("d", documents[::-1], origin={}).fingerprint()
    )


def test_fingerprint_sees_one_changed_letter():
    documents = _documents(keyed=False)
    changed = [*documents[:-1], Document(documents[-1].text.replace("document", "Document", 1))]
    assert (
        build_corpus("d", documents, origin={}).fingerprint()
        != build_corpus("d", changed, origin={}).fingerprint()
    )


def test_even_two_documents_give_both_splits():
    corpus = build_corpus(
        "d", [Document("one"), Document("two")], origin={}, validation_fraction=0.001
    )
    assert {split: len(passages) for split, passages in corpus.splits.items()} == {
        "train": 1,
        "validation": 1,
    }


@pytest.mark.parametrize(
    ("texts", "found"), [([], "no text"), (["  \n"], "no text"), (["one"], "one passage")]
)
def test_too_little_text_is_refused(texts, found):
    with pytest.raises(ValueError, match=f"the domain 'd' has {found}.*give it more text"):
        build_corpus("d", [Document(text) for text in texts], origin={})
