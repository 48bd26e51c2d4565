"""What an evaluation and a job of predictions are both told."""

import dataclasses
import os
from collections.abc import Mapping

from upcycle_jax import checks
from upcycle_jax.data.prompts import Options
from upcycle_jax.features import check_lengths
from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.models.base import Model
from upcycle_jax.models.generation import DecodingAlgorithm
from upcycle_jax.partitioning import Partitioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """Settings that `evaluate` and `infer` share.

    Attributes:
      model: the model.
      dataset_cfg: `DatasetConfig` of what to read; its batch size is that of inference.
      checkpoint_path: a checkpoint, or a MODEL_DIR.
      output_dir: made if need be.
      partitioner: the mesh.
      decoder: how predictions are searched.
      rank_options: the answers that examples allow, for all tasks or by task name; None leaves them
        to the tasks (`data.prompts`).
      few_shot: `FewShot`, solved examples before each input, or None.
      verify: compare the parameters with the checksums that were saved with them.
      files: small text files to leave beside the results (name -> content), e.g. 'config.gin'.

    Raises:
      ValueError: a feature that the model needs has no length.
    """

    model: Model
    dataset_cfg: checks.Dataset
    checkpoint_path: checks.PathText | os.PathLike
    output_dir: checks.PathText | os.PathLike
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    decoder: DecodingAlgorithm = dataclasses.field(default_factory=Greedy)
    rank_options: Options | None = None
    few_shot: checks.Examples | None = None
    verify: bool = True
    files: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_lengths(self.model.features, self.dataset_cfg.task_feature_lengths)
