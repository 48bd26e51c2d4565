import pathlib

import pytest

from upcycle_jax.config import search


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A stand-in for the installed folder."""
    folder = tmp_path / "installed" / "gin_configs"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "tiny.gin").write_text("A = 1")
    monkeypatch.setattr(search, "shipped_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "models/tiny.gin",
        "gin_configs/models/tiny.gin",
        "./gin_configs/models/tiny.gin",
        "/a/gin_configs/models/tiny.gin",
    ],
)
def test_shipped_files_are_found_from_anywhere_under_both_spellings(shipped, name):
    if name.startswith("/"):
        with pytest.raises(FileNotFoundError, match=r"Did you mean 'models/tiny.gin'"):
            search.find(name)
    else:
        assert pathlib.Path(search.find(name)) == shipped / "models" / "tiny.gin"


def test_the_order_of_places(shipped, tmp_path):
    own, other = tmp_path / "models" / "tiny.gin", tmp_path / "extra" / "models" / "tiny.gin"
    assert (
        pathlib.Path(search.find("models/tiny.gin", [str(tmp_path / "extra")]))
        == shipped / "models" / "tiny.gin"
    )
    other.parent.mkdir(parents=True)
    other.write_text("A = 2")
    assert pathlib.Path(search.find("models/tiny.gin", [str(tmp_path / "extra")])) == other
    own.parent.mkdir()
    own.write_text("A = 3")
    assert search.find("models/tiny.gin", [str(tmp_path / "extra")]) == "models/tiny.gin"


def test_a_file_beside_the_including_one_is_found(shipped, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "part.gin").write_text("A = 1")
    assert search.find("part.gin", beside=str(tmp_path / "mine" / "whole.gin")) == str(
        tmp_path / "mine" / "part.gin"
    )


def test_a_missing_file_names_the_nearest_and_the_remedy(shipped):
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"'models/tinny.gin' is in none of .*Did you mean 'models/tiny.gin'\?"
            r" --gin_search_paths"
        ),
    ):
        search.find("models/tinny.gin")


def test_the_real_folder_is_found():
    assert search.shipped_folder().name == "gin_configs"
