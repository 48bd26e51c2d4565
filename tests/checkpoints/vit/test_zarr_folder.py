"""big_vision's folders of arrays."""

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from tests.checkpoints.vit.forms import HEADS
from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.state_tree import STEP, TARGET


def write(folder, arrays):
    """As jax.experimental.array_serialization does for big_vision: zarr, gzip, one folder each."""
    for name, value in arrays.items():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / name.replace("/", "~"))},
            "metadata": {
                "compressor": {"id": "gzip"},
                "shape": value.shape,
                "chunks": [max(1, size // 2) if size % 2 == 0 else size for size in value.shape],
            },
        }
        store = ts.open(spec, create=True, dtype=ts.dtype(value.dtype)).result()
        store.write(value).result()


@pytest.fixture
def params():
    return random_params(model("mean"))


@pytest.fixture
def written(params, tmp_path):
    """A training state, at the path that its users name."""
    arrays = in_big_vision(params, HEADS)
    arrays["head/bias"] = arrays["head/bias"].astype(ml_dtypes.bfloat16)
    state = {f"params/{name}": value for name, value in arrays.items()}
    state |= {"opt/0/0": np.asarray(7, np.int32), "chrono/accum_train_time": np.asarray(2.0)}
    write(tmp_path / "checkpoint.bv-000000007", state)
    return tmp_path / "checkpoint.bv-000000007"


@pytest.mark.parametrize("pointed", [False, True])
def test_a_training_state_is_read(pointed, params, written, caplog):
    path = written
    if pointed:
        path = written.with_name("checkpoint.bv")
        written.with_name("checkpoint.bv-LAST").write_text("000000007")
    reader = open_checkpoint(path)
    assert reader.format == "big_vision"
    assert "holds its optimizer's state (arrays: 1), which is not read" in caplog.text
    assert {name.removeprefix(TARGET) for name in reader.specs() if name != STEP} == set(params)
    for name, value in params.items():
        if name == "head/bias":
            value = value.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(reader.read(TARGET + name), value)
        part = tuple(slice(size // 2, size) for size in value.shape)
        np.testing.assert_array_equal(reader.read(TARGET + name, part), value[part])


def missing_chunk(folder):
    (folder / "params~head~kernel" / "0.0").unlink()


def foreign_file(folder):
    (folder / "notes.txt").write_text("mine")


def outside(folder):
    chunk = folder / "params~head~bias" / "0"
    chunk.rename(folder.parent / "elsewhere")
    chunk.symlink_to(folder.parent / "elsewhere")


def misplaced(folder):
    (folder / "params~head~bias").rename(folder / "params~tail~bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_chunk, "lacks its chunk 0.0"),
        (foreign_file, "holds the file notes.txt among folders"),
        (outside, "a link that leads out of the checkpoint"),
        (misplaced, "the array params/tail/bias has no place"),
    ],
)
def test_damaged_folders_are_refused(change, message, written):
    change(written)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(written)


def test_a_pointer_leads_to_no_other_folder(written):
    written.with_name("checkpoint.bv-LAST").write_text("../../etc")
    with pytest.raises(ValueError, match="is no step"):
        open_checkpoint(written.with_name("checkpoint.bv"))
