"""`python -m upcycle_jax.train`: flags, gin files and exit codes."""

import json
import subprocess
import sys

import pytest

from upcycle_jax import train

SMALL = [
    "--gin_file=models/t5_1_1_tiny.gin",
    "--gin_file=runs/pretrain.gin",
    "--gin.BATCH_SIZE=8",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    "--gin.EVAL_STEPS=1",
    "--gin.STATS_PERIOD=1",
    "--gin.T5Config.num_encoder_layers=1",
    "--gin.T5Config.num_decoder_layers=1",
]


@pytest.fixture
def own_text(tmp_path):
    """Flags for a run on a small text file."""
    lines = [
        f"Line {n} says that {n} times {n} is {n * n}, which everybody can check by hand.\n"
        for n in range(3000)
    ]
    (tmp_path / "squares.txt").write_text("\n".join(lines))
    return [
        "--gin.MIXTURE_OR_TASK_NAME='squares_of_train_command'",
        f"--gin.TEXT_FILES={{'squares': ['{tmp_path}/squares.txt']}}",
        f"--gin.MODEL_DIR='{tmp_path}/run'",
    ]


def test_help_answers_without_jax():
    lines = [
        "import sys",
        "from upcycle_jax import train",
        "try: train.main(['--help'])",
        "finally: print('jax' in sys.modules, file=sys.stderr)",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "--gin_file" in done.stdout
        and "--coordinator_address" in done.stdout
        and done.stderr.strip() == "False"
    )


def test_missing_macros_are_listed_all_at_once(capsys):
    assert (
        train.main(["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/continue_pretrain.gin"])
        == 2
    )
    message = capsys.readouterr().err
    for name in ("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TRAIN_STEPS", "INITIAL_CHECKPOINT_PATH"):
        assert name in message
    assert train.main(["--gin_file=runs/pretrain.gin", "--gin.TRAIN_STEPS=1"]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_unknown_binding_names_the_nearest(capsys):
    assert train.main([*SMALL, "--gin.TRIAN_STEPS=4", "--gin.train.totl_steps=4"]) == 2
    assert "total_steps" in capsys.readouterr().err


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path, capsys):
    flags = [
        *SMALL,
        "--gin.MIXTURE_OR_TASK_NAME='none'",
        f"--gin.MODEL_DIR='{tmp_path}/run'",
        "--gin.TRAIN_STEPS=4",
        "--dry_run",
    ]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    assert "from scratch" in out and "parameters" in out and "FLOPs per step" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # the shortened quickstart takes the same path
def test_run_resume_and_continue_sparse(tmp_path, own_text, capsys):
    assert train.main([*SMALL, *own_text, "--gin.TRAIN_STEPS=2"]) == 0
    assert train.main([*SMALL, *own_text, "--gin.TRAIN_STEPS=4", "--gin.SAVING_PERIOD=2"]) == 0
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint_*")) == [
        "checkpoint_2",
        "checkpoint_4",
    ]
    assert "TRAIN_STEPS = 4" in (run / "config.gin").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["step"] for entry in manifest["starts"]] == [0, 2] and manifest[
        "status"
    ] == "finished"

    sparse = [
        flag.replace("tiny.gin", "tiny_upcycled.gin").replace(
            "pretrain.gin", "continue_pretrain.gin"
        )
        for flag in [*SMALL, *own_text]
    ]
    sparse = [flag.replace("/run'", "/sparse'") for flag in sparse] + [
        "--gin.TRAIN_STEPS=5",
        "--gin.MoeConfig.num_encoder_sparse_layers=1",
    ]
    sparse += [
        "--gin.MoeConfig.num_decoder_sparse_layers=1",
        f"--gin.INITIAL_CHECKPOINT_PATH='{run}'",
    ]
    assert train.main(sparse) == 2
    assert "set RestoreCheckpointConfig.recipe" in capsys.readouterr().err
    assert train.main([*sparse, "--gin.RECIPE=@Recipe()"]) == 0
    row = json.loads((tmp_path / "sparse" / "train" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 5 and len(row["experts/encoder/layers_0/load"]) == 4
    # The configuration that was left behind starts the same run again, which is finished.
    assert train.main([f"--gin_file={tmp_path}/sparse/config.gin"]) == 0
