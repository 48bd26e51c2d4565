"""A user's own files: every kind gives the same text, and every bad one gives one error that names
it and the remedy.
"""

import gzip
import json
import sys

import pytest

from upcycle_jax.data.text import files as text_files

TEXTS = ["First document, with ünïcode.", 'Second one,\nof "two" lines.', "Third."]


def _json_lines(field="text"):
    return "".join(json.dumps({field: text, "id": n}) + "\n" for n, text in enumerate(TEXTS))


def _write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    "kind", [".jsonl", ".jsonl.gz", ".parquet", ".ndjson", ".json", "-of-01024.json.gz", ".JSON.GZ"]
)
def test_records_of_each_kind(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    if kind == ".parquet":
        _write_parquet(path, {"text": TEXTS, "id": [0, 1, 2]})
    else:
        data = _json_lines().encode()
        path.write_bytes(gzip.compress(data) if kind.lower().endswith(".gz") else data)
    assert list(text_files.read_file(path, field="text")) == TEXTS


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".md", "", ".gz", ".py", ".TXT"])
def test_plain_text_is_one_document(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    data = "\n".join(TEXTS).encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    assert list(text_files.read_file(path, field="text")) == ["\n".join(TEXTS)]


def test_another_field(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(_json_lines("body"))
    assert list(text_files.read_file(path, field="body")) == TEXTS


def test_patterns_find_sorted_files_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text("text")
    found = text_files.find_files([str(tmp_path / "**" / "*.txt"), str(tmp_path / "a.txt")])
    assert [path.name for path in found] == ["a.txt", "b.txt", "c.txt"]


def test_a_list_is_one_domain_and_a_dictionary_several():
    assert text_files.normalise("a.txt") == {"": ("a.txt",)}
    assert text_files.normalise(["a.txt", "b.txt"]) == {"": ("a.txt", "b.txt")}
    assert text_files.normalise({"x": "a.txt", "y": ["b.txt"]}) == {
        "x": ("a.txt",),
        "y": ("b.txt",),
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty: remove it"),
        ("blank.txt", b" \n\n", r"blank\.txt is empty: remove it"),
        (
            "hollow.jsonl",
            b'{"text": ""}\n',
            r"hollow\.jsonl is empty: no record has text in 'text'",
        ),
        (
            "picture.txt",
            b"\x89PNG\r\n\x1a\n",
            r"picture\.txt is not UTF-8 text \(byte 0x89 at offset 0\): convert it",
        ),
        (
            "latin.txt",
            "café".encode("latin-1"),
            r"latin\.txt is not UTF-8 text \(byte 0xe9 at offset 3\).*iconv",
        ),
        (
            "null.txt",
            b"ab\0c",
            r"null\.txt is not text \(it holds a NUL byte at character 2\): leave it out",
        ),
        ("broken.txt.gz", b"\x1f\x8b\x08\x00nonsense", r"broken\.txt\.gz is not a whole gzip file"),
        (
            "plain.txt.gz",
            b"not compressed",
            r"plain\.txt\.gz is not a whole gzip file .*: compress or download it again",
        ),
        (
            "bad.jsonl",
            b'{"text": "a"}\n{"text": \n',
            r"bad\.jsonl, line 2 is not JSON .*one object a line",
        ),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1 is list, not an object with a field 'text'"),
        (
            "field.jsonl",
            b'{"body": "a"}\n',
            r"field\.jsonl, line 1 has no field 'text' \(it has \['body'\]\): set text_field",
        ),
        (
            "number.jsonl",
            b'{"text": 3}\n',
            r"number\.jsonl, line 1: the field 'text' holds int, not a string",
        ),
        ("table.parquet", b"not parquet", r"table\.parquet is not a Parquet file"),
        (
            "pretty.json",
            b'[\n {"text": "a"}\n]',
            r"pretty\.json, line 1 is not JSON .*one object a line \(`jq",
        ),
        ("t.csv", b"a,b\n", r"t\.csv ends in '\.csv', which is not known.*\.jsonl.*\.txt.*Rename"),
        ("a.jsonl.zst", b"x", r"a\.jsonl\.zst ends in '\.zst', which is not known"),
        ("a.parquet.gz", b"x", r"a\.parquet\.gz ends in '\.parquet\.gz', which is not known"),
    ],
)
def test_each_bad_file_is_named_with_its_remedy(tmp_path, name, data, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(text_files.read_file(path, field="text"))


def test_a_parquet_column_that_is_not_there(tmp_path):
    _write_parquet(tmp_path / "t.parquet", {"body": TEXTS})
    with pytest.raises(
        ValueError, match=r"t\.parquet has no column 'text' \(it has \['body'\]\): set text_field"
    ):
        list(text_files.read_file(tmp_path / "t.parquet", field="text"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"t\.parquet is Parquet, which needs pyarrow: pip install"
    ):
        list(text_files.read_file(tmp_path / "t.parquet", field="text"))


def test_missing_files_folders_and_names(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing matches '.*absent.*\.txt'.*check the path"
    ):
        text_files.find_files([str(tmp_path / "absent*.txt")])
    with pytest.raises(ValueError, match=r"is a folder: give its files, for example"):
        text_files.find_files([str(tmp_path)])
    with pytest.raises(ValueError, match="text_files is empty"):
        text_files.normalise({})
    with pytest.raises(ValueError, match="names no file for the domain 'x'"):
        text_files.normalise({"x": []})
    with pytest.raises(ValueError, match="a domain named 'x/y': use letters"):
        text_files.normalise({"x/y": ["a"]})


def test_too_much_text_names_the_way_out(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    with pytest.raises(
        ValueError,
        match=r"more than 100 characters, too much to hold in memory: register a SeqIO task",
    ):
        text_files.load_corpus("d", [str(tmp_path / "a.txt")], max_characters=100)


def test_a_damaged_page_of_a_parquet_file_names_the_file(tmp_path):
    path = tmp_path / "pages.parquet"
    _write_parquet(path, {"text": ["aa", "bb"] * 5000})
    data = bytearray(path.read_bytes())
    data[40:60] = b"\xff" * 20  # inside the first page; the footer is whole
    path.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=r"pages\.parquet is a damaged Parquet file .*copy it again"
    ):
        list(text_files.read_file(path, field="text"))
