"""T5X's formats from before Orbax, on checkpoints that T5X itself wrote and on ones written here
for each special case.
"""

import pathlib
import shutil

import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.msgpack_index import ChunkedArray, InlineArray, load_index

TESTDATA = pathlib.Path(__file__).parents[3] / "shared" / "reference" / "t5x_testdata"
real = pytest.mark.skipif(
    not TESTDATA.exists(), reason="the T5X test checkpoints are not beside this checkout"
)


def packed(value):
    """A value as flax's msgpack serialisation stores it: arrays as extension 1 with (shape, dtype
    name, bytes).
    """

    def extension(array):
        code = 3 if isinstance(array, np.generic) else 1
        return msgpack.ExtType(
            code, msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        )

    return msgpack.packb(value, default=extension, strict_types=True)


def chunked(array, pieces):
    parts = np.array_split(array.reshape(-1), pieces)
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): part for i, part in enumerate(parts)},
    }


def single_file(path, target, **others):
    path.write_bytes(
        packed(
            {
                "version": 3,
                "optimizer": {"state": {"step": np.int32(7), "param_states": {}}, "target": target},
                **others,
            }
        )
    )
    return open_checkpoint(path)


def stored(folder, name, value, *, dtype=None, keep_zarray=True, chunks=None):
    """Writes a zarr array as T5X did, and gives the spec that its index holds."""
    metadata = {
        "shape": list(value.shape),
        "chunks": list(chunks or value.shape),
        "compressor": {"id": "gzip", "level": 1},
    }
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/{name}/"},
        "metadata": metadata,
        "dtype": value.dtype.name,
    }
    ts.open(spec, create=True).result().write(value).result()
    if not keep_zarray:
        (folder / name / ".zarray").unlink()
    kvstore = {"driver": "gfile", "path": f"{name}/"}
    return {
        "driver": "zarr",
        "dtype": dtype or value.dtype.name,
        "kvstore": kvstore,
        "metadata": metadata,
    }


def directory(path, leaves, *, version=3, root="optimizer"):
    tree = {root: {"target": leaves, "state": {"step": np.int32(7)}}}
    (path / "checkpoint").write_bytes(
        packed(tree if version is None else {"version": version, **tree})
    )
    return open_checkpoint(path)


@real
def test_real_single_file():
    reader = open_checkpoint(TESTDATA / "test_t5_tiny.checkpoint_0")
    specs = reader.specs()
    assert (reader.format, reader.step, reader.version) == ("t5x_msgpack", 0, 3)
    targets = {name: spec for name, spec in specs.items() if name.startswith("target/")}
    # 2 + 2 layers, d_model 8, 3 heads' worth of 12 columns, d_ff 16, vocabulary 32,128: the count
    # that T5X itself prints.
    assert (len(targets), sum(spec.size for spec in targets.values())) == (52, 518_240)
    assert len(specs) == 52 + 4 * 52 + 1
    assert specs["target/token_embedder/embedding"].shape == (32128, 8)
    assert specs["state/param_states/encoder/layers_0/mlp/wi_0/kernel/v"].shape == (8, 16)
    assert specs["state/param_states/encoder/layers_0/mlp/wi_0/kernel/v_row"].shape == (1,)
    whole = reader.read("target/token_embedder/embedding")
    np.testing.assert_array_equal(
        reader.read("target/token_embedder/embedding", (slice(100, 110), slice(3, 5))),
        whole[100:110, 3:5],
    )
    assert np.isfinite(whole).all()
    assert 0.5 < whole.std() < 2  # T5 initialises embeddings with a standard deviation of 1.


@real
def test_real_single_file_equals_a_full_load():
    flax_serialization = pytest.importorskip("flax.serialization")
    path = TESTDATA / "test_t5_tiny.checkpoint_0"
    tree = flax_serialization.msgpack_restore(path.read_bytes())["optimizer"]["target"]
    reader = open_checkpoint(path)
    for name in reader.specs():
        if name.startswith("target/"):
            leaf = tree
            for part in name.split("/")[1:]:
                leaf = leaf[part]
            np.testing.assert_array_equal(reader.read(name), leaf, err_msg=name)


@real
def test_real_folder_without_zarray():
    reader = open_checkpoint(TESTDATA / "tiny_t5" / "checkpoint_1")
    assert (reader.format, reader.step) == ("t5x_legacy", 1)
    assert {name: str(spec) for name, spec in reader.specs().items()} == {
        "state/param_states/bias": "float32[5]",
        "state/param_states/kernel": "float64[10,5]",
        "state/param_states/step": "int32[]",
        "state/step": "int32[]",
    }
    kernel = reader.read("state/param_states/kernel")
    assert ((kernel > 0) & (kernel < 1)).all()  # It was drawn uniformly.
    np.testing.assert_array_equal(
        reader.read("state/param_states/kernel", (slice(2, 4),)), kernel[2:4]
    )
    assert open_checkpoint(TESTDATA / "tiny_t5").step == 1
    assert (
        open_checkpoint(TESTDATA / "tiny_t5" / "checkpoint_1" / "checkpoint").specs()
        == reader.specs()
    )


@real
def test_real_placeholders(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"leaf state/param_states/bias: .* has no \.zarray, and the index does not give its"
            r" shape"
        ),
    ):
        open_checkpoint(TESTDATA / "tiny_orbax" / "1").specs()
    copy = tmp_path / "checkpoint_1"
    shutil.copytree(TESTDATA / "tiny_orbax" / "1", copy)
    shapes = {
        "param_states.bias": ("<f4", [5]),
        "param_states.kernel": ("<f8", [10, 5]),
        "param_states.step": ("<i4", []),
        "step": ("<i4", []),
    }
    for name, (dtype, shape) in shapes.items():
        members = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": shape,
            "dtype": dtype,
            "order": "C",
            "fill_value": None,
            "filters": None,
        }
        members["compressor"] = {"id": "zstd", "level": 1}
        folder = copy / f"_optimizer.state.{name}"
        folder.chmod(0o755)
        (folder / ".zarray").write_text(str(members).replace("'", '"').replace("None", "null"))
    reader = open_checkpoint(copy)
    assert (reader.version, reader.step) == (0, int(reader.read("state/step")))
    kernel = reader.read("state/param_states/kernel")
    assert kernel.shape == (10, 5)
    assert ((kernel > 0) & (kernel < 1)).all()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_chunked_arrays_read_in_parts(tmp_path_factory, data):
    """Arrays above 1 GiB are stored as flat pieces whose ends fall anywhere."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path_factory.mktemp("m") / "file"
    reader = single_file(path, {"a": chunked(array, data.draw(st.integers(1, 5)))})
    index = tuple(
        slice(start, data.draw(st.integers(start, n)))
        for n in shape
        for start in [data.draw(st.integers(0, n))]
    )
    np.testing.assert_array_equal(reader.read("target/a", index), array[index])
    np.testing.assert_array_equal(reader.read("target/a"), array)


def test_inline_leaves_of_every_kind(tmp_path):
    bf16 = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    target = {
        "bf16": bf16,
        "half": np.float16([1.5]),
        "scalar": np.float32(2.5),
        "list": {"0": np.ones(2), "1": np.zeros(1)},
        "none": None,
        "empty": {},
    }
    reader = single_file(tmp_path / "file", target, flax_mutables=None)
    assert sorted(reader.specs()) == [
        "state/step",
        "target/bf16",
        "target/half",
        "target/list/0",
        "target/list/1",
        "target/scalar",
    ]
    assert reader.read("target/bf16").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        reader.read("target/bf16", (slice(1, 2),)).astype(np.float32), [[3, 4, 5]]
    )
    assert reader.read("target/scalar") == 2.5
    assert reader.step == 7


def test_large_maps_and_long_strings(tmp_path):
    """More than 15 and more than 65,535 entries change the map's header; a string longer than the
    first window makes it grow.
    """
    (tmp_path / "file").write_bytes(
        packed({"names": "x" * 5000, **{f"k{i}": i for i in range(70_000)}})
    )
    tree = load_index(open_path(tmp_path / "file"))
    assert (len(tree), tree["k69999"], len(tree["names"])) == (70_001, 69_999, 5000)


def open_path(path):
    return epath.Path(path)


def test_arrays_stay_in_the_file(tmp_path):
    """64 MB of arrays are opened without reading them: the leaves are views of the mapped file."""
    target = {str(i): np.zeros((1024, 1024), np.float32) for i in range(16)}
    single_file(tmp_path / "file", target)
    tree = load_index(open_path(tmp_path / "file"))["optimizer"]["target"]
    assert all(
        isinstance(leaf, InlineArray) and not leaf.view().flags.owndata for leaf in tree.values()
    )
    assert isinstance(
        load_index(open_path(_written(tmp_path / "c", {"a": chunked(np.ones(4), 2)})))["optimizer"][
            "target"
        ]["a"],
        ChunkedArray,
    )


def _written(path, target):
    single_file(path, target)
    return path


@pytest.mark.parametrize("keep_zarray", [True, False])
@pytest.mark.parametrize("version", [3, 2, None])
def test_bfloat16_stored_as_uint16(tmp_path, version, keep_zarray):
    """Until version 2 bfloat16 went to disk bit by bit as uint16; the same bits must come back, not
    their integer values.
    """
    bf16 = np.asarray([[0.5, -2.0], [1e-3, 3e30]], ml_dtypes.bfloat16)
    name = "bfloat16" if version == 3 else "uint16"
    spec = stored(tmp_path, "target.w", bf16.view(np.uint16), dtype=name, keep_zarray=keep_zarray)
    reader = directory(tmp_path, {"w": spec}, version=version)
    assert reader.specs()["target/w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(reader.read("target/w"), bf16)


def test_bfloat16_stored_as_itself(tmp_path):
    bf16 = np.asarray([0.5, -2.0], ml_dtypes.bfloat16)
    reader = directory(tmp_path, {"w": stored(tmp_path, "target.w", bf16)})
    np.testing.assert_array_equal(reader.read("target/w"), bf16)


def test_zarray_is_trusted_over_the_index(tmp_path):
    value = np.arange(12.0).reshape(3, 4)
    spec = stored(tmp_path, "target.w", value, chunks=(2, 2))
    spec["metadata"] = spec["metadata"] | {"shape": [4, 3], "chunks": [4, 3]}
    np.testing.assert_array_equal(directory(tmp_path, {"w": spec}).read("target/w"), value)


@pytest.mark.parametrize(
    "place",
    [
        {
            "kvstore": {
                "driver": "gcs",
                "bucket": "t5x-dummy-bucket",
                "path": "models/t5/checkpoint_9/target.w/",
            }
        },
        {"kvstore": {"driver": "file", "path": "/long/gone/checkpoint_9.tmp-1234/target.w"}},
        {
            "kvstore": {"driver": "gfile", "path": "models/checkpoint_9"},
            "path": "target.w/",
        },  # Before version 3.
    ],
)
def test_recorded_places_are_rebased(tmp_path, place):
    value = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    spec = {**stored(tmp_path, "target.w", value), **place}
    reader = directory(tmp_path, {"w": spec}, root="_optimizer")
    np.testing.assert_array_equal(reader.read("target/w", (slice(1, 2),)), value[1:2])


def test_missing_parts_are_named(tmp_path):
    spec = stored(tmp_path, "target.w", np.ones(3))
    shutil.rmtree(tmp_path / "target.w")
    with pytest.raises(
        ValueError, match=r"leaf target/w: .*target\.w is missing: the index names it"
    ):
        directory(tmp_path, {"w": spec}).specs()
    with pytest.raises(ValueError, match=r"leaf target/w: .*other is missing"):
        directory(tmp_path, {"w": "PLACEHOLDER://other"}).read("target/w")


@given(st.floats(0.01, 0.999))
@settings(max_examples=30, deadline=None)
def test_truncated_files_are_always_noticed(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("m")
    target = {
        f"layer_{i}": {"kernel": np.ones((3, 5), np.float32), "name": None} for i in range(20)
    }
    content = packed({"optimizer": {"target": target, "state": {"step": 3}}})
    (folder / "file").write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(ValueError, match="is no complete msgpack checkpoint: .* Copy it again"):
        open_checkpoint(folder / "file")


def test_other_msgpack_files_are_named(tmp_path):
    (tmp_path / "file").write_bytes(packed({"params": {"w": np.ones(2)}}))
    with pytest.raises(ValueError, match="msgpack but no T5X checkpoint: it has params"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        open_checkpoint(tmp_path / "empty")
