"""What a training run is told."""

import dataclasses
import os
from collections.abc import Mapping

from etils import epath

from upcycle_jax import checks
from upcycle_jax.features import check_lengths
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.config import CheckpointConfig
from upcycle_jax.training.tracking import Wandb
from upcycle_jax.training.trainer import Trainer

DEFAULT_STATS_PERIOD = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run.

    Attributes:
      model: what is trained, with its loss.
      model_dir: where everything goes; see the README for its content.
      train_dataset_cfg: `DatasetConfig` of the training data.
      trainer: optimizer, schedule, microbatches.
      total_steps: the step to stop at, counted from step 0 of the first run: a run that continues a
        checkpoint of step s trains total_steps - s steps.
      train_eval_dataset_cfg: data for teacher-forced evaluation, or None. Every task of a mixture
        is evaluated by itself.
      checkpoint_cfg: what to restore and when to save.
      partitioner: the mesh.
      eval_steps: batches per task and evaluation; None for the whole split.
      eval_period: steps between evaluations; None for none but at the start (before the first
        update) and at the end.
      stats_period: steps between reports of training metrics; None is 100, or eval_period where
        that is less.
      random_seed: of parameters and dropout.
      first_batch: the batch that the update from step 0 reads; step k reads batch first_batch + k.
        With s here, a model trained from scratch sees what the continuation of a checkpoint of step
        s sees.
      tracker: where metrics go beside MODEL_DIR, or None.
      files: small text files to leave in MODEL_DIR (name -> content), e.g. 'config.gin'.

    Raises:
      ValueError: a feature that the model needs has no length.
    """

    model: Model
    model_dir: checks.PathText | os.PathLike[str]
    train_dataset_cfg: checks.Dataset
    trainer: Trainer
    total_steps: checks.CountOrZero
    train_eval_dataset_cfg: checks.Dataset | None = None
    checkpoint_cfg: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    eval_steps: checks.Count | None = None
    eval_period: checks.Count | None = None
    stats_period: checks.Count | None = None
    random_seed: checks.Seed = 0
    first_batch: checks.CountOrZero = 0
    tracker: Wandb | None = None
    files: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for cfg in (self.train_dataset_cfg, self.train_eval_dataset_cfg):
            if cfg is not None:
                check_lengths(self.model.features, cfg.task_feature_lengths)

    @property
    def folder(self) -> epath.Path:
        """MODEL_DIR."""
        return epath.Path(self.model_dir)

    @property
    def report_period(self) -> int:
        """Steps between reports of training metrics."""
        if self.stats_period is not None:
            return self.stats_period
        return min(DEFAULT_STATS_PERIOD, self.eval_period or DEFAULT_STATS_PERIOD)
