"""Where checkpoints may be written, and what killed or foreign hands left there."""

import json
import os

import numpy as np
import pytest

from upcycle_jax.checkpoints import chunk_copy, create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.huggingface.writer import HUGGINGFACE_FILES, write_huggingface
from upcycle_jax.checkpoints.output import (
    LOCK,
    PROBE_PREFIX,
    check_unfinished,
    probe_folder,
    try_lock,
)
from upcycle_jax.checkpoints.to_orbax import convert_to_orbax
from upcycle_jax.trees import LeafSpec

SPECS = {
    "target/w": LeafSpec((64, 64), np.dtype(np.float32)),
    "target/v": LeafSpec((64, 64), np.dtype(np.float32)),
}


def begin(path, step=3):
    return create_checkpoint(path, SPECS, step=step, metadata={"of": "test"}, compress=False)


def finished(path):
    with begin(path) as writer:
        for number, (name, spec) in enumerate(SPECS.items()):
            writer.write(name, None, np.full(spec.shape, number, spec.dtype))
        writer.finalize()
    return open_checkpoint(path)


@pytest.mark.parametrize("path", ["", "  ", None, 7, "a\\b", "a\0b", "n" * 250, "d/" * 2500 + "e"])
def test_paths_that_no_checkpoint_can_have(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    source = finished(tmp_path / "source" / "checkpoint_3")
    for call in (lambda: begin(path), lambda: convert_to_orbax(source, path)):
        with pytest.raises(ValueError, match="name a folder|backslash|too long"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "out", tmp_path / "out" / "checkpoint_3"):
        with pytest.raises(ValueError, match="is a link to .*nowhere, which does not exist"):
            begin(path)
    (tmp_path / "real").mkdir()
    (tmp_path / "other.partial").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match=r"other\.partial is a link"):
        begin(tmp_path / "other")
    assert not list((tmp_path / "real").iterdir()) and not (tmp_path / "nowhere").exists()


def test_output_and_source_inside_each_other(tmp_path):
    source = finished(tmp_path / "run" / "checkpoint_3")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for inside in ("run/checkpoint_3/x", "run/checkpoint_3/state/d", "link/checkpoint_3/y"):
        with pytest.raises(ValueError, match="lies inside the source"):
            convert_to_orbax(source, tmp_path / inside)
    os.rename(tmp_path / "run", tmp_path / "checkpoint_3")
    nested = open_checkpoint(tmp_path / "checkpoint_3" / "checkpoint_3")
    with pytest.raises(ValueError, match="lies inside the output"):
        convert_to_orbax(nested, tmp_path / "checkpoint_3")
    os.rename(tmp_path / "checkpoint_3", tmp_path / "run")
    # A MODEL_DIR may hold both.
    assert convert_to_orbax(source, tmp_path / "run", step=4) == tmp_path / "run" / "checkpoint_4"
    assert before == [
        p for p in sorted(tmp_path.rglob("*")) if "checkpoint_4" not in str(p) and p.name != "link"
    ]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b'{"format": 1}']
)
def test_an_unreadable_note_of_an_interrupted_call(tmp_path, content):
    begin(tmp_path / "out").close()
    note = tmp_path / "out.partial" / "resume.json"
    note.write_bytes(content)
    for _ in range(2):  # The lock is free again.
        with pytest.raises(ValueError, match=r"out\.partial.*(remove .*out\.partial|another)"):
            begin(tmp_path / "out")
    assert note.read_bytes() == content


def test_a_damaged_database_of_an_interrupted_call(tmp_path):
    begin(tmp_path / "out").close()
    manifest = tmp_path / "out.partial" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"out\.partial is damaged .*remove it and run again"):
        begin(tmp_path / "out")


@pytest.mark.parametrize(
    "foreign",
    ["notes.txt", "state/model.bin", "state/d/notes.txt", "state/referenced.0/x", "other/a"],
)
def test_foreign_files_are_named_and_never_adopted(tmp_path, foreign):
    begin(tmp_path / "out").close()
    place = tmp_path / "out.partial" / foreign
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {foreign.partition('/a')[0]}, which"):
        begin(tmp_path / "out")
    assert place.read_text() == "mine"
    place.unlink()
    if foreign == "other/a":
        place.parent.rmdir()
    assert begin(tmp_path / "out").resumed


def test_links_in_a_partial_checkpoint(tmp_path):
    begin(tmp_path / "out").close()
    (tmp_path / "out.partial" / "state").rename(tmp_path / "moved")
    (tmp_path / "out.partial" / "state").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="holds state, which"):
        begin(tmp_path / "out")


def test_a_kill_between_the_last_rename_and_the_end(tmp_path):
    source = finished(tmp_path / "source" / "checkpoint_3")
    out = convert_to_orbax(source, tmp_path / "out" / "checkpoint_3")
    whole = sorted(out.rglob("*"))

    def killed():
        (out / "resume.json").write_text("{}")
        (out / ".lock").touch()

    killed()
    with try_lock(out / LOCK), pytest.raises(FileExistsError, match="exists already"):
        begin(out)  # The other process lives: nothing is touched.
    assert sorted(out.rglob("*")) != whole
    assert convert_to_orbax(source, out) == out  # The same call again has nothing more to do.
    assert sorted(out.rglob("*")) == whole
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_orbax(source, out)
    killed()
    with pytest.raises(FileExistsError, match="is removed now"):
        begin(out)
    assert sorted(out.rglob("*")) == whole


def test_a_probe_that_was_killed_is_cleaned_and_a_living_one_is_not(tmp_path):
    source = finished(tmp_path / "source" / "checkpoint_3")

    def probe_dies(name, *, folder, lock=True):
        path = tmp_path / f"{PROBE_PREFIX}{name}"
        if lock:
            path.with_name(path.name + LOCK).touch()
        if folder:
            (path / "databases" / "d").mkdir(parents=True)

    probe_dies("before_its_folder", folder=False)
    probe_dies("later", folder=True)
    probe_dies("of_an_earlier_version", folder=True, lock=False)
    with probe_folder(tmp_path) as living:
        (living / "link").touch()
        found = chunk_copy.probe(
            source, tmp_path / "out", {"target/w": chunk_copy.Reference("target/w")}, SPECS
        )
        assert found.possible and found.linked
        # The living one's folder and its lock, whatever the others were doing when they died.
        left = {path.name for path in tmp_path.glob(f"{PROBE_PREFIX}*")}
        assert left == {living.name, living.name + LOCK} and (living / "link").exists()
    assert not list(tmp_path.glob(f"{PROBE_PREFIX}*"))


def test_a_probe_whose_lock_another_call_removed_takes_another(tmp_path, monkeypatch):
    """Between the making of the file and its lock another call may take it for a dead one's."""
    removed = []

    def flock(number, how):
        if not removed:
            removed.extend(tmp_path.glob(f"{PROBE_PREFIX}*{LOCK}"))
            removed[0].unlink()

    monkeypatch.setattr("upcycle_jax.checkpoints.output.fcntl.flock", flock)
    with probe_folder(tmp_path) as folder:
        assert folder.with_name(folder.name + LOCK).exists()
        assert folder.name + LOCK != removed[0].name


def test_tries_that_fail_do_not_pile_up_on_the_disk(tmp_path):
    """Every commit writes a new index; those of earlier calls go when the next one begins."""
    sizes = []
    for number in range(6):
        writer = begin(tmp_path / "out")
        for _ in range(3):
            writer.write_encoded("target/w", {"0.0": bytes([number]) * 64 * 64 * 4})
            writer.flush()
        writer.close()
        files = [p for p in (tmp_path / "out.partial").rglob("*") if p.is_file()]
        sizes.append(sum(path.stat().st_size for path in files))
    assert max(sizes) < 2 * sizes[0] < 6 * 3 * 64 * 64 * 4  # Of all that was ever written.
    with begin(tmp_path / "out") as writer:
        writer.write("target/w", None, np.ones((64, 64), np.float32))
        writer.write("target/v", None, np.ones((64, 64), np.float32))
        writer.finalize()
    assert (open_checkpoint(tmp_path / "out").read("target/w") == 1).all()


def test_the_record_may_say_more_at_the_end(tmp_path):
    with begin(tmp_path / "out") as writer:
        for name, spec in SPECS.items():
            writer.write(name, None, np.zeros(spec.shape, spec.dtype))
        writer.finalize({"of": "test", "more": [1]})
    assert open_checkpoint(tmp_path / "out").metadata() == {"of": "test", "more": [1]}
    text = (tmp_path / "out" / "_CHECKPOINT_METADATA").read_text()
    assert json.loads(text)["custom_metadata"]["upcycle_jax"]["more"] == [1]


def test_a_hugging_face_folder_is_written_to_such_places_only(tmp_path):
    """Before anything of the model is looked at."""
    source = finished(tmp_path / "source" / "checkpoint_3")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for output, said in {
        "": "name a folder",
        source.path / "hf": "lies inside the source",
        tmp_path / "nowhere": "is a link to",
    }.items():
        with pytest.raises(ValueError, match=said):
            write_huggingface(source, output)
    # What an Orbax conversion of the same name left is no older try of this one.
    begin(tmp_path / "out").close()
    with pytest.raises(ValueError, match="holds .lock, resume.json, state, which"):
        check_unfinished(tmp_path / "out.partial", HUGGINGFACE_FILES)
    assert (tmp_path / "out.partial" / "resume.json").exists()
    folder = tmp_path / "hf.partial"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors"):
        (folder / name).touch()
    check_unfinished(folder, HUGGINGFACE_FILES)
