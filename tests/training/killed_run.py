"""A run that is the same in every process; in one of its own it can be killed: `python
killed_run.py MODEL_DIR STEPS SECONDS_PER_BATCH`. Not a test module.
"""

import importlib.util
import pathlib
import sys
import time

import jax

from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.config import CheckpointConfig, SaveCheckpointConfig
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train import Train
from upcycle_jax.training.trainer import Trainer


def main(model_dir: str | pathlib.Path, steps: int, seconds: float = 0.0) -> None:
    spec = importlib.util.spec_from_file_location(
        "fakes", pathlib.Path(__file__).with_name("conftest.py")
    )
    fakes = importlib.util.module_from_spec(spec)
    sys.modules["fakes"] = fakes
    spec.loader.exec_module(fakes)

    class Slow(fakes.ArithmeticDataset):
        def batch(self, k):
            time.sleep(seconds)
            return super().batch(k)

    Train(
        model=fakes.BagModel(),
        model_dir=model_dir,
        train_dataset_cfg=Slow(),
        checkpoint_cfg=CheckpointConfig(save=SaveCheckpointConfig(period=3)),
        partitioner=Partitioner(devices=(jax.devices()[0],)),
        trainer=Trainer(
            optimizer=Adafactor(min_dim_size_to_factor=8),
            learning_rate_fn=create_learning_rate_scheduler(base_learning_rate=1.0, warmup_steps=4),
        ),
        total_steps=steps,
        stats_period=1,
    ).run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
