"""The convert command: every readable format to Orbax, dense T5 to Hugging Face and back, and its
refusals.
"""

import json
import pathlib
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from upcycle_jax import convert as command
from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointManager, create_checkpoint, open_checkpoint
from upcycle_jax.trees import LeafSpec, Role

TESTDATA = pathlib.Path(__file__).parents[2] / "shared" / "reference" / "t5x_testdata"
real = pytest.mark.skipif(
    not TESTDATA.exists(), reason="the T5X test checkpoints are not beside this checkout"
)
TINY = TESTDATA / "test_t5_tiny.checkpoint_0"


def run(*arguments):
    return command.main([str(argument) for argument in (*arguments, "--quiet")])


def assert_equal(one, two, *, names=None):
    for name in names or one.specs():
        np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)


@pytest.fixture
def orbax(tmp_path):
    """A plain Orbax checkpoint, as a training run saves it."""
    rng = np.random.default_rng(0)
    flat = {
        "target/w": rng.random((40, 30), np.float32),
        "target/e/mlp/expert/w": rng.random((3, 8, 5), np.float32),
    }
    state = trees.unflatten(
        {
            **flat,
            "state/step": np.int32(9),
            "state/param_states/w/mu": rng.random((40, 30), np.float32),
        }
    )
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(9, state)
    return tmp_path / "run"


@real
def test_legacy_to_orbax_keeps_every_leaf(tmp_path, capsys):
    assert run(TINY, tmp_path) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/checkpoint_0\n"
    source, result = open_checkpoint(TINY), open_checkpoint(tmp_path)
    assert source.specs() == result.specs()
    assert_equal(source, result)
    assert result.metadata()["source"] == {
        "path": str(TINY),
        "format": "t5x_msgpack",
        "fingerprint": source.fingerprint(),
    }
    # T5X's own way to it: Orbax's PyTree handler.
    restored = trees.flatten(ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoint_0" / "state"))
    assert restored.keys() == source.specs().keys()


@real
def test_legacy_folder_to_orbax(tmp_path):
    assert run(TESTDATA / "tiny_t5" / "checkpoint_1", tmp_path / "checkpoint_1") == 0
    assert_equal(open_checkpoint(TESTDATA / "tiny_t5"), open_checkpoint(tmp_path))


@real
def test_to_hugging_face_and_back(tmp_path):
    assert run(TINY, tmp_path / "hf", "--to", "huggingface") == 0
    assert (
        run(tmp_path / "hf", tmp_path / "back", "--step", 5, "--optimizer_state", "adafactor") == 0
    )
    source, result = open_checkpoint(TINY), open_checkpoint(tmp_path / "back")
    assert result.step == 5
    assert_equal(
        source, result, names=[name for name in source.specs() if name.startswith("target/")]
    )
    # The fresh Adafactor state has the very leaves that T5X itself stored, all zero.
    assert result.specs() == source.specs()
    assert not any(result.read(name).any() for name in result.specs() if "param_states" in name)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_layers"], config["d_model"], config["d_ff"], config["num_heads"]) == (
        2,
        8,
        16,
        4,
    )


@real
def test_dtype_changes_parameters_only(tmp_path):
    assert run(TINY, tmp_path, "--dtype", "bfloat16") == 0
    source, result = open_checkpoint(TINY), open_checkpoint(tmp_path)
    for name, spec in result.specs().items():
        assert spec.dtype.name == (
            "bfloat16" if name.startswith("target/") else source.specs()[name].dtype.name
        )
    name = "target/token_embedder/embedding"
    np.testing.assert_array_equal(result.read(name), source.read(name).astype("bfloat16"))
    assert run(tmp_path, tmp_path / "hf", "--to", "huggingface") == 0
    assert (
        load_file(tmp_path / "hf" / "model.safetensors")["shared.weight"].dtype.name == "bfloat16"
    )


def test_orbax_to_orbax(tmp_path, orbax):
    assert run(orbax, tmp_path / "out") == 0
    assert_equal(open_checkpoint(orbax), open_checkpoint(tmp_path / "out"))
    assert open_checkpoint(orbax).zarr_layout("target/w") == open_checkpoint(
        tmp_path / "out"
    ).zarr_layout("target/w")
    assert run(orbax, tmp_path / "dense", "--optimizer_state", "drop", "--step", 0) == 0
    assert sorted(open_checkpoint(tmp_path / "dense").specs()) == [
        "state/step",
        "target/e/mlp/expert/w",
        "target/w",
    ]
    assert open_checkpoint(tmp_path / "dense").step == 0


def test_fresh_state_of_experts_is_factored_per_expert(tmp_path):
    specs = {
        "target/e/mlp/expert/w/kernel": LeafSpec(
            (3, 128, 130), np.dtype(np.float32), role=Role.EXPERT
        )
    }
    with create_checkpoint(tmp_path / "checkpoint_1", specs, step=1, metadata={}) as writer:
        writer.write("target/e/mlp/expert/w/kernel", None, np.ones((3, 128, 130), np.float32))
        writer.finalize()
    assert run(tmp_path, tmp_path / "out", "--optimizer_state", "adafactor") == 0
    specs = open_checkpoint(tmp_path / "out").specs()
    shapes = {
        name.rpartition("/")[2]: spec.shape
        for name, spec in specs.items()
        if "param_states" in name
    }
    assert (shapes["m"], shapes["v"]) == ((1,), (1,))
    assert {shapes["v_row"], shapes["v_col"]} == {(3, 128), (3, 130)}


def test_small_memory_gives_the_same_result(tmp_path, orbax):
    assert run(orbax, tmp_path / "small", "--max_memory", "4K", "--dtype", "bfloat16") == 0
    assert run(orbax, tmp_path / "large", "--dtype", "bfloat16") == 0
    assert_equal(open_checkpoint(tmp_path / "small"), open_checkpoint(tmp_path / "large"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "huggingface"), "no target/encoder|Mixture-of-Experts"),
        (("--to", "huggingface", "--step", "3"), "holds neither a step nor optimizer state"),
        (
            ("--optimizer_state", "keep", "--step", "10"),
            "named for step 9, but the step to record is 10",
        ),
    ],
)
def test_refusals_write_nothing(tmp_path, orbax, capsys, arguments, message):
    assert run(orbax, tmp_path / "out" / "checkpoint_9", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("convert: ")
    assert re.search(message, captured.err)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_an_error(tmp_path, orbax, capsys):
    assert run(orbax, orbax) == 2
    assert "checkpoint_9 exists already: nothing was changed" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["1GiB", "4K"])
@pytest.mark.parametrize("value", [1e5, -7e4])
def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path, capsys, value, memory):
    """65504 is the largest float16; what was not finite before is not the cast's doing."""
    path = _with_values(tmp_path, value=value)
    for dtype in ("bfloat16", "float32"):
        assert run(path, tmp_path / dtype, "--dtype", dtype, "--max_memory", memory) == 0
    assert run(path, tmp_path / "half", "--dtype", "float16", "--max_memory", memory) == 2
    error = capsys.readouterr().err
    assert re.search(rf"target/w holds {value:.6g} at \[30, 30\], which float16 cannot hold", error)
    assert list((tmp_path / "half").iterdir()) == []


def test_values_that_the_dtype_holds_are_rounded(tmp_path):
    path = _with_values(tmp_path, value=65504.0)
    assert run(path, tmp_path / "half", "--dtype", "float16") == 0
    read = open_checkpoint(tmp_path / "half").read("target/w")
    assert (read[30, 30], np.isnan(read[0, 0]), read[0, 1]) == (65504.0, True, np.inf)


def _with_values(folder, *, value):
    array = np.ones((40, 50), np.float32)
    array[0, :2], array[30, 30] = (np.nan, np.inf), value
    specs = {"target/w": LeafSpec(array.shape, array.dtype)}
    path = folder / "source" / "checkpoint_3"
    with create_checkpoint(path, specs, step=3, metadata={}, chunk_bytes=1 << 10) as writer:
        writer.write("target/w", None, array)
        writer.finalize()
    return path


@real
def test_overflow_leaves_no_hugging_face_folder(tmp_path, capsys):
    source = open_checkpoint(TINY)
    specs = {n: spec for n, spec in source.specs().items() if n.startswith("target/")}
    with create_checkpoint(tmp_path / "checkpoint_1", specs, step=1, metadata={}) as writer:
        for name in specs:
            value = source.read(name)
            if name.endswith("layers_1/mlp/wo/kernel"):
                value[2, 3] = 1e5
            writer.write(name, None, value)
        writer.finalize()
    assert run(tmp_path, tmp_path / "hf", "--to", "huggingface", "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "layers_1/mlp/wo/kernel holds 100000 at [2, 3], which float16 cannot hold" in error
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize("step", [-1, 1 << 31, 1 << 70])
def test_a_step_that_cannot_be_stored_is_refused(tmp_path, orbax, capsys, step):
    assert run(orbax, tmp_path / "out", f"--step={step}") == 2
    assert f"step {step} is none that int32[] holds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
