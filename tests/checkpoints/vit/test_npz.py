"""NumPy archives: what is in them, in parts, and what is refused."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.vit.forms import HEADS
from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.vit.npz import NpzArrays
from upcycle_jax.state_tree import TARGET


@pytest.fixture
def written(tmp_path):
    """Writes an archive, and reads it."""

    def write(arrays):
        np.savez(tmp_path / "model.npz", **arrays)
        return open_checkpoint(tmp_path / "model.npz")

    return write


def test_bfloat16_is_read(written):
    params = random_params(model("mean"))
    arrays = in_big_vision(params, HEADS)
    arrays["head/kernel"] = arrays["head/kernel"].astype(ml_dtypes.bfloat16)
    reader = written({**arrays, "head/kernel": arrays["head/kernel"].view("V2")})
    found = reader.read(f"{TARGET}head/kernel")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, arrays["head/kernel"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_in_parts(save, tmp_path):
    value = np.arange(60.0).reshape(5, 4, 3)
    save(tmp_path / "a.npz", **{"c/order": value, "fortran": np.asfortranarray(value)})
    arrays = NpzArrays(tmp_path / "a.npz")
    for part in ((slice(1, 3), slice(0, 4), slice(2, 3)), (slice(0, 5), slice(0, 4), slice(0, 3))):
        for name in ("c/order", "fortran"):
            np.testing.assert_array_equal(arrays.read(name, part), value[part])


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **in_big_vision(random_params(model("mean")), HEADS))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no NumPy archive, or a part of one"):
        open_checkpoint(path)
    header = np.lib.format.header_data_from_array_1_0(np.zeros(3)) | {"shape": (1 << 40,)}
    with zipfile.ZipFile(path, "w") as members, members.open("embedding/kernel.npy", "w") as out:
        np.lib.format.write_array_header_1_0(out, header)
    with pytest.raises(ValueError, match="its size is not that of its shape"):
        open_checkpoint(path)
    # Zeros of 1 GiB that a few bytes claim to unpack to.
    with zipfile.ZipFile(path, "w") as members, members.open("a.npy", "w") as out:
        np.lib.format.write_array(out, np.zeros(100))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="the array a is damaged"):
        open_checkpoint(path)
