"""Archives of vision transformers, under the names of each project that writes them."""

import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models import registry
from upcycle_jax.models.vit.config import VitMoeConfig
from upcycle_jax.state_tree import TARGET

HEADS = 4


@pytest.fixture
def written(tmp_path):
    """Writes an archive, and reads it."""

    def write(arrays):
        np.savez(tmp_path / "model.npz", **arrays)
        return open_checkpoint(tmp_path / "model.npz")

    return write


def in_vit_jax(arrays):
    """big_vision's arrays under vit_jax's names, with a position for the class token."""
    out = {}
    for name, value in arrays.items():
        name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        if name == "pos_embedding":
            token = np.full((1, 1, value.shape[2]), 0.25, np.float32)
            out["Transformer/posembed_input/pos_embedding"] = np.concatenate([token, value], 1)
        elif name == "cls":
            out["cls"] = value - np.float32(0.25)
        else:
            out[name] = value
    return out


def in_v_moe(arrays):
    out = {}
    for name, value in arrays.items():
        name = name.replace("Transformer/", "Encoder/").replace("MlpBlock_0", "Mlp")
        name = name.replace("MultiHeadDotProductAttention_0", "SelfAttention")
        name = "Encoder/posembed_input/pos_embedding" if name == "pos_embedding" else name
        out[name] = value
    return out


def scanned(arrays):
    """All blocks side by side, as big_vision's scan has them."""
    out, blocks = {}, {}
    for name, value in arrays.items():
        if "encoderblock_" in name:
            _, block, rest = name.split("/", 2)
            blocks.setdefault(rest, {})[int(block.removeprefix("encoderblock_"))] = value
        else:
            out[name] = value
    for rest, by_number in blocks.items():
        stacked = np.stack([by_number[number] for number in sorted(by_number)])
        out[f"Transformer/encoderblock/{rest}"] = stacked
    return out


FORMS = {
    "big_vision": ("mean", lambda arrays: arrays),
    "map": ("map", lambda arrays: arrays),
    "prefix": ("mean", lambda arrays: {f"params/{name}": v for name, v in arrays.items()}),
    "training": (
        "class_token",
        lambda arrays: (
            {f"opt/target/{name}": v for name, v in in_vit_jax(arrays).items()}
            | {"opt/state/step": np.int32(3)}
        ),
    ),
    "siglip": (
        "map",
        lambda arrays: (
            {f"params/img/{name}": v for name, v in arrays.items()}
            | {"params/t": np.float32(1), "params/txt/head/bias": np.zeros(3)}
        ),
    ),
    "vit_jax": ("class_token", in_vit_jax),
    "v_moe": ("renormalised", in_v_moe),
    "scanned": ("mean", scanned),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_read_under_every_name(form, written):
    kind, renamed = FORMS[form]
    params = random_params(model(kind))
    reader = written(renamed(in_big_vision(params, HEADS)))
    assert {name.removeprefix(TARGET) for name in reader.specs()} == set(params)
    for path, value in params.items():
        found = reader.read(TARGET + path)
        # The class token and its position are added: once more rounded.
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-6 * (path == "cls"))
        part = tuple(slice(0, max(1, size // 2)) for size in value.shape)
        np.testing.assert_array_equal(reader.read(TARGET + path, part), found[part])


def test_the_model_is_read_off_the_archive(written):
    one = model("class_token")
    params = random_params(one)
    reader = written(in_vit_jax(in_big_vision(params, HEADS)))
    sparse = registry.infer(reader.specs(), reader.model_settings(), VitMoeConfig(num_experts=4))
    assert sparse.config.dense == one.config and sparse.config.sparse_layers == (2, 3)
    read = {path: reader.read(TARGET + path) for path in params}
    batch = one.features.random(None, batch_size=1)
    apply = jax.jit(one.logits)
    np.testing.assert_allclose(
        apply(trees.unflatten(read), batch), apply(trees.unflatten(params), batch), atol=1e-5
    )


def test_bfloat16_is_read(written):
    params = random_params(model("mean"))
    arrays = in_big_vision(params, HEADS)
    arrays["head/kernel"] = arrays["head/kernel"].astype(ml_dtypes.bfloat16)
    reader = written({**arrays, "head/kernel": arrays["head/kernel"].view("V2")})
    found = reader.read(f"{TARGET}head/kernel")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, arrays["head/kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"pre_logits/kernel": np.zeros(2)}, "pre_logits.*are not read"),
        (lambda a: a | {"other": np.zeros(2)}, "the array other has no place"),
        (lambda a: {"x": np.zeros(2)}, "holds no vision transformer"),
        (lambda a: a | {"pos_embedding": np.zeros((1, 8, 16))}, "8 positions: neither they nor"),
        (lambda a: {k: v for k, v in a.items() if "LayerNorm_1" not in k}, "a part of a model"),
        (
            lambda a: a | {"Transformer/encoderblock_0/LayerNorm_2/scale": np.zeros(16)},
            "are both target/encoder/layers_0/pre_mlp_layer_norm/scale",
        ),
        (lambda a: a | {"cls": np.array([{}], object)}, "pickled objects, which are never read"),
    ],
)
def test_archives_of_other_things_are_refused(change, message, written):
    arrays = in_big_vision(random_params(model("mean")), HEADS)
    with pytest.raises(ValueError, match=message):
        written(change(arrays))


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
