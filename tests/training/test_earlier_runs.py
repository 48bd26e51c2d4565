"""Checkpoints that an earlier version of the library wrote continue here, and the programs do the
same work (`earlier_runs.py` made the files).
"""

import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import optax
import pytest

from upcycle_jax import train
from upcycle_jax.training import optimizers, train_step

HERE = pathlib.Path(__file__).parent
RECORD = json.loads((HERE / "earlier" / "record.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def earlier():
    spec = importlib.util.spec_from_file_location("earlier_runs", HERE / "earlier_runs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["earlier_runs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(earlier, tmp_path_factory):
    """The folder with the text, one for both runs: a task's name stands for one text."""
    folder = tmp_path_factory.mktemp("text")
    earlier.write_text(folder)
    return folder


ROUNDING = 1e-6
"""Of a loss, by how much sums in another order may move it. Attention and the gradient of position
biases are added up in another order today than when the record was made. Anything else that changes
(a default, a batch, a schedule, a slot that is not restored) moves losses by far more.
"""

BIAS_ELEMENTS = 8 * 2 * (32 * 32 + 16 * 16)
"""Rows, heads, and pairs of positions in both stacks: the gradient of the position biases."""


def same_arithmetic(earlier) -> bool:
    """Whether this machine compiles as the one that made the record."""
    return earlier.arithmetic() == RECORD["arithmetic"]


# Every second layer of the sparse model is a dense one: the dense model has nothing of its own.
@pytest.mark.parametrize(
    ("run", "model", "first", "steps"),
    [
        ("sparse", "SPARSE", 5, 6),
        pytest.param("dense", "DENSE", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_then_resumes_with_the_same_losses(
    earlier, text, tmp_path, run, model, first, steps
):
    model_dir = tmp_path / run
    shutil.copytree(HERE / "earlier" / run, model_dir)
    flags = earlier.train_flags(getattr(earlier, model), text, model_dir, steps)
    assert train.main(flags) == 0
    now, then = earlier.scalars(model_dir), RECORD["runs"][run]
    close = ROUNDING if same_arithmetic(earlier) else 1e-5
    assert sorted(now) == [str(step) for step in range(first, steps + 1)]
    for step, metrics in now.items():
        assert metrics == pytest.approx(then[step], rel=close, abs=0), step


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        pytest.param(1, "SPARSE", marks=pytest.mark.slow),
        pytest.param(8, "SPARSE", marks=pytest.mark.slow),
        pytest.param(1, "DENSE", marks=pytest.mark.slow),
    ],
)
def test_programs_do_the_same_work(earlier, devices, name, monkeypatch):
    assert jax.device_count() == 8
    # With optax's RMS of parameters, and a norm that may share the squares of the optimizer.
    monkeypatch.setattr(optimizers, "root_mean_squares", optax.safe_root_mean_squares)
    monkeypatch.setattr(train_step, "global_norm", optax.global_norm)
    now = earlier.programs(devices, (getattr(earlier, name),))
    then = RECORD["programs"][str(devices)]
    same = same_arithmetic(earlier)
    # On one device the gradient of the position biases is a product with ones, 2 FLOPs an element,
    # where it was a sum over 8 rows, 7 FLOPs for 8 elements. Each of 8 devices has one row.
    more = (2 - 7 / 8) * BIAS_ELEMENTS if devices == 1 else 0
    for name, program in now.items():
        flops = then[name]["flops"] + more
        assert program["flops"] == pytest.approx(flops, rel=0 if same else 0.01, abs=0)
        assert program["collectives"] == then[name]["collectives"]
        losses, expected = (
            [float.fromhex(loss) for loss in record["losses"]] for record in (program, then[name])
        )
        assert losses == pytest.approx(expected, rel=ROUNDING if same else 1e-5, abs=0)
