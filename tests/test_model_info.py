"""Parameter counts of the shipped models. The expected numbers are Table 1 of the paper (arXiv
2212.05055).
"""

import contextlib
import io
import re

import numpy as np
import pytest

from upcycle_jax import axes, model_info
from upcycle_jax.config import load
from upcycle_jax.costs import model_info as info
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec

TABLE_1 = {
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "base_upcycled": 2_003_188_992,
    "large_upcycled": 7_220_096_000,
    "xl_upcycled": 26_255_546_368,
}

LINE = re.compile(r"Variable    (\S+) +size (\d+) +shape \((.*?)\) +partition spec \(.*\)")
ONE_LAYER = [f"--gin.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")]


@pytest.mark.parametrize("size", TABLE_1)
def test_counts_equal_table_1(size):
    model = load([f"models/t5_1_1_{size}.gin"]).macro("MODEL")
    assert info.total_parameters(model.param_specs()) == TABLE_1[size]


@pytest.fixture(scope="module")
def printed():
    """What the command prints of two layers of each stack of the upcycled base model."""
    layers = [f"--gin.T5Config.num_{stack}_layers=2" for stack in ("encoder", "decoder")]
    words = ["--gin_file=gin_configs/models/t5_1_1_base_upcycled.gin", *layers]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert model_info.main([*words, "--gin.REMAT_POLICY='full'"]) == 0
    return out.getvalue()


def test_the_command_prints_every_parameter_and_the_total(printed):
    lines = printed.splitlines()
    layers = [f"T5Config.num_{stack}_layers=2" for stack in ("encoder", "decoder")]
    model = load(["models/t5_1_1_base_upcycled.gin"], layers).macro("MODEL")
    count = info.total_parameters(model.param_specs())
    total = lines.index(f"Total number of parameters: {count}")
    parsed = [LINE.fullmatch(line) for line in lines[:total]]
    assert all(parsed)
    assert {match[1] for match in parsed} == set(model.param_specs())
    assert sum(int(match[2]) for match in parsed) == count
    by_name = {match[1]: match[0] for match in parsed}
    wi = by_name["encoder/layers_1/mlp/expert/wi_0/kernel"]
    assert f"size {32 * 768 * 2048} " in wi
    assert "(expert=32, embed=768, expert_mlp=2048)" in wi and wi.endswith(
        "partition spec ('expert', None, 'model')"
    )
    assert (
        "(embed=768, unmodeled=32)"
        in by_name["decoder/layers_1/mlp/router/router_weights/w/kernel"]
    )


def test_the_command_prints_what_the_model_costs(printed):
    costs = printed.partition("Total number of parameters: ")[2]
    total = int(costs.splitlines()[0])
    # 2 of 4 layers are sparse and a token meets 2 of 32 experts: 30 experts of 3 * 768 * 2048 are
    # inactive in each.
    assert f"Active parameters per token: {total - 2 * 30 * 3 * 768 * 2048}" in costs
    assert f"Parameters of experts: {2 * 32 * 3 * 768 * 2048}, of routers: {2 * 768 * 32}" in costs
    assert f"Bytes of parameters: {4 * total}" in costs
    assert (
        "in training (matrix products; 64 rows of 512 + 128 tokens)" in costs
        and "computed again under remat_policy 'full'" in costs
    )


def test_the_batch_may_be_named(capsys, tmp_path):
    run = tmp_path / "run.gin"
    run.write_text("BATCH_SIZE = 4\nTASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 8}\n")
    words = ["--gin_file=models/t5_1_1_tiny_upcycled.gin", f"--gin_file={run}"]
    assert model_info.main([*words, *ONE_LAYER, "--gin.DECODER_SPARSE_LAYOUT=(0,)"]) == 0
    assert "4 rows of 32 + 8 tokens" in capsys.readouterr().out


def test_partitioner_bindings_decide_the_specs(capsys):
    words = ["--gin_file=models/t5_1_1_tiny.gin", "--gin.Partitioner.fsdp=True"]
    assert model_info.main([*words, *ONE_LAYER]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if "token_embedder/embedding" in line
    )
    assert line.endswith("partition spec ('model', 'data')")


def test_a_missing_model_is_explained(capsys, tmp_path):
    empty = tmp_path / "empty.gin"
    empty.write_text("")
    assert model_info.main([f"--gin_file={empty}"]) == 2
    assert "no gin file or flag defines MODEL" in capsys.readouterr().err


def test_state_is_listed_after_the_total():
    params = {"a/kernel": LeafSpec((4, 6), np.float32, (axes.EMBED, axes.MLP))}
    state = {
        "state/step": LeafSpec((), np.int32),
        "state/param_states/a/kernel/v": LeafSpec((1,), np.float32),
    }
    lines = info.model_info(params, partitioner=Partitioner(), state=state).splitlines()
    assert (
        lines[0]
        == "Variable    a/kernel size 24           shape (embed=4, mlp=6) partition spec (None,"
        " 'model')"
    )
    assert lines[1] == "Total number of parameters: 24"
    assert [LINE.fullmatch(line)[1] for line in lines[3:5]] == [
        "state/param_states/a/kernel/v",
        "state/step",
    ]
    assert lines[5] == "Total number of elements of the optimizer state: 2"
