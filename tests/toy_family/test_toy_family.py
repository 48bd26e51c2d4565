"""A family of models that no file of the library names goes through every ordinary entry point: it
is trained, upcycled on disk and while restoring, proved, planned, counted and evaluated.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from tests.toy_family.model import ToyConfig, ToyModel, ToyMoe
from upcycle_jax import model_info
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.planning import estimate
from upcycle_jax.planning.compilation import Workload
from upcycle_jax.planning.render import render
from upcycle_jax.surgery import Recipe
from upcycle_jax.surgery.upcycle import Upcycle
from upcycle_jax.surgery.verify import Verify
from upcycle_jax.text import Format
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train import Train
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.trees import Role

DENSE = ToyModel(ToyConfig())
SPARSE = ToyModel(dataclasses.replace(ToyConfig(), moe=ToyMoe(num_experts=4, group_size=32)))
LENGTH = 8


class Lines:
    """Batch k counts up from a random id."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return lines(self.position)

    def prepare(self, first_batch, num_batches):
        pass

    def seek(self, num_batches):
        self.position = num_batches

    def save(self, directory):
        (epath.Path(directory) / "position.json").write_text(json.dumps(self.position))

    def restore(self, directory):
        self.position = json.loads((epath.Path(directory) / "position.json").read_text())

    def fingerprint(self):
        return {"name": "lines"}


def lines(seed):
    starts = np.random.default_rng(seed).integers(1, 20, (8, 1))
    return {"line": (starts + np.arange(LENGTH)).astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class LinesData:
    """A dataset, and the configuration of it."""

    mixture_or_task_name: str = "lines"
    batch_size: int = 8
    pack: bool = False
    split: str = "train"
    task_feature_lengths: Any = dataclasses.field(default_factory=lambda: {"text": LENGTH})

    @property
    def config(self):
        return self

    def vocabulary_size(self):
        return 32

    def train_iterator(self, process_index=0, process_count=1):
        return Lines()

    def eval_batches(self, num_batches=None, process_index=0, process_count=1):
        return {"lines": lambda: iter([lines(1000)])}


@open_dataset.register
def open_lines(config: LinesData, features):
    return config


def run(model_dir, model, steps, restore=None):
    return Train(
        model=model,
        model_dir=model_dir,
        train_dataset_cfg=LinesData(),
        train_eval_dataset_cfg=LinesData(),
        trainer=Trainer(
            optimizer=Adafactor(min_dim_size_to_factor=8),
            learning_rate_fn=create_learning_rate_scheduler(base_learning_rate=0.3, warmup_steps=1),
            num_microbatches=2,
        ),
        total_steps=steps,
        partitioner=Partitioner(devices=(jax.devices()[0],)),
        checkpoint_cfg=CheckpointConfig(restore=restore, save=SaveCheckpointConfig(period=steps)),
    ).run()


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder / "dense", run(folder / "dense", DENSE, 20)


def test_leaves_have_roles_and_twins():
    specs = SPARSE.param_specs()
    kernel = specs["tower/encoderblock_1/mlp/expert/wi_0/kernel"]
    assert (kernel.role, kernel.twin) == (Role.EXPERT, "tower/encoderblock_1/mlp/wi_0/kernel")
    assert specs["tower/encoderblock_1/mlp/router/router_weights/w/kernel"].role == Role.ROUTER
    assert specs["tower/encoderblock_0/mlp/wi_0/kernel"].role == Role.DENSE


def test_it_trains_and_its_loss_falls(dense_run):
    folder, result = dense_run
    history = [
        json.loads(line)["cross_ent_loss"]
        for line in (folder / "training_eval" / "lines" / "metrics.jsonl").read_text().splitlines()
    ]
    assert result.step == 20 and history[-1] < history[0] - 0.1
    assert open_checkpoint(folder).model_settings() == {"sharpness": 1.0}


def test_it_is_upcycled_without_a_model_file_and_proved_again(dense_run, tmp_path):
    folder, _ = dense_run
    output = tmp_path / "checkpoint_20"
    settings = {"output_checkpoint_path": str(output), "moe": ToyMoe(num_experts=4)}
    said: list[str] = []
    done = Upcycle(initial_checkpoint_path=str(folder), **settings).run(report=said.append)
    assert done.ok and done.proof.ok
    dense, sparse = open_checkpoint(folder), open_checkpoint(output)
    kernel = sparse.read("target/tower/encoderblock_1/mlp/expert/wo/kernel")
    np.testing.assert_array_equal(
        kernel, [dense.read("target/tower/encoderblock_1/mlp/wo/kernel")] * 4
    )
    assert Verify(output_checkpoint_path=str(output)).run(report=said.append).ok


def test_it_is_upcycled_while_restoring_and_trains_on(dense_run, tmp_path):
    folder, before = dense_run
    restore = RestoreCheckpointConfig(path=str(folder), recipe=Recipe())
    result = run(tmp_path / "sparse", SPARSE, 24, restore)
    assert (result.start, result.step) == ("upcycle", 24)
    names = result.evaluation["lines"]
    assert names["cross_ent_loss"] < before.evaluation["lines"]["cross_ent_loss"] + 0.2
    assert names["experts/tower/encoderblock_1/load"].shape == (4,)
    assert names["experts/tower/encoderblock_1/similarity"] > 0.9


GIN = """
import tests.toy_family.model as toy
MODEL = @toy.ToyModel()
toy.ToyModel.config = @toy.ToyConfig()
toy.ToyConfig.moe = @toy.ToyMoe()
toy.ToyMoe.num_experts = 4
toy.ToyMoe.group_size = 32
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {'text': 8}
"""


def test_a_gin_file_names_it_and_it_is_counted(tmp_path, capsys):
    (tmp_path / "toy.gin").write_text(GIN)
    assert model_info.main([f"--gin_file={tmp_path / 'toy.gin'}"]) == 0
    said = capsys.readouterr().out
    # 8 x 16 and 16 x 8 weights in an expert, of which a token meets two of four.
    assert "Parameters of experts: 1536, of routers: 32" in said
    assert "tower/encoderblock_1/mlp/expert/wi_0/kernel" in said and "FLOPs per token: " in said


def test_its_conversion_is_planned():
    work = Workload(
        model=SPARSE,
        trainer=Trainer(optimizer=Adafactor(), learning_rate_fn=create_learning_rate_scheduler()),
        partitioner=Partitioner(),
        batch_size=8,
        task_feature_lengths={"text": LENGTH},
    )
    hardware = estimate.Hardware.parse("h100:4")
    plan = estimate.make_plan("toy", work, hardware, extra_steps=10, dense_steps=20)
    upcycled, dense = (plan.costs[kind] for kind in (estimate.Kind.UPCYCLED, estimate.Kind.DENSE))
    assert upcycled.flops > dense.flops > 0
    assert "toy on 4 x" in render(plan, Format.TEXT)
