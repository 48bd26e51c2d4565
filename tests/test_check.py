"""The check finds what would stop a run, all of it at once, and writes nothing."""

import os
import pathlib
import re
import shutil
import types

import pytest

from upcycle_jax import check, leases
from upcycle_jax.config import load
from upcycle_jax.training import preflight as check_module

RUN = """
import fake_data
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 4
BATCH_SIZE = 8
train.model = %MODEL
train.model_dir = %MODEL_DIR
train.total_steps = %TRAIN_STEPS
train.train_dataset_cfg = @fake_data.Fake()
fake_data.Fake.batch_size = %BATCH_SIZE
train.trainer = @Trainer()
train.partitioner = @Partitioner()
Trainer.optimizer = @Adafactor()
Trainer.learning_rate_fn = @create_learning_rate_scheduler()
train.checkpoint_cfg = @CheckpointConfig()
CheckpointConfig.save = None
# One layer in each stack is traced in half the time.
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
ENCODER_SPARSE_LAYOUT = (0,)
DECODER_SPARSE_LAYOUT = (0,)
"""

FAKE = '''
import dataclasses
import numpy as np
from upcycle_jax.data.opening import open_dataset

@dataclasses.dataclass(frozen=True)
class Fake:
    """Stands for a DatasetConfig, without TensorFlow."""
    batch_size: int = 8
    ids: int = 256
    exists: bool = True
    mixture_or_task_name: str = "fake"
    split: str = "train"
    pack: bool = False
    task_feature_lengths: dict = dataclasses.field(
        default_factory=lambda: {"inputs": 16, "targets": 8}
    )

    def vocabulary_size(self):
        return self.ids

    def verify(self):
        return 0

    def train_iterator(self, process_index=0, process_count=1):
        if not self.exists:
            raise FileNotFoundError(
                "no data at /data/x: make them with `python -m upcycle_jax.cache_tasks`"
            )
        return iter([{}])

open_dataset.register(Fake, lambda config, features: config)
'''


@pytest.fixture
def run_check(tmp_path, monkeypatch, capsys):
    """Checks the run above with further bindings; returns (exit code, output)."""
    (tmp_path / "fake_data.py").write_text(FAKE)
    (tmp_path / "run.gin").write_text(RUN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*bindings, flags=()):
        words = [
            "--gin_file=models/t5_1_1_tiny_upcycled.gin",
            "--gin_file=run.gin",
            "--gin.MODEL_DIR='out'",
        ]
        code = check.main([*words, *(f"--gin.{binding}" for binding in bindings), *flags])
        assert not pathlib.Path("out").exists()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_good_run(run_check):
    code, out = run_check("Partitioner.num_expert_partitions=2")
    assert code == 0, out
    assert "ok       mesh: data 4 x expert 2 x model 1" in out
    assert (
        "ok       data (fake, train): a batch of 8 rows can be read; 256 token ids of the"
        " model's 512" in out
    )
    assert out.endswith("the run can start\n")


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["Partitioner.num_expert_partitions=8"],
            "PROBLEM  divisibility: .*'expert' of size 4 .*not divisible by the 8 partitions",
        ),
        (["Partitioner.num_model_partitions=3"], "PROBLEM  mesh: 8 devices cannot form a mesh"),
        (["BATCH_SIZE=6"], "PROBLEM  plan of the run: .*6.*8"),
        (
            ["fake_data.Fake.ids=600"],
            (
                "PROBLEM  data .*600 ids, the model's vocab_size is 512: set T5Config.vocab_size to"
                " at least 600"
            ),
        ),
        (
            ["fake_data.Fake.exists=False"],
            "PROBLEM  data .*make them with `python -m upcycle_jax.cache_tasks`",
        ),
        (["TRAIN_STEPS=0"], "PROBLEM  plan of the run: train.total_steps is 0"),
        (
            ["MoeConfig.decoder_router=@ExpertsChoose()"],
            "PROBLEM  configuration: .*cannot be the decoder's router.*while building MoeConfig",
        ),
    ],
)
def test_what_would_stop_the_run_is_a_problem(run_check, bindings, message):
    code, out = run_check(*bindings)
    assert code == 1
    assert any(re.search(message, line) for line in out.splitlines()), out


def test_a_training_that_is_at_work_is_a_problem_and_one_long_silent_a_fact(run_check, tmp_path):
    file = tmp_path / "taken" / leases.TRAINING_LEASE
    taken = f"MODEL_DIR='{tmp_path / 'taken'}'"
    with leases.hold(file, what="it", remedy="wait"):
        code, out = run_check(taken)
        assert code == 1
        assert re.search(r"PROBLEM  MODEL_DIR: MODEL_DIR .*taken is in use: process \d+ on", out)
    file.parent.mkdir()
    file.write_text('{"host": "node7", "pid": 4711, "since": "yesterday"}')
    os.utime(file, (1e9, 1e9))
    code, out = run_check(taken)
    assert code == 0 and "the lease of process 4711 on host node7, since yesterday" in out
    assert sorted(file.parent.iterdir()) == [file]


def test_problems_of_different_kinds_are_found_together(run_check):
    code, out = run_check(
        "Partitioner.num_expert_partitions=8",
        "fake_data.Fake.ids=600",
        "fake_data.Fake.exists=False",
    )
    assert code == 1 and out.count("PROBLEM") == 2 and "2 problems: the run would stop" in out


def test_a_model_dir_that_cannot_be_used_is_a_problem_and_elsewhere_a_warning(
    run_check, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("no folder")
    code, out = run_check("MODEL_DIR='file/run'")
    assert code == 1 and re.search(
        r"PROBLEM  MODEL_DIR: MODEL_DIR file/run cannot be written to \(\S+/file is a file\)", out
    ), out
    loaded = load(["models/t5_1_1_tiny_upcycled.gin", "run.gin"], ["MODEL_DIR='file/run'"])
    found = check_module.check_run(loaded, read_data=False, elsewhere=True)  # as with --devices
    assert (
        not found.problems
        and "MODEL_DIR: MODEL_DIR file/run cannot be written to" in found.warnings[0]
    ), found
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run_check()[0] == 0, "nothing is saved"
    # With 2048 ids of 32 numbers: 1.5 MiB, parameters and as many second moments.
    code, out = run_check(
        "CheckpointConfig.save=@SaveCheckpointConfig()", "T5Config.vocab_size=2048"
    )
    assert (
        code == 1
        and "MODEL_DIR out has 1.0 MiB free, one checkpoint takes 1.5 MiB: free space" in out
    ), out


def test_memory_is_compared_with_the_device(run_check):
    code, out = run_check(flags=["--device_memory=0.0001"])
    assert (
        code == 1
        and "but a device has 0.0001 GiB: raise NUM_EXPERT_PARTITIONS or NUM_MODEL_PARTITIONS"
        in out
    )
    assert run_check(flags=["--device_memory=1"])[0] == 0


def test_accelerators_say_how_much_memory_they_have(run_check, monkeypatch):
    def says(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    assert check_module.memory_of(says({"bytes_limit": 3 * 2**30})) == 3.0
    assert check_module.memory_of(says(None)) is check_module.memory_of(says({})) is None
    monkeypatch.setattr(check_module, "memory_of", lambda device: 0.0001)
    code, out = run_check()
    assert code == 1 and "but a device has 0.0001 GiB" in out


def test_unused_bindings_are_warned_of(run_check):
    code, out = run_check("GivenRouter.file='x'")
    assert (
        code == 0
        and "warning  --gin.GivenRouter.file: GivenRouter.file is not used by train" in out
    )


def test_names_that_do_not_exist_and_missing_values(run_check):
    code, out = run_check("Trainer.optimiser=1", "TRAIN_STEP=3")
    assert code == 2 and "Did you mean optimizer?" in out and "Did you mean TRAIN_STEPS?" in out
    assert "must be set" not in out
    code, out = run_check("train.total_steps=%gin.REQUIRED", "MODEL_DIR='out'")
    assert code == 0, "REQUIRED takes nothing back"


def test_misspelt_and_missing_values_are_told_together(run_check, tmp_path, capsys):
    words = [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=runs/pretrain.gin",
        "--gin.TRAIN_STEP=3",
        "--gin.utils.DatasetConfig.task='x'",
    ]
    assert check.main(words) == 2
    told = capsys.readouterr().err
    for part in (
        "Did you mean TRAIN_STEPS",
        "TRAIN_STEPS must be set",
        "MODEL_DIR must be set",
        "MIXTURE_OR_TASK_NAME must be set",
    ):
        assert part in told, told
    assert (
        "'utils.DatasetConfig' is a T5X name; write 'DatasetConfig'; it is"
        " DatasetConfig.mixture_or_task_name" in told
    ), told


def test_other_functions_are_planned(tmp_path, capsys):
    files = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/eval.gin", "--function=evaluate"]
    given = [
        f"--gin.CHECKPOINT_PATH='{tmp_path}/nowhere'",
        f"--gin.EVAL_OUTPUT_DIR='{tmp_path}/out'",
        "--gin.MIXTURE_OR_TASK_NAME='x'",
    ]
    assert (
        check.main([*files, *given, "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"]) == 1
    )
    assert f"PROBLEM  plan of the run: {tmp_path}/nowhere does not exist" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
