"""The dry run of the check for accelerators: every part gives rows, whose numbers nobody reads.
Steps and a cell of a study take longer: they are in the slow test of the whole dry run.
"""

import json
import pathlib
import subprocess
import sys

import benchmarks
import device_check
import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models.stacked import StackedModel

SCRIPTS = pathlib.Path(device_check.__file__).parent


LAYERS = [
    "dense MLP",
    "experts alone, slots full",
    "experts choose",
    "experts choose, one-hot einsum",
    "tokens choose top-2",
    "tokens choose top-2, one-hot einsum",
    "dropless top-2, sorted",
]


@pytest.fixture(autouse=True)
def no_large_product(monkeypatch):
    monkeypatch.setattr(benchmarks, "matmul_peak", lambda *_: 1e11)


def check(tmp_path, *flags):
    code = device_check.main([f"--out={tmp_path}", "--smoke", *flags])
    return code, json.loads((tmp_path / "device_check.json").read_text(encoding="utf-8"))


def ones(model, rng):
    return trees.unflatten(
        {path: np.ones(spec.shape, spec.dtype) for path, spec in model.param_specs().items()}
    )


def test_a_dry_run_gives_one_table_and_the_same_as_json(tmp_path, capsys, monkeypatch):
    layer, measured = benchmarks.layer, []

    def measure(*args, **given):
        measured.extend(layer(*args, **given))
        return measured

    monkeypatch.setattr(benchmarks, "layer", measure)
    # No program initialises the models that decode: which numbers they have is all one.
    monkeypatch.setattr(StackedModel, "init_params", ones)
    code, record = check(tmp_path, "--parts", "layers", "products", "decoding")
    assert code == 0 and record["left_out"] == {} and record["smoke"]
    parts = {row["part"] for row in record["rows"]}
    assert parts == {"layers", "products", "decoding"}
    names = [row["what"] for row in record["rows"] if row["part"] == "layers"]
    assert [name.partition(": ")[2] for name in names] == LAYERS
    assert_measured_and_shown(measured)
    out = capsys.readouterr().out
    assert out.count("\n| ") == 2 + len(record["rows"]) and "<= 1.10x" in out


def assert_measured_and_shown(measured):
    """What the benchmark of layers gives, forward and backward, and its own table."""
    assert [m.name for m in measured] == LAYERS
    assert measured[0].ratio == 1.0 and all(
        m.seconds > 0 and m.tokens_per_second > 0 for m in measured
    )
    table = benchmarks.layer_table(measured)
    assert len(table.splitlines()) == 9 and "| dense MLP | 1.00x |" in table


def test_what_fails_or_has_no_time_left_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("out of memory")

    monkeypatch.setattr(device_check, "product_rows", fail)
    code, record = check(tmp_path, "--parts", "products")
    assert code == 1 and record["left_out"] == {"products: smoke": "MemoryError: out of memory"}
    assert device_check.main([f"--out={tmp_path}", "--minutes=0", "--parts", "decoding"]) == 0
    record = json.loads((tmp_path / "device_check.json").read_text(encoding="utf-8"))
    assert list(record["left_out"]) == ["decoding: smollm2_135m"] and not record["rows"]


def test_it_needs_neither_tensorflow_nor_seqio():
    program = (
        "import sys, device_check; print([m for m in ('tensorflow', 'seqio') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=SCRIPTS
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path):
    code, record = check(tmp_path)
    assert code == 0 and record["left_out"] == {}
    study = [row["what"] for row in record["rows"] if row["part"] == "study"]
    assert len(study) == 4 and all("glyphs" in what for what in study)


@pytest.mark.slow
@pytest.mark.parametrize("step", device_check.DEVICE.steps, ids=lambda step: step[0])
def test_the_steps_for_accelerators_can_be_traced(step):
    name, rows, group_size, bindings = step
    models, lengths = device_check.step_models(name, group_size, bindings, device_check.DEVICE)
    for model in models:
        params = jax.eval_shape(model.init_params, jax.random.key(0))

        def loss(params, batch, model=model):
            key, denominator = jax.random.key(0), model.loss_denominator(batch)
            return model.loss_fn(params, batch, key, denominator=denominator, aux_scale=1.0)[0]

        assert jax.eval_shape(loss, params, model.input_specs(rows, lengths)).shape == ()
