"""The check finds what would stop a run, all of it at once, and writes nothing."""

import pathlib
import re

import pytest

from upcycle_jax import check

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
"""

FAKE = '''
import dataclasses
import numpy as np

@dataclasses.dataclass(frozen=True)
class Fake:
    """Stands for a DatasetConfig, without TensorFlow."""
    batch_size: int = 8
    ids: int = 256
    exists: bool = True
    mixture_or_task_name: str = "fake"
    split: str = "train"
    pack: bool = False
    task_feature_lengths: dict = dataclasses.field(default_factory=lambda: {"inputs": 16, "targets": 8})

    def vocabulary_size(self):
        return self.ids

    def train_iterator(self, process_index=0, process_count=1):
        if not self.exists:
            raise FileNotFoundError("no data at /data/x: make them with `python -m upcycle_jax.cache_tasks`")
        return iter([{}])
'''


@pytest.fixture
def run_check(tmp_path, monkeypatch, capsys):
    """Checks the run above with further bindings; returns (exit code, output)."""
    (tmp_path / "fake_data.py").write_text(FAKE)
    (tmp_path / "run.gin").write_text(RUN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*bindings, flags=()):
        words = ["--gin_file=models/t5_1_1_tiny_upcycled.gin", "--gin_file=run.gin", "--gin.MODEL_DIR='out'"]
        code = check.main([*words, *(f"--gin.{binding}" for binding in bindings), *flags])
        assert not pathlib.Path("out").exists()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_good_run(run_check):
    code, out = run_check("Partitioner.num_expert_partitions=2")
    assert code == 0, out
    assert "ok       mesh: data 4 x expert 2 x model 1" in out
    assert "ok       data (fake, train): a batch of 8 rows can be read; 256 token ids of the model's 512" in out
    assert out.endswith("the run can start\n")


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["Partitioner.num_expert_partitions=8"], "PROBLEM  divisibility: .*'expert' of size 4 .*not divisible by the 8 partitions"),
        (["Partitioner.num_model_partitions=3"], "PROBLEM  mesh: 8 devices cannot form a mesh"),
        (["BATCH_SIZE=6"], "PROBLEM  plan of the run: .*6.*8"),
        (["fake_data.Fake.ids=600"], "PROBLEM  data .*600 ids, the model's vocab_size is 512: set T5Config.vocab_size to at least 600"),
        (["fake_data.Fake.exists=False"], "PROBLEM  data .*make them with `python -m upcycle_jax.cache_tasks`"),
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


def test_problems_of_different_kinds_are_found_together(run_check):
    code, out = run_check("Partitioner.num_expert_partitions=8", "fake_data.Fake.ids=600", "fake_data.Fake.exists=False")
    assert code == 1 and out.count("PROBLEM") == 2 and "2 problems: the run would stop" in out


def test_memory_is_compared_with_the_device(run_check):
    code, out = run_check(flags=["--device_memory=0.0001"])
    assert code == 1 and "but a device has 0.0001 GiB: raise NUM_EXPERT_PARTITIONS or NUM_MODEL_PARTITIONS" in out
    assert run_check(flags=["--device_memory=1"])[0] == 0


def test_unused_bindings_are_warned_of(run_check):
    code, out = run_check("GivenRouter.file='x'")
    assert code == 0 and "warning  --gin.GivenRouter.file: GivenRouter.file is not used by train" in out


def test_names_that_do_not_exist_and_missing_values(run_check):
    code, out = run_check("Trainer.optimiser=1", "TRAIN_STEP=3")
    assert code == 2 and "Did you mean optimizer?" in out and "Did you mean TRAIN_STEPS?" in out
    code, out = run_check("train.total_steps=%gin.REQUIRED", "MODEL_DIR='out'")
    assert code == 0, "REQUIRED takes nothing back"
