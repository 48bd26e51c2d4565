"""runs/finetune.gin: the paper's settings, and a step of fine-tuning from a checkpoint whose step
is kept or reset.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from upcycle_jax import train, trees
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.config import load

sys.path.insert(0, str(pathlib.Path(__file__).parent / "inference"))
import small_tasks

REQUIRED = [
    "MIXTURE_OR_TASK_NAME='small_parity'",
    "MODEL_DIR='x'",
    "INITIAL_CHECKPOINT_PATH='y'",
    "TRAIN_STEPS=9",
]
MODEL = ["T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1"]


def test_the_papers_settings():
    call = (
        load(
            ["models/t5_1_1_base_upcycled.gin", "runs/finetune.gin"],
            [*REQUIRED, "EXPERT_DROPOUT_RATE=0.3"],
        )
        .build("train")
        .keywords
    )
    assert [
        float(call["trainer"].learning_rate_fn(step)) for step in (0, 1_000_000)
    ] == pytest.approx([1e-3, 1e-3])
    config = call["model"].config
    assert (config.dropout_rate, config.expert_dropout_rate) == (0.1, 0.3)
    assert call["train_dataset_cfg"].batch_size == 128
    # The paper's 62 targets, and padding: 128 * 64 tokens divide into routing groups of 4096, 128 *
    # 62 do not.
    assert call["train_dataset_cfg"].task_feature_lengths == {"inputs": 512, "targets": 64}
    restore = call["checkpoint_cfg"].restore
    assert (restore.step, restore.optimizer_state, restore.data_position) == (
        "keep",
        "keep",
        "start",
    )
    # Without a rate of their own, experts drop as the rest does.
    plain = (
        load(["models/t5_1_1_base_upcycled.gin", "runs/finetune.gin"], REQUIRED)
        .macro("MODEL")
        .config
    )
    assert plain.expert_dropout_rate == 0.1


def test_fine_tuning_runs_and_counts_from_zero_where_asked(tmp_path):
    assert small_tasks.NUM_EXAMPLES
    model = load(["models/t5_1_1_tiny.gin"], MODEL).macro("MODEL")
    random = np.random.default_rng(0)
    params = {
        path: jax.numpy.asarray(random.normal(size=s.shape) * 0.1, "float32")
        for path, s in model.param_specs().items()
    }
    manager = CheckpointManager(tmp_path / "pretrained")
    state = {
        "target": trees.unflatten(params),
        "state": {"step": jax.numpy.int32(7), "param_states": {}},
    }
    manager.save(7, state, dataset=None, metadata={})
    manager.wait()
    manager.close()

    bindings = [
        *MODEL,
        "BATCH_SIZE=8",
        "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 6}",
        "train.train_eval_dataset_cfg=None",
        "STATS_PERIOD=1",
    ]
    bindings += [
        *REQUIRED,
        f"INITIAL_CHECKPOINT_PATH='{tmp_path}/pretrained'",
        f"MODEL_DIR='{tmp_path}/run'",
        "TRAIN_STEPS=1",
    ]
    flags = [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=runs/finetune.gin",
        *(f"--gin.{binding}" for binding in bindings),
    ]
    # Step 7 is kept by default, so that one step in all cannot be trained.
    assert train.main(flags) == 2
    assert train.main([*flags, "--gin.RESTORE_STEP='reset'"]) == 0
    row = json.loads((tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1 and row["learning_rate"] == pytest.approx(1e-3)
    assert (tmp_path / "run" / "checkpoint_1").is_dir()
