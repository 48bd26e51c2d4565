"""Small checkpoints of every layout that is read, and what damage and malice make of them: the
helpers of test_hostile_files.py.
"""

import json
import os
import pathlib
import shutil
import traceback
from collections.abc import Callable

import msgpack
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

import upcycle_jax
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint, storage
from upcycle_jax.checkpoints.summary import summarize
from upcycle_jax.trees import LeafSpec, Role

PACKAGE = pathlib.Path(upcycle_jax.__file__).parent
SECRET = 74656321.0
"""The value of the array outside of every checkpoint, which no reader may ever give out."""

RNG = np.random.default_rng(0)
W = RNG.random((24, 30), np.float32)
EXPERTS = RNG.random((3, 24, 30), np.float32)
TREE = {
    "target": {"w": W, "mlp": {"expert": {"wi": EXPERTS}}},
    "state": {"step": np.int32(7), "param_states": {"w": {"m": np.zeros(1, np.float32)}}},
}

TEXTS = (
    "",
    ".",
    "..",
    "../outside/secret",
    "..\\outside\\secret",
    "/etc/passwd",
    "w\0x",
    "\x1b[31mred\x07\n",
    "\u202etxt",
    "x" * 5000,
    "|O",
    "<f4",
    "V9999999999",
    "zlib",
    "\ud800",  # no UTF-8: msgpack cannot hold it
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 1 << 31, 1 << 40, 1 << 62, 1 << 70, -(1 << 70), 10**400),
    *(0.5, 1e308, float("nan"), float("inf")),
)
VALUES = (None, True, [], {}, [[]], [1, 2, 3], [{"key": ".."}], *TEXTS, *NUMBERS)
INDEX_VALUES = (
    *(None, True, [], {}, [[]], [1, 2, 3], b"x", *TEXTS[:-1]),
    *(x for x in NUMBERS if isinstance(x, float) or -(1 << 63) <= x < 1 << 64),
    *("PLACEHOLDER://..", "PLACEHOLDER://../outside/secret", "PLACEHOLDER://target.w"),
    *({"driver": "file", "kvstore": {}}, {"driver": "zarr", "kvstore": 3}),
    {"driver": "zarr", "kvstore": {"path": "../outside/secret"}},
)


def zarr(folder: pathlib.Path, value: np.ndarray, **metadata: object) -> None:
    """A zarr 2 array in a folder of its own."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {"shape": list(value.shape), "chunks": list(value.shape), **metadata},
        "dtype": value.dtype.name,
    }
    ts.open(spec, create=True).result().write(value).result()


def packed(value: object) -> bytes:
    """A value as flax's msgpack serialisation stores it."""

    def extension(array: np.ndarray) -> msgpack.ExtType:
        code = 3 if isinstance(array, np.generic) else 1
        triple = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(code, msgpack.packb(triple))

    return msgpack.packb(value, default=extension, strict_types=True)


def index(leaves: dict[str, object]) -> dict[str, object]:
    """The tree of a legacy index."""
    state = {"step": np.int32(7), "param_states": {"w": {"m": np.zeros(1, np.float32)}}}
    return {"version": 3, "optimizer": {"target": leaves, "state": state}}


def legacy_leaves() -> dict[str, object]:
    """A leaf of every kind that a legacy index has: see `write_legacy`."""
    return {
        "w": {
            "driver": "zarr",
            "dtype": "float32",
            "kvstore": {"driver": "gfile", "path": "target.w/"},
            "metadata": {"shape": [24, 30], "chunks": [24, 30], "compressor": {"id": "gzip"}},
        },
        "experts": "PLACEHOLDER://target.experts",
        "inline": W[:2],
        "number": 3,
    }


def write_orbax(path: pathlib.Path) -> None:
    specs = {
        "target/w": LeafSpec(W.shape, W.dtype),
        "target/mlp/expert/wi": LeafSpec(EXPERTS.shape, EXPERTS.dtype, role=Role.EXPERT),
        "state/param_states/w/m": LeafSpec((1,), W.dtype),
    }
    values = {"target/w": W, "target/mlp/expert/wi": EXPERTS}
    with create_checkpoint(path, specs, step=7, metadata={"seed": 3}, chunk_bytes=1 << 11) as out:
        for name, spec in specs.items():
            out.write(name, None, values.get(name, np.zeros(spec.shape, spec.dtype)))
        out.finalize()


def write_folders(path: pathlib.Path) -> None:
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(path, TREE)


def write_zarr3(path: pathlib.Path) -> None:
    ocp.v1.save(path, TREE | {"state": {"step": np.asarray(7, np.int32)}})


def write_legacy(path: pathlib.Path) -> None:
    path.mkdir()
    zarr(path / "target.w", W, compressor={"id": "gzip"})
    (path / "target.w" / ".zarray").unlink()  # T5X wrote it to the index alone.
    zarr(path / "target.experts", EXPERTS, compressor={"id": "gzip"}, chunks=[1, 24, 30])
    (path / "checkpoint").write_bytes(packed(index(legacy_leaves())))


def write_msgpack(path: pathlib.Path) -> None:
    path.mkdir()
    pieces = {str(i): part for i, part in enumerate(np.array_split(W.reshape(-1), 3))}
    shape = {"0": 24, "1": 30}
    leaves = {
        "w": W,
        "b": EXPERTS.astype("bfloat16"),
        "c": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": pieces},
    }
    (path / "checkpoint_7").write_bytes(packed(index(leaves)))


KINDS: dict[str, Callable[[pathlib.Path], None]] = {
    "orbax": write_orbax,
    "folders": write_folders,
    "zarr3": write_zarr3,
    "legacy": write_legacy,
    "msgpack": write_msgpack,
}


class Laboratory:
    """The checkpoints, written once; `copy` gives one to be damaged.

    Attributes:
      root: folder of everything; `root/outside/secret` is an array that nobody may read.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        zarr(root / "outside" / "secret", np.full((24, 30), SECRET, np.float32))
        for name in ("_METADATA", "checkpoint"):
            (root / "outside" / name).write_text(str(SECRET))
        for kind, write in KINDS.items():
            write(root / f"{kind}_original")
        self._count = 0

    def copy(self, kind: str) -> pathlib.Path:
        self._count += 1
        folder = self.root / f"case_{self._count}"
        shutil.copytree(self.root / f"{kind}_original", folder / "checkpoint_7")
        return folder / "checkpoint_7"

    def remove(self, path: pathlib.Path) -> None:
        shutil.rmtree(path.parent)


def opened(path: pathlib.Path) -> pathlib.Path:
    """What is opened of a copy: itself, or the one file in it."""
    file = path / "checkpoint_7"
    return file if file.exists() else path


def exercise(path: pathlib.Path) -> str | None:
    """Opens a checkpoint, reads all of it and shows it.

    Returns:
      The message where it is refused; None where all went well.

    Raises:
      AssertionError: an error is not one of the library's own, or is not one line that names the
        checkpoint; or something outside was read.
    """
    try:
        reader = open_checkpoint(path)
        summary = summarize(reader)
        text = summary.text()
        json.dumps(summary.json())
        for name in reader.specs():
            assert SECRET not in reader.read(name).astype(np.float64)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        assert PACKAGE in pathlib.Path(frame.filename).parents, (message, frame)
        assert str(path) in message, message
        assert str(int(SECRET)) not in message, message
        assert message.isprintable(), message
        return message
    assert all(line.isprintable() for line in text.splitlines())
    assert str(int(SECRET)) not in text
    return None


def small_json(path: pathlib.Path) -> list[tuple[str, bytes]]:
    """The JSON documents of a checkpoint: (place, content). Those in a database are named
    'database:<key>'.
    """
    names = ("_METADATA", "_CHECKPOINT_METADATA", ".zarray", "zarr.json")
    found = [
        (str(file.relative_to(path)), file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.name in names
    ]
    if (path / "state" / "manifest.ocdbt").exists():
        store = ts.KvStore.open(
            storage.ocdbt_spec(path / "state"), context=storage.new_context()
        ).result()
        for key in sorted(store.list().result()):
            if key.endswith((b".zarray", b"zarr.json")):
                found.append((f"database:{key.decode()}", store.read(key).result().value))
    return found


def write_json(path: pathlib.Path, place: str, content: bytes) -> None:
    """Replaces one document of `small_json`."""
    if place.startswith("database:"):
        store = ts.KvStore.open(
            storage.ocdbt_spec(path / "state"), context=storage.new_context()
        ).result()
        store.write(place.removeprefix("database:"), content).result()
    else:
        (path / place).write_bytes(content)


def places(content: object, at: tuple = ()) -> list[tuple]:
    """The position of every member and item of nested JSON."""
    out = [at] if at else []
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            out += places(value, (*at, key))
    return out


def changed(content: object, at: tuple, value: object, *, rename: str | None = None) -> object:
    """A copy of nested JSON with one place replaced, removed (`value` is ...), or renamed."""
    out = json.loads(json.dumps(content))
    node = out
    for key in at[:-1]:
        node = node[key]
    if rename is not None and isinstance(node, dict):
        node[rename] = node.pop(at[-1])
    elif value is ...:
        del node[at[-1]]
    else:
        node[at[-1]] = value
    return out


def link_out(path: pathlib.Path, file: pathlib.Path) -> None:
    """Replaces a file by a link to one of the same name outside."""
    file.unlink()
    outside = path.parents[1] / "outside"
    os.symlink(outside / (file.name if (outside / file.name).exists() else "secret/0.0"), file)
