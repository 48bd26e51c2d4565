"""Archives and V-MoE's files that are written: read by NumPy and as V-MoE reads them, and again by
this library.
"""

import re

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.vit.forms import HEADS, in_v_moe, in_vit_jax, read_vmoe_files
from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax import convert
from upcycle_jax.checkpoints import create_checkpoint, model_settings, open_checkpoint
from upcycle_jax.checkpoints.vit import writing
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec


def stored(folder, kind, change=lambda params: params):
    """A checkpoint of this library with random parameters, and these."""
    one = model(kind)
    params = change(random_params(one))
    specs = {TARGET + path: LeafSpec(value.shape, value.dtype) for path, value in params.items()}
    record = model_settings.record(one.config.forward_settings)
    with create_checkpoint(folder / "checkpoint_3", specs, step=3, metadata=record) as writer:
        for path, value in params.items():
            writer.write(TARGET + path, None, value)
        writer.finalize()
    return params


def run(*words):
    return convert.main([str(word) for word in (*words, "--quiet")])


def assert_read_again(path, params):
    reader = open_checkpoint(path)
    assert {name.removeprefix(TARGET) for name in reader.specs()} == set(params)
    for name, value in params.items():
        found = reader.read(TARGET + name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value, err_msg=name)


def assert_arrays(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["mean", "class_token", "map"])
def test_archives_hold_big_vision_s_arrays(kind, tmp_path):
    params = stored(tmp_path, kind)
    assert run(tmp_path, tmp_path / "model.npz", "--to", "npz") == 0
    with np.load(tmp_path / "model.npz") as arrays:
        assert_arrays(arrays, in_big_vision(params, HEADS))
    assert_read_again(tmp_path / "model.npz", params)


def test_archives_hold_vit_jax_s_arrays(tmp_path):
    params = stored(tmp_path, "class_token")
    output = tmp_path / "model.npz"
    assert run(tmp_path, output, "--to", "npz", "--model_type", "vit_jax") == 0
    # The class token's position is in the token: the table's first row is zero.
    expected = in_vit_jax(in_big_vision(params, HEADS)) | {"cls": params["cls"]}
    positions = "Transformer/posembed_input/pos_embedding"
    expected[positions] = expected[positions] - np.eye(1, 10, dtype=np.float32)[..., None] * 0.25
    with np.load(output) as arrays:
        assert_arrays(arrays, expected)
    assert_read_again(output, params)


def test_bfloat16_is_stored_as_two_bytes(tmp_path):
    params = stored(tmp_path, "mean")
    output = tmp_path / "model.npz"
    assert run(tmp_path, output, "--to", "npz", "--dtype", "bfloat16") == 0
    with np.load(output) as arrays:
        assert {arrays[name].dtype for name in arrays} == {np.dtype("V2")}
    assert_read_again(output, {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()})


@pytest.mark.parametrize("kind", ["mean", "renormalised", "class_token"])
@pytest.mark.parametrize("memory", ["1GiB", "8KiB"])
def test_v_moe_reads_its_own_names_and_shapes(kind, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_MAX_PART", 1000)  # Arrays in several parts, as above 1 GiB.
    params = stored(tmp_path, kind)
    assert run(tmp_path, tmp_path / "ckpt", "--to", "vmoe", "--max_memory", memory) == 0
    arrays = in_big_vision(params, HEADS)
    if kind == "class_token":
        arrays["pos_embedding"] = np.pad(params["pos_embedding"], ((0, 0), (1, 0), (0, 0)))
    assert_arrays(read_vmoe_files(tmp_path / "ckpt"), in_v_moe(arrays))
    assert_read_again(tmp_path / "ckpt", params)
    shards = len(list(tmp_path.glob("ckpt.data-*")))
    assert shards == 1 if memory == "1GiB" else shards > 2
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def with_nan(params):
    params["encoder/layers_1/mlp/wo/kernel"][3, 2] = np.nan
    return params


REFUSED = {
    "experts as big_vision": ("renormalised", "npz", "it has experts: write V-MoE's names, or me"),
    "CLIP": (
        "clip",
        "npz",
        "mlp_activations .'quick_gelu',., these compute .'gelu',.; it",
    ),
    "DINOv2": ("dinov2", "vmoe", "gelu_exact.*sublayers are scaled"),
    "attention pooling": ("map", "vmoe", "it pools by attention: write big_vision's names"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_models_of_other_arithmetic_are_refused(why, tmp_path, capsys):
    kind, form, message = REFUSED[why]
    stored(tmp_path, kind)
    assert run(tmp_path, tmp_path / "out.npz", "--to", form) == 2
    found = capsys.readouterr().err
    assert re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_3"]


@pytest.mark.parametrize("form", ["npz", "vmoe"])
def test_nan_is_refused_and_nothing_is_left(form, tmp_path, capsys):
    stored(tmp_path, "mean", with_nan)
    assert run(tmp_path, tmp_path / "out.npz", "--to", form) == 2
    message = "encoder/layers_1/mlp/wo/kernel has NaN or infinite values"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_3"]


FLAGS = {
    "a step": (("--step", 3), "V-MoE's tree holds neither a step nor optimizer state"),
    "a reader": (("--reader", "vllm"), "--reader says nothing about V-MoE's tree"),
}


@pytest.mark.parametrize("why", FLAGS)
def test_flags_without_meaning_are_refused(why, tmp_path, capsys):
    stored(tmp_path, "mean")
    words, message = FLAGS[why]
    assert run(tmp_path, tmp_path / "ckpt", "--to", "vmoe", *words) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, capsys):
    stored(tmp_path, "mean")
    (tmp_path / "ckpt.index").write_bytes(b"mine")
    assert run(tmp_path, tmp_path / "ckpt", "--to", "vmoe") == 2
    assert "exists already: nothing was changed" in capsys.readouterr().err
    assert (tmp_path / "ckpt.index").read_bytes() == b"mine"
    assert run(tmp_path, tmp_path / "ckpt", "--to", "npz") == 2
    assert "the name of a NumPy archive ends in .npz" in capsys.readouterr().err
