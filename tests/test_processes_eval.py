"""Evaluation and inference by two processes with four devices each, through the launcher: what one
process with eight gives, each once.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from upcycle_jax import eval as eval_command
from upcycle_jax import infer as infer_command
from upcycle_jax import trees
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.config import load

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = ROOT / "tests" / "inference"
sys.path.insert(0, str(TASKS))
import small_tasks  # noqa: E402

MODEL = [
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ENCODER_SPARSE_LAYOUT=(0,)",
    "DECODER_SPARSE_LAYOUT=(0,)",
    "VOCAB_SIZE=384",
    "NUM_EXPERTS=8",
]


def flags(run: str, *bindings: str) -> list[str]:
    given = [
        *MODEL,
        "BATCH_SIZE=8",
        "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}",
        "MIXTURE_OR_TASK_MODULE='small_tasks'",
    ]
    return [
        "--gin_file=models/t5_1_1_tiny_upcycled.gin",
        f"--gin_file=runs/{run}.gin",
        *(f"--gin.{binding}" for binding in (*given, "NUM_EXPERT_PARTITIONS=4", *bindings)),
    ]


def two_processes(command: str, *words: str) -> None:
    environ = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(TASKS)}
    launcher = [
        str(ROOT / "scripts" / "launch" / "local.sh"),
        "--processes=2",
        "--devices=4",
        "--retries=0",
        command,
        *words,
    ]
    done = subprocess.run(
        launcher, env=environ, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """Random parameters."""
    folder = tmp_path_factory.mktemp("two")
    model = load(["models/t5_1_1_tiny_upcycled.gin"], MODEL).macro("MODEL")
    random = np.random.default_rng(0)
    params = {
        path: jax.numpy.asarray(random.normal(size=s.shape) * 0.3, "float32")
        for path, s in model.param_specs().items()
    }
    manager = CheckpointManager(folder)
    manager.save(
        3,
        {
            "target": trees.unflatten(params),
            "state": {"step": jax.numpy.int32(3), "param_states": {}},
        },
        dataset=None,
        metadata={},
    )
    manager.wait()
    manager.close()
    return folder


@pytest.mark.slow
def test_eval_by_two_processes(checkpoint, tmp_path):
    """11 examples in batches of 8: the last batch is filled, and no filled row counts."""

    def words(folder):
        given = [
            f"CHECKPOINT_PATH='{checkpoint}'",
            f"EVAL_OUTPUT_DIR='{folder}'",
            "MIXTURE_OR_TASK_NAME='small_parities'",
        ]
        return flags("eval", *given, "PREDICT_BY='rank'", "RANK_OPTIONS=('even', 'odd')")

    assert eval_command.main(words(tmp_path / "one")) == 0
    two_processes("eval", *words(tmp_path / "two"))
    one, two = tmp_path / "one" / "inference_eval", tmp_path / "two" / "inference_eval"
    for task in ("small_parity", "small_parity_again", "small_parities"):
        (alone,), (together,) = (
            rows(one / task / "metrics.jsonl"),
            rows(two / task / "metrics.jsonl"),
        )
        assert alone.keys() == together.keys()
        for name in alone.keys() - {"wall_time", "timing/evaluation_seconds"}:
            np.testing.assert_allclose(
                alone[name], together[name], rtol=1e-5, atol=1e-7, err_msg=name
            )
    alone, together = rows(one / "small_parity-3.jsonl"), rows(two / "small_parity-3.jsonl")
    assert [line["input"]["inputs_pretokenized"] for line in together] == [
        f"small_parity {n}" for n in range(small_tasks.NUM_EXAMPLES)
    ]
    assert [line["prediction"] for line in alone] == [line["prediction"] for line in together]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["predict", "rank"])
def test_infer_by_two_processes(checkpoint, tmp_path, mode):
    def words(folder):
        given = [
            f"CHECKPOINT_PATH='{checkpoint}'",
            f"INFER_OUTPUT_DIR='{folder}'",
            "MIXTURE_OR_TASK_NAME='small_labels'",
        ]
        return flags("infer", *given, f"MODE='{mode}'", "CHECKPOINT_PERIOD=1")

    assert infer_command.main(words(tmp_path / "one")) == 0
    two_processes("infer", *words(tmp_path / "two"))
    name = f"small_labels-{mode}.jsonl-00000-of-00001"
    alone, together = rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)
    assert len(together) == small_tasks.NUM_EXAMPLES
    assert [line["inputs"] for line in alone] == [line["inputs"] for line in together]
    assert [line["prediction"] for line in alone] == [line["prediction"] for line in together]
    assert not list((tmp_path / "two").glob("tmp-*"))
