"""Hugging Face tokenizers: ids as the package gives them, special tokens as their files state."""

import json
import shutil

import pytest

from upcycle_jax.data.text import tokenizer

TEXTS = ["", "!", "wow!!", "def f(x):\n    return x  # ünïcode, 漢字, \U0001f600", " two  spaces "]


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """A copy of the tokenizer, to be changed."""
    return shutil.copytree(tokenizer_folder, tmp_path / "copy")


def state(folder, name="tokenizer_config.json", **tokens):
    (folder / name).write_text(json.dumps(tokens))
    return folder


def test_texts_come_back_and_ids_are_the_models_own(tokenizer_folder):
    loaded = tokenizer.load(str(tokenizer_folder))
    assert (loaded.size, loaded.bos_id, loaded.eos_id) == (402, 400, 401)
    assert loaded.pad_id is None and loaded.unk_id is None
    for text in TEXTS:
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("!") == [0] and loaded.decode([0, 0]) == "!!"
    # 20 letters that no training text has together: neither truncated to 3 nor padded to 9.
    assert len(loaded.encode("qzxjqzxjqzxjqzxjqzxj")) > 9 and loaded.encode("") == []
    # Special tokens are taken for themselves, and not shown; ids above all are left out.
    assert loaded.encode("a</s>")[-1] == 401
    assert loaded.decode([0, 401, 0, 9999]) == "!!"
    assert tokenizer.load(str(tokenizer_folder / "tokenizer.json")) == loaded


@pytest.mark.parametrize(
    ("stated", "ids"),
    [
        ({"tokenizer_config.json": {"eos_token": "<s>", "bos_token": None}}, (None, 400)),
        (
            {
                "tokenizer_config.json": {"eos_token": None},
                "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "bos_token": "!"},
                "config.json": {"bos_token_id": 5},
            },
            (0, 401),
        ),
        ({"config.json": {"eos_token_id": [401, 7], "bos_token_id": None}}, (None, 401)),
        ({}, (None, None)),
    ],
)
def test_special_tokens_are_those_that_are_stated(folder, stated, ids):
    (folder / "tokenizer_config.json").unlink()
    for name, tokens in stated.items():
        state(folder, name, **tokens)
    loaded = tokenizer.load(str(folder))
    assert (loaded.bos_id, loaded.eos_id) == ids


@pytest.mark.parametrize(
    ("stated", "ids"),
    [
        ({"generation_config.json": [401, 7, 7], "config.json": 3}, (401, 7)),
        ({"generation_config.json": None, "config.json": 3}, (3,)),
        ({"config.json": [7, 402, -1]}, (7,)),  # ids that are no tokens
        ({}, ()),
    ],
)
def test_generation_stops_where_the_folder_says(folder, stated, ids):
    before = tokenizer.load(str(folder))
    for name, given in stated.items():
        state(folder, name, eos_token_id=given)
    loaded = tokenizer.load(str(folder))
    assert loaded.stop_ids == ids and loaded.eos_id == 401
    # No text's tokens depend on them: caches of tokens remain.
    assert loaded == before
    state(folder, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match="states '</s>' as eos_token_id: it must be an id, or a"):
        tokenizer.load(str(folder))


def test_a_token_for_images_without_a_row_is_left_out(folder):
    """As in Gemma 3's folders of text models: 402 is beyond the embedding of 402 rows."""
    path = folder / "tokenizer.json"
    made, before = json.loads(path.read_text()), tokenizer.load(str(folder))
    image = {**made["added_tokens"][-1], "id": 402, "content": "<image_soft_token>"}
    path.write_text(json.dumps(made | {"added_tokens": [*made["added_tokens"], image]}))
    loaded = tokenizer.load(str(folder))
    assert loaded.size == 402 and loaded.encode("a</s>") == before.encode("a</s>")
    spelt = loaded.encode("<image_soft_token>")
    assert len(spelt) > 1 and max(spelt) < 402
    # Before other tokens it has its row, and stays.
    other = {**image, "id": 403, "content": "<other>"}
    path.write_text(json.dumps(made | {"added_tokens": [*made["added_tokens"], image, other]}))
    loaded = tokenizer.load(str(folder))
    assert loaded.size == 404 and loaded.encode("<image_soft_token>") == [402]


def test_texts_start_with_bos_or_else_eos(folder):
    assert tokenizer.start_of_text(str(folder)) == 400
    assert [tokenizer.load(str(folder)).begins_texts(n) for n in (400, 401)] == [True, False]
    assert tokenizer.start_of_text(str(state(folder, eos_token="</s>"))) == 401
    assert [tokenizer.load(str(folder)).begins_texts(n) for n in (0, 400, 401)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(ValueError, match="states neither BOS nor EOS: add 'eos_token'"):
        tokenizer.start_of_text(str(state(folder)))
    assert tokenizer.start_of_text() == tokenizer.start_of_text("bytes") == 0
    assert tokenizer.start_of_text("some/spiece.model") == 0


def test_identities_tell_tokenizers_apart(tokenizer_folder, folder):
    assert tokenizer.identity(str(folder)) == tokenizer.identity(str(tokenizer_folder))
    before = tokenizer.load(str(folder))
    state(folder, eos_token="<s>", bos_token="<s>")
    after = tokenizer.load(str(folder))
    assert before != after and before.eos_id != after.eos_id
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert tokenizer.identity(str(folder))["sha256"] != after.identity["sha256"]


def test_what_is_no_tokenizer_is_told(folder, tmp_path, monkeypatch):
    def refused(kind, match, vocabulary=folder):
        with pytest.raises(kind, match=match):
            tokenizer.load(str(vocabulary))

    refused(
        ValueError,
        "state '<pad>' as PAD, which is none of its 402",
        state(folder, pad_token="<pad>"),
    )
    (folder / "tokenizer_config.json").unlink()
    refused(ValueError, "state 402 as EOS", state(folder, "config.json", eos_token_id=402))
    (folder / "config.json").write_text("[]")
    refused(ValueError, r"config\.json holds no object")
    (folder / "config.json").write_text("{")
    refused(ValueError, r"config\.json cannot be read")
    (folder / "config.json").unlink()
    monkeypatch.setattr(tokenizer, "_MAX_BYTES", {"tokenizer.json": 10})
    refused(ValueError, "more than 10: it is no tokenizer's file")
    monkeypatch.undo()
    made = json.loads((folder / "tokenizer.json").read_text())
    made["model"]["vocab"]["!"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(made))
    refused(ValueError, "has a token of id 4294967295, which no model has")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    refused(ValueError, r"tokenizer\.json is no tokenizer \(.*\): give 'bytes'")
    (folder / "tokenizer.json").unlink()
    refused(FileNotFoundError, r"the folder has no tokenizer\.json.*save_pretrained")
    refused(FileNotFoundError, "no such file; give 'bytes'", tmp_path / "absent.json")


@pytest.mark.slow
def test_transformers_reads_the_same_ids(tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
    ours = tokenizer.load(str(tokenizer_folder))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in [*TEXTS, "a</s>b"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
