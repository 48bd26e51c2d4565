"""Damaged and hostile checkpoints: every reader either gives what is stored, or refuses in one line
that names the file; nothing outside the checkpoint is read, and no memory is taken for mere claims.
"""

import json
import os
import resource
import sys

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import hostile
from upcycle_jax import convert, inspect
from upcycle_jax.checkpoints import open_checkpoint, storage

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
FEW = settings(max_examples=20, deadline=None, derandomize=True)
JSON_KINDS = ("orbax", "folders", "zarr3")

_watched: list[str] = []
_opened: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes):
        name = os.fsdecode(arguments[0])
        if name.startswith(_watched[-1]):
            _opened.append(name)


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """Checkpoints of every kind; at the end, nothing outside of them was opened (which is watched
    for Python's own files) and no reader took much memory.
    """
    made = hostile.Laboratory(tmp_path_factory.mktemp("hostile"))
    for kind in hostile.KINDS:  # what is compiled and imported once does not count
        assert hostile.exercise(hostile.opened(made.copy(kind))) is None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watched.append(f"{made.root}/outside")
    yield made
    _watched.pop()
    assert not _opened
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 512 << 10, f"{grown} KiB"


def refused(laboratory, path, expected):
    message = hostile.exercise(path)
    assert message is not None
    assert expected in message, message


@pytest.mark.parametrize("kind", hostile.KINDS)
@given(data=st.data())
@FEW
def test_bytes(laboratory, kind, data):
    path = laboratory.copy(kind)
    try:
        file = data.draw(st.sampled_from(sorted(f for f in path.rglob("*") if f.is_file())))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content)))
        change = data.draw(
            st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove", "folder", "link"])
        )
        if change == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "set" and at < len(content):
            content[at] = data.draw(st.sampled_from([0, 0x80, 0x91, 0xC6, 0xC9, 0xDD, 0xDF, 0xFF]))
        elif change == "cut":
            del content[at:]
        elif change == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        what = hostile.opened(path)
        if change == "link":
            hostile.link_out(path, file)
        elif change in ("remove", "folder"):
            file.unlink()
            if change == "folder":
                file.mkdir()
        else:
            file.write_bytes(content)
        hostile.exercise(what)
    finally:
        laboratory.remove(path)


@pytest.mark.parametrize("kind", JSON_KINDS)
@given(data=st.data())
@FEW
def test_json(laboratory, kind, data):
    path = laboratory.copy(kind)
    try:
        place, text = data.draw(st.sampled_from(hostile.small_json(path)))
        content = json.loads(text)
        at = data.draw(st.sampled_from(hostile.places(content)))
        change = data.draw(st.sampled_from(["value", "value", "value", "remove", "rename", "text"]))
        if change == "value":
            new = hostile.changed(content, at, data.draw(st.sampled_from(hostile.VALUES)))
        elif change == "remove":
            new = hostile.changed(content, at, ...)
        elif change == "rename":
            new = hostile.changed(content, at, 0, rename=data.draw(st.sampled_from(hostile.TEXTS)))
        else:
            new = hostile.changed(content, at, "@")
        raw = data.draw(st.sampled_from(["[" * 10**5 + "]" * 10**5, "9" * 6000, '{"a":1,"a":2}']))
        hostile.write_json(path, place, json.dumps(new).replace('"@"', raw).encode())
        hostile.exercise(path)
    finally:
        laboratory.remove(path)


@given(data=st.data())
@settings(FEW, max_examples=30)
def test_legacy_index(laboratory, data):
    path = laboratory.copy("legacy")
    try:
        tree = hostile.index(hostile.legacy_leaves())
        *way, last = data.draw(st.sampled_from(hostile.places(tree)))
        node = tree
        for key in way:
            node = node[key]
        change = data.draw(st.sampled_from(["value", "value", "value", "remove", "rename"]))
        if change == "value":
            node[last] = data.draw(st.sampled_from(hostile.INDEX_VALUES))
        elif change == "remove":
            del node[last]
        elif isinstance(node, dict):
            node[data.draw(st.sampled_from(hostile.TEXTS[:-1]))] = node.pop(last)
        (path / "checkpoint").write_bytes(hostile.packed(tree))
        hostile.exercise(path)
    finally:
        laboratory.remove(path)


@pytest.mark.parametrize(
    "value", ["..", "../outside/secret", "..\\outside\\secret", "/etc", "", ".", "a\0b", "link"]
)
@pytest.mark.parametrize("form", ["placeholder", "spec"])
def test_names_of_legacy_folders_stay_inside(laboratory, form, value):
    path = laboratory.copy("legacy")
    os.symlink(laboratory.root / "outside" / "secret", path / "link")
    leaves = hostile.legacy_leaves()
    if form == "placeholder":
        leaves["experts"] = f"PLACEHOLDER://{value}"
    else:
        leaves["w"]["kvstore"]["path"] = value
    (path / "checkpoint").write_bytes(hostile.packed(hostile.index(leaves)))
    if value != "link":
        os.unlink(path / "link")
        # Of a recorded path, only the last part counts: it is looked for inside.
        inside = form == "spec" and value in ("../outside/secret", "/etc")
        refused(laboratory, path, "is missing" if inside else "no folder inside the checkpoint")
    else:
        refused(laboratory, path, "is a link that leads out of the checkpoint")


@pytest.mark.parametrize(
    "key", ["..", "../outside/secret", "/etc", "..\\outside\\secret", "", "\ud800"]
)
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_names_of_orbax_leaves_stay_inside(laboratory, kind, key):
    path = laboratory.copy(kind)
    file = next(path.rglob("_METADATA"))
    content = json.loads(file.read_text())
    content["tree_metadata"]["('target', 'w')"]["key_metadata"] = [{"key": key, "key_type": 2}]
    file.write_text(json.dumps(content))
    refused(laboratory, path, "names no array inside the checkpoint")


def test_a_single_file_reads_no_folder_beside_it(laboratory):
    path = laboratory.copy("msgpack")
    hostile.zarr(path / "beside", hostile.W)
    file = path / "checkpoint_7"
    file.write_bytes(hostile.packed(hostile.index({"w": "PLACEHOLDER://beside"})))
    refused(laboratory, file, "is one file, but its leaf target/w lies in a folder beside")


def test_a_database_that_names_files_elsewhere_is_refused(laboratory):
    """TensorStore itself refuses the path; the test would see it if that changed."""
    path = laboratory.copy("orbax")
    state = path / "state"
    context = storage.new_context()
    memory = ts.KvStore.open({"driver": "memory", "path": "base/"}, context=context).result()
    elsewhere = dict.fromkeys(
        ("value_data_prefix", "btree_node_data_prefix", "version_tree_node_data_prefix"), "../d/"
    )
    spec = {"driver": "ocdbt", "base": {"driver": "memory", "path": "base/"}, **elsewhere}
    ts.KvStore.open(spec, context=context).result().write("k", os.urandom(4096)).result()
    for key in memory.list().result():
        file = state / key.decode()
        file.resolve().parent.mkdir(exist_ok=True)
        file.resolve().write_bytes(memory.read(key).result().value)
    refused(laboratory, path, "Invalid key")


@pytest.mark.parametrize("kind", ["orbax", "folders", "zarr3", "legacy"])
@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_out_of_a_checkpoint_are_refused(laboratory, kind, target):
    path = laboratory.copy(kind)
    if target == "file":
        hostile.link_out(path, max(f for f in path.rglob("*") if f.is_file()))
    else:
        outside = laboratory.root / ("outside" if target == "folder" else "nothing")
        os.symlink(outside, path / "more")
    refused(laboratory, path, "is a link that leads ")


def test_a_checkpoint_may_itself_be_a_link_and_hold_links_inside(laboratory):
    path = laboratory.copy("orbax")
    os.symlink("state", path / "alias")
    os.symlink(path, path.parent / "checkpoint_8")
    assert hostile.exercise(path) is None
    assert open_checkpoint(path.parent / "checkpoint_8").step == 7


@pytest.mark.parametrize("kind", ["orbax", "folders", "legacy"])
def test_a_snapshot_of_the_hub_keeps_its_files_in_blobs(laboratory, kind):
    path = laboratory.copy(kind)
    repository = path.parent / "models--x"
    snapshot = repository / "snapshots" / "0123" / "checkpoint_7"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in path.rglob("*") if f.is_file())):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        place = snapshot / file.relative_to(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(blob, place.parent), place)
    assert hostile.exercise(snapshot) is None
    os.symlink(laboratory.root / "outside", snapshot / "more")
    refused(laboratory, snapshot, "is a link that leads out of the checkpoint")


CLAIMS = {
    "4 TiB in chunks": ({"shape": [1 << 20, 1 << 20]}, "lacks its chunk"),
    "4 TiB in one chunk": ({"shape": [1 << 20, 1 << 20], "chunks": [1 << 20, 1 << 20]}, "claimed"),
    "2^80 elements": ({"shape": [1 << 40, 1 << 40]}, "larger than any array"),
    "a negative dimension": ({"shape": [-24, 30]}, "has the dimension -24"),
    "a dimension of text": ({"shape": ["24", 30]}, "has the dimension '24'"),
    "a fraction": ({"shape": [24.0, 30]}, "has the dimension 24.0"),
    "chunks of no size": ({"chunks": [0, 30]}, "do not cut an array"),
    "chunks of another rank": ({"chunks": [30]}, "do not cut an array"),
    "chunks above the array": ({"chunks": [1 << 30, 30]}, "do not cut an array"),
    "objects": ({"dtype": "|O"}, "the unknown dtype '|O'"),
    "a structure": ({"dtype": [["a", "<f4"]]}, "the unknown dtype"),
    "an unknown codec": ({"compressor": {"id": "rar"}}, "rar"),
    "a separator": ({"dimension_separator": "/../"}, "dimension_separator"),
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("kind", ["orbax", "folders", "legacy"])
def test_claims_of_zarray(laboratory, kind, claim, capsys):
    members, expected = CLAIMS[claim]
    path = laboratory.copy(kind)
    place = {
        "orbax": "database:target.w/.zarray",
        "folders": "target.w/.zarray",
        "legacy": "target.experts/.zarray",
    }[kind]
    if kind == "legacy":
        hostile.zarr(path / "new", hostile.W, chunks=[6, 30], compressor={"id": "gzip"})
        (path / "new").rename(path / "target.w2")
        leaves = {"w": "PLACEHOLDER://target.w2"}
        (path / "checkpoint").write_bytes(hostile.packed(hostile.index(leaves)))
        place = "target.w2/.zarray"
    content = next(json.loads(text) for name, text in hostile.small_json(path) if name == place)
    hostile.write_json(path, place, json.dumps(content | members).encode())
    refused(laboratory, path, expected)
    out = path.parent / "out"
    assert convert.main([str(path), str(out), "--dtype", "bfloat16", "--quiet"]) == 2
    assert expected in capsys.readouterr().err
    assert not (out / "checkpoint_7").exists()


def test_claims_of_msgpack(laboratory):
    path = laboratory.copy("msgpack") / "checkpoint_7"
    array = hostile.packed(hostile.W)
    assert array[:1] == b"\xc8"  # an extension whose length has two bytes
    whole = path.read_bytes()
    shape, huge = b"\x92\x18\x1e", b"\x92\xcf\x00\x00\x01\x00\x00\x00\x00\x00\x1e"
    assert shape in whole
    for new, expected in (
        (whole.replace(shape, b"\x92\x18\x1f"), "whose bytes do not match"),
        (whole.replace(shape, huge), "whose bytes do not match"),
        (whole.replace(shape, b"\xdd\xff\xff\xff\xff"), "an unreadable entry"),
        (whole.replace(b"float32", b"object_"), "the unknown dtype 'object_'"),
        (b"\x81\xa1a" * 10**5 + b"\xc0", "maps nested deeper than 64"),
        (b"\x81\xa1a" + b"\x91" * 10**5 + b"\xc0", "an unreadable entry"),
        (b"\x82\xa1a\x01\xa1a\x02", "a second entry 'a'"),
        (b"\x81\xa1\xff\x01", "an unreadable entry"),
        (b"\x81\xc4\x01\xff\x01", "a key that is no UTF-8"),
        (b"\x81\xa1a\xdb\x7f\xff\xff\xff", "the file ends inside an entry"),
        (b"", "is empty"),
    ):
        path.write_bytes(new)
        refused(laboratory, path, expected)


@pytest.mark.parametrize("kind", ["orbax", "folders", "legacy", "zarr3"])
def test_a_lost_chunk_is_named_and_never_zeros(laboratory, kind):
    path = laboratory.copy(kind)
    if kind in ("orbax", "zarr3"):
        key = "target.w/c/0/0" if kind == "zarr3" else "target.w/0.0"
        spec = storage.ocdbt_spec(path / "state")
        ts.KvStore.open(spec, context=storage.new_context()).result().write(key, None).result()
    else:
        (path / "target.w" / "0.0").unlink()
    refused(laboratory, path, "lacks its chunk")


@pytest.mark.parametrize("kind", ["orbax", "folders"])
def test_conversion_decodes_what_it_copies(laboratory, kind, capsys):
    """Chunks of an Orbax checkpoint are copied as they are stored: damage must not come along."""
    path = laboratory.copy(kind)
    if kind == "orbax":
        spec = storage.ocdbt_spec(path / "state")
        store = ts.KvStore.open(spec, context=storage.new_context()).result()
        store.write("target.w/0.0", os.urandom(2000)).result()
    else:
        (path / "target.w" / "0.0").write_bytes(os.urandom(2000))
    assert convert.main([str(path), str(path.parent / "out"), "--quiet"]) == 2
    assert "leaf target/w cannot be read" in capsys.readouterr().err
    assert not (path.parent / "out" / "checkpoint_7").exists()


def test_names_are_escaped_on_terminals(tmp_path, capsys):
    name = "target/\x1b]0;owned\x07\u202e\n"
    value = np.ones(3, np.float32)
    with hostile.create_checkpoint(
        tmp_path / "checkpoint_1",
        {name: hostile.LeafSpec((3,), value.dtype)},
        step=1,
        metadata={"note": "\x1b[2J"},
    ) as writer:
        writer.write(name, None, value)
        writer.finalize()
    assert inspect.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert r"target/\x1b]0;owned\x07\u202e\n" in text
    assert open_checkpoint(tmp_path).read(name).sum() == 3
