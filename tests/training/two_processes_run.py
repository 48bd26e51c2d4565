"""One process of a run: `python two_processes_run.py PORT COUNT INDEX DEVICES MODEL_DIR STEPS`. Not
a test module.
"""

import importlib.util
import os
import pathlib
import sys

PORT, COUNT, INDEX, DEVICES, MODEL_DIR, STEPS = sys.argv[1:]
os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={DEVICES}"  # the last holds
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

if int(COUNT) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", int(COUNT), int(INDEX))

from upcycle_jax.partitioning import Partitioner  # noqa: E402
from upcycle_jax.training.config import CheckpointConfig, SaveCheckpointConfig  # noqa: E402
from upcycle_jax.training.optimizers import Adafactor  # noqa: E402
from upcycle_jax.training.schedules import create_learning_rate_scheduler  # noqa: E402
from upcycle_jax.training.train import Train  # noqa: E402
from upcycle_jax.training.trainer import Trainer  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "fakes", pathlib.Path(__file__).with_name("conftest.py")
)
fakes = importlib.util.module_from_spec(spec)
sys.modules["fakes"] = fakes
spec.loader.exec_module(fakes)


def part(batch, index, count):
    rows = len(next(iter(batch.values()))) // count
    return {name: feature[index * rows : (index + 1) * rows] for name, feature in batch.items()}


class PartIterator(fakes.ArithmeticIterator):
    def __init__(self, cfg, index, count):
        super().__init__(cfg)
        self.index, self.count = index, count

    def __next__(self):
        return part(super().__next__(), self.index, self.count)


class Parts(fakes.ArithmeticDataset):
    def train_iterator(self, process_index=0, process_count=1):
        return PartIterator(self, process_index, process_count)

    def eval_batches(self, num_batches=None, process_index=0, process_count=1):
        whole = super().eval_batches(num_batches)
        return {
            task: lambda make=make: (part(batch, process_index, process_count) for batch in make())
            for task, make in whole.items()
        }


Train(
    model=fakes.BagModel(num_experts=4),
    model_dir=MODEL_DIR,
    train_dataset_cfg=Parts(),
    train_eval_dataset_cfg=Parts(),
    checkpoint_cfg=CheckpointConfig(save=SaveCheckpointConfig(period=2)),
    partitioner=Partitioner(num_expert_partitions=2),
    trainer=Trainer(
        optimizer=Adafactor(min_dim_size_to_factor=8),
        learning_rate_fn=create_learning_rate_scheduler(warmup_steps=4),
    ),
    total_steps=int(STEPS),
    eval_period=2,
    stats_period=1,
).run()
