"""V-MoE's own files: dense models and models with experts, and what is refused."""

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest

from tests.checkpoints.vit.forms import HEADS, in_v_moe, write_vmoe_files
from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models import registry
from upcycle_jax.models.vit.config import VitMoeConfig
from upcycle_jax.state_tree import STEP, TARGET


@pytest.fixture
def params():
    return random_params(model("renormalised"))


@pytest.fixture
def arrays(params):
    return in_v_moe(in_big_vision(params, HEADS))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("named", ["", ".index"])
def test_experts_are_read_in_parts(shards, named, params, arrays, tmp_path):
    write_vmoe_files(tmp_path / "ckpt_5", arrays, shards=shards)
    reader = open_checkpoint(tmp_path / f"ckpt_5{named}")
    assert reader.format == "vmoe" and str(reader.path) == str(tmp_path / "ckpt_5")
    assert {name.removeprefix(TARGET) for name in reader.specs() if name != STEP} == set(params)
    for path, value in params.items():
        np.testing.assert_array_equal(reader.read(TARGET + path), value)
        part = tuple(slice(size // 3, max(1, 2 * size // 3)) for size in value.shape)
        np.testing.assert_array_equal(reader.read(TARGET + path, part), value[part])


def test_a_training_state_is_read(params, arrays, tmp_path):
    state = {f"params/{name}": value for name, value in arrays.items()}
    state |= {"opt_state/0/trace/head/bias": np.ones(7, np.float32), "step": np.int32(12)}
    state["rngs/dropout"] = np.zeros(2, np.uint32)
    write_vmoe_files(tmp_path / "ckpt", state)
    reader = open_checkpoint(tmp_path / "ckpt")
    assert reader.step == 12 and len(reader.specs()) == len(params) + 1
    # Before versions had names, a training state's arrays were numbered in an unknown order.
    write_vmoe_files(tmp_path / "old", state, version=None)
    assert open_checkpoint(tmp_path / "old").step == 12


def test_a_dense_model_becomes_sparse(tmp_path):
    one = model("mean")
    params = random_params(one)
    arrays = in_v_moe(in_big_vision(params, HEADS))
    arrays["head/bias"] = arrays["head/bias"].astype(ml_dtypes.bfloat16)
    write_vmoe_files(tmp_path / "ckpt", arrays)
    reader = open_checkpoint(tmp_path / "ckpt")
    sparse = registry.infer(reader.specs(), reader.model_settings(), VitMoeConfig(num_experts=4))
    assert sparse.config.dense == one.config
    read = {path: reader.read(TARGET + path) for path in params}
    assert read["head/bias"].dtype == ml_dtypes.bfloat16
    batch = one.features.random(None, batch_size=1)
    params["head/bias"] = params["head/bias"].astype(ml_dtypes.bfloat16)
    apply = jax.jit(one.logits)
    np.testing.assert_allclose(
        apply(trees.unflatten(read), batch), apply(trees.unflatten(params), batch), atol=1e-5
    )


def rewritten(tmp_path, change):
    """The index with a change."""
    path = tmp_path / "ckpt.index"
    content = msgpack.unpackb(path.read_bytes())
    change(content)
    path.write_bytes(msgpack.packb(content))


def entry(shape=(7,), slices=((0, 7),), shard=0, dtype="float32"):
    """An array of the index."""

    def pack(value):
        return msgpack.packb(value, use_bin_type=True)

    pieces = [pack([pack([start, stop, None]) for start, stop in slices])]
    shape = pack([list(shape), dtype, False, {}])
    return msgpack.ExtType(8, pack([shape, pieces, [shard]]))


def head_bias(value):
    return lambda content: content["index"]["head"].update(bias=value)


REFUSED = {
    "a huge array": (head_bias(entry((1 << 40,), ((0, 1 << 40),))), "bytes of arrays belong"),
    "pieces that leave gaps": (head_bias(entry(slices=((0, 3),))), "do not make up its shape"),
    "a slice outside": (head_bias(entry(slices=((0, 9),))), "a slice of 7 entries from 0 to 9"),
    "a shard that is not there": (head_bias(entry(shard=7)), "lies in shard 7 of 2"),
    "objects": (head_bias(entry(dtype="object")), "the unknown dtype 'object'"),
    "an unknown extension": (head_bias(msgpack.ExtType(9, b"x")), "unknown extension type 9"),
    "a name that leads out": (
        lambda content: content["index"].update({"..": entry()}), "names no array inside",
    ),
    "another version": (lambda content: content.update(version="2"), "is of the version '2'"),
    "no count": (lambda content: content.update(shard_count=0), "shard_count is no number"),
    "no tree": (lambda content: content.update(index=3), "it has no index"),
    "too many files": (lambda content: content.update(shard_count=3), "-of-00003 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_an_index_that_cannot_be_is_refused(why, arrays, tmp_path):
    write_vmoe_files(tmp_path / "ckpt", arrays)
    change, message = REFUSED[why]
    rewritten(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(tmp_path / "ckpt")


@pytest.mark.parametrize("file", ["ckpt.index", "ckpt.data-00001-of-00002"])
def test_truncated_files_are_refused(file, arrays, tmp_path):
    write_vmoe_files(tmp_path / "ckpt", arrays)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ValueError, match=f"{file} is no complete msgpack checkpoint: the file en"):
        reader = open_checkpoint(tmp_path / "ckpt")
        for name in reader.specs():
            reader.read(name)


def test_a_shard_of_another_checkpoint_is_refused(arrays, tmp_path):
    write_vmoe_files(tmp_path / "ckpt", arrays, shards=1)
    other = arrays | {"head/bias": arrays["head/bias"].astype(np.float64)}
    write_vmoe_files(tmp_path / "other", other, shards=1)
    (tmp_path / "other.data-00000-of-00001").rename(tmp_path / "ckpt.data-00000-of-00001")
    with pytest.raises(ValueError, match=r"a piece of head/bias is not what the index says"):
        open_checkpoint(tmp_path / "ckpt").read(f"{TARGET}head/bias")


def test_a_missing_prefix_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PREFIX.index and PREFIX.data-\* of V-MoE"):
        open_checkpoint(tmp_path / "ckpt")
