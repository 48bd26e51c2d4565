"""`import upcycle_jax`: the example of docs/python.md, and what it promises."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import upcycle_jax as uj

SHALLOW = "T5Config.num_encoder_layers = 1\nT5Config.num_decoder_layers = 1\n"
SPARSE = "ENCODER_SPARSE_LAYOUT = (0,)\nDECODER_SPARSE_LAYOUT = (0,)\n"
EXAMPLE = pathlib.Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.usefixtures("drawn_parameters")
def test_the_documented_example_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(encoding="utf-8"), re.DOTALL)
    assert "tempfile.mkdtemp()" in code
    code = code.replace("tempfile.mkdtemp()", repr(str(tmp_path)))
    # The models are these, but for their depth.
    for kind, more in (("tiny", ""), ("tiny_upcycled", SPARSE)):
        file = tmp_path / f"{kind}.gin"
        file.write_text(f"include 'models/t5_1_1_{kind}.gin'\n{SHALLOW}{more}")
        assert f'"models/t5_1_1_{kind}.gin"' in code
        code = code.replace(f'"models/t5_1_1_{kind}.gin"', repr(str(file)))
    names: dict = {}
    exec(compile(code, str(EXAMPLE), "exec"), names)
    printed = capsys.readouterr().out
    assert "tile" in printed and "'loss'" in printed
    # The sparse model's dense part is the dense model's, bit for bit.
    dense, sparse = names["fresh"], names["params"]
    np.testing.assert_array_equal(
        sparse["token_embedder"]["embedding"], dense["token_embedder"]["embedding"]
    )


@pytest.mark.usefixtures("drawn_parameters")
def test_parameters_come_back_as_they_were_saved(tmp_path):
    model = uj.build_model("models/t5_1_1_tiny_upcycled.gin", NUM_EXPERTS=2)
    params = jax.jit(model.init_params)(jax.random.key(1))
    uj.save_params(tmp_path / "checkpoint_3", params, model, step=3)
    assert uj.open_checkpoint(tmp_path).step == 3
    jax.tree.map(np.testing.assert_array_equal, uj.load_params(tmp_path, model), params)
    other = uj.build_model("models/t5_1_1_tiny.gin")
    with pytest.raises(ValueError, match="not the parameters of the model"):
        uj.save_params(tmp_path / "checkpoint_4", params, other, step=4)
    assert not (tmp_path / "checkpoint_4").exists()


def test_unknown_macros_are_refused_by_name():
    with pytest.raises(Exception, match="NUM_EXPERT.*Did you mean NUM_EXPERTS"):
        uj.build_model("models/t5_1_1_tiny_upcycled.gin", NUM_EXPERT=2)


def test_the_package_alone_imports_no_jax():
    code = "import sys, upcycle_jax; print(upcycle_jax.__version__, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [uj.__version__, "False"]


def test_every_exported_name_exists():
    assert all(getattr(uj, name) is not None for name in uj.__all__)
    folder = pathlib.Path(uj.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(uj.__all__)
    with pytest.raises(AttributeError, match="no attribute 'upcyle'"):
        uj.upcyle
