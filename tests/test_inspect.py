"""The inspect command: text, JSON, messages and exit codes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from upcycle_jax import inspect as command
from upcycle_jax.checkpoints import create_checkpoint
from upcycle_jax.trees import LeafSpec

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT.parent / "shared" / "reference" / "t5x_testdata"
SPECS = {
    "target/encoder/layers_0/mlp/wi_0/kernel": LeafSpec((6, 10), np.dtype(np.float32)),
    "target/encoder/layers_1/mlp/expert/wi_0/kernel": LeafSpec((4, 6, 10), np.dtype("bfloat16")),
    "state/param_states/encoder/layers_0/mlp/wi_0/kernel/m": LeafSpec((1,), np.dtype(np.float32)),
    "state/param_states/encoder/layers_0/mlp/wi_0/kernel/v": LeafSpec((1,), np.dtype(np.float32)),
    "state/param_states/encoder/layers_0/mlp/wi_0/kernel/v_row": LeafSpec(
        (6,), np.dtype(np.float32)
    ),
    "state/param_states/encoder/layers_0/mlp/wi_0/kernel/v_col": LeafSpec(
        (10,), np.dtype(np.float32)
    ),
}


@pytest.fixture
def model_dir(tmp_path):
    with create_checkpoint(
        tmp_path / "checkpoint_30", SPECS, step=30, metadata={"seed": 3}
    ) as writer:
        for name, spec in SPECS.items():
            writer.write(name, None, np.zeros(spec.shape, spec.dtype))
        writer.finalize()
    return tmp_path


def test_text(model_dir, capsys):
    assert command.main([str(model_dir)]) == 0
    text = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[:8])
    assert lines["step"] == "30"
    assert lines["format"] == "orbax"
    # 6*10 + 4*6*10 = 300 elements; 60 of 4 bytes and 240 of 2 bytes.
    assert lines["parameters"] == "300 in 2 arrays (1 float32, 1 bfloat16), 720 Bytes"
    assert lines["experts"] == "4"
    # Slots: 6 + 10 used elements and 2 placeholders, 18 float32.
    assert (
        lines["optimizer"]
        == "Adafactor: m (0 used of 1), v (0 used of 1), v_col (1 used of 1), v_row (1 used of 1);"
        " 72 Bytes"
    )
    assert lines["record"] == "seed=3"
    assert "target/encoder/layers_1/mlp/expert/wi_0/kernel             bfloat16[4,6,10]" in text


def test_match(model_dir, capsys):
    assert command.main([str(model_dir), "--match", "expert/"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("bfloat16[4,6,10]\n(1 of 7 leaves shown)\n")


def test_json(model_dir, capsys):
    assert command.main([str(model_dir), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (
        content["step"],
        content["parameters"],
        content["optimizer"],
        content["expert_counts"],
    ) == (30, 300, "Adafactor", [4])
    assert {"name": "v_row", "arrays": 1, "unused": 0, "elements": 6} in content["slots"]
    leaves = {leaf["name"]: leaf for leaf in content["leaves"]}
    assert leaves["target/encoder/layers_1/mlp/expert/wi_0/kernel"] == {
        "name": "target/encoder/layers_1/mlp/expert/wi_0/kernel",
        "shape": [4, 6, 10],
        "dtype": "bfloat16",
        "bytes": 480,
    }


def test_errors_are_one_line_and_exit_code_1(tmp_path, capsys):
    assert command.main([str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inspect: ")
    assert captured.err.count("\n") == 1
    assert "does not exist" in captured.err


@pytest.mark.skipif(
    not TESTDATA.exists(), reason="the T5X test checkpoints are not beside this checkout"
)
def test_a_real_t5x_checkpoint(capsys):
    assert command.main([str(TESTDATA / "test_t5_tiny.checkpoint_0")]) == 0
    text = capsys.readouterr().out
    assert "518,240 in 52 arrays" in text
    assert "none: dense" in text


HELP = """
import sys
from upcycle_jax import inspect
try:
    inspect.main(['--help'])
except SystemExit:
    print('jax' in sys.modules, 'tensorstore' in sys.modules)
"""


def test_help_imports_nothing_heavy():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.endswith("False False\n")


def test_runs_as_a_module_beside_the_standard_inspect(model_dir):
    """The module shares its name with the standard library's `inspect`, which jax imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-m", "upcycle_jax.inspect", str(model_dir)]
    result = subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "300 in 2 arrays" in result.stdout


def test_a_pattern_that_is_none_is_refused(model_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(model_dir), "--match", "("])
    assert stopped.value.code == 2
    assert "'(' is no regular expression (missing )" in capsys.readouterr().err


def test_a_folder_named_d_is_no_sign_of_a_checkpoint(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    assert command.main([str(tmp_path)]) == 2
    assert "is no checkpoint that can be read (found d)" in capsys.readouterr().err
    (tmp_path / "d" / ("0" * 32)).write_text("")  # as a database names its files
    assert command.main([str(tmp_path)]) == 2
    assert "half-written or half-copied Orbax checkpoint" in capsys.readouterr().err
