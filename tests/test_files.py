"""Files that are written whole or not at all."""

import pytest

from upcycle_jax import files


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "notes.json"
    files.write_whole(path, "old")
    with files.replacing(path) as stream:
        stream.write("ne")
        assert path.read_text() == "old"
        stream.write("w")
    assert path.read_text() == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_changes_nothing_and_leaves_nothing(tmp_path, shared):
    path = tmp_path / "notes.json"
    files.write_whole(path, "old")
    with pytest.raises(OSError, match="full"), files.replacing(path, shared=shared) as stream:
        stream.write("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_write_left_is_overwritten(tmp_path):
    (tmp_path / f".notes.json{files.SUFFIX}").write_text("half of")
    files.write_whole(tmp_path / "notes.json", "whole", durable=True)
    assert [child.read_text() for child in tmp_path.iterdir()] == ["whole"]


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "notes.json"
    with files.replacing(path, shared=True) as first, files.replacing(path, shared=True) as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"


def test_a_torn_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    files.append_line(path, '{"a": 1}')
    with path.open("a") as stream:
        stream.write('{"a":')
    files.append_line(path, '{"a": 3}')
    files.append_line(path, '{"a": 4}')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a":', '{"a": 3}', '{"a": 4}']
