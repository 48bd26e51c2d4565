"""The examples of tasks one by one, with their text, and the tasks' own metrics: what prediction
and inference evaluation need.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow_datasets as tfds

from upcycle_jax.data import prompts, resolve
from upcycle_jax.data.cache import lookup
from upcycle_jax.data.cache.batches import CachedDataset
from upcycle_jax.data.cache.format import CachedTask
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.token_bytes import token_bytes
from upcycle_jax.features import FeatureConverter, HostBatch, check_all_read, token_features

Example = dict[str, Any]
"""One example as SeqIO gives it: tokens of the task's features, and whatever else the task keeps
(`inputs_pretokenized`, `idx`, ...).
"""

_OUTPUTS = {
    seqio.metrics.ModelOutputType.PREDICTION: "prediction",
    seqio.metrics.ModelOutputType.SCORE: "score",
}
PRETOKENIZED = "_pretokenized"
SHOTS = "num_shots"
"""The feature with the number of solved examples in front of an input."""
_TARGETS = "targets"
"""The feature that SeqIO's metrics compare predictions with."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task's metrics say of a model's outputs.

    Attributes:
      metrics: numbers by name, as the task's metric functions name them.
      targets: post-processed target of each example, or None where no metric has used them.
      predictions: post-processed prediction of each example, likewise.
    """

    metrics: Mapping[str, float]
    targets: Sequence[Any] | None
    predictions: Sequence[Any] | None


class TaskExamples:
    """One task's split, read from its beginning and in the task's order.

    Args:
      task: the SeqIO task.
      config: split, lengths and seed. `shuffle` and `pack` are not looked at.
      features: the model's converter.
      few_shot: solved examples that stand before each input, or None.
      cached: the dataset and its task from which the examples are read, instead of through the
        task.
    """

    def __init__(
        self,
        task: seqio.Task,
        config: DatasetConfig,
        features: FeatureConverter,
        few_shot: prompts.FewShot | None = None,
        *,
        cached: tuple[CachedDataset, CachedTask] | None = None,
    ):
        self._task, self._config, self._features = task, config, features
        self._names = token_features(features, config.task_feature_lengths)
        self._cached = cached
        self._shots = prompts.Shots(few_shot, task, config) if few_shot is not None else None

    @property
    def name(self) -> str:
        """The task's name."""
        return self._task.name

    @property
    def _target_feature(self) -> seqio.Feature:
        return prompts.feature_of(self._task, _TARGETS, needed_by="predictions")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a prediction; the first is the one that ends a target."""
        return prompts.end_ids(self._target_feature.vocabulary)

    @property
    def target_length(self) -> int:
        """Tokens that a target may have."""
        return self._config.task_feature_lengths[_TARGETS]

    def target_texts(self) -> list[bytes] | None:
        """The text of each id of targets, see `token_bytes`."""
        return token_bytes(self._target_feature.vocabulary)

    def examples(
        self, limit: int | None = None, *, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Example]:
        """The first `limit` examples of the split (None: all), of which every `num_shards`-th from
        number `shard` on.
        """
        chosen = itertools.islice(self._read(), shard, limit, num_shards)
        yield from chosen if self._shots is None else map(self._with_shots, chosen)

    def _read(self) -> Iterator[Example]:
        if self._cached is not None:
            dataset, task = self._cached
            return dataset.whole_examples(task)
        read = self._task.get_dataset(
            sequence_length=dict(self._config.task_feature_lengths),
            split=self._config.split,
            use_cached=self._config.use_cached,
            shuffle=False,
            seed=self._config.seed or 0,
            num_epochs=1,
            try_in_mem_cache=False,
        )
        return iter(tfds.as_numpy(read))

    def _with_shots(self, example: Mapping[str, Any]) -> Example:
        assert self._shots is not None
        name = prompts.INPUTS
        feature, given = self._task.output_features[name], np.asarray(example[name])
        ends = (
            bool(len(given))
            and feature.vocabulary.eos_id is not None
            and int(given[-1]) == feature.vocabulary.eos_id
        )
        ids, text, count = self._shots.before(
            prompts.text_of(self._task, example, name),
            ends=ends or (feature.add_eos and not len(given)),
        )
        return {**example, name: ids, f"{name}{PRETOKENIZED}": text.encode(), SHOTS: count}

    def options(
        self, example: Mapping[str, Any], given: prompts.Options | None = None
    ) -> tuple[str, ...]:
        """The answers to choose from; see `prompts.options`."""
        return prompts.options(self._task, example, given)

    def has_options(self, example: Mapping[str, Any], given: prompts.Options | None = None) -> bool:
        """Whether the answers that the example allows are known."""
        return prompts.find_options(self._task, example, given) is not None

    def answered(self, example: Mapping[str, Any], text: str) -> Example:
        """The example with this text as its target.

        Raises:
          ValueError: it is longer than targets may be.
        """
        feature, length = self._target_feature, self.target_length
        ids = prompts.tokens(feature, text, ends=feature.add_eos)
        if len(ids) > length:
            raise ValueError(
                f"the answer {text!r} of the task '{self.name}' has {len(ids)} tokens: raise"
                f" TASK_FEATURE_LENGTHS['{_TARGETS}'] ({length})"
            )
        return {**example, _TARGETS: ids}

    def padded_targets(self, example: Mapping[str, Any]) -> np.ndarray:
        """Int32 ids of an example's targets, filled with padding to the length of targets."""
        ids = np.asarray(example[_TARGETS], np.int32)
        missing = self.target_length - len(ids)
        return np.pad(ids, (0, missing), constant_values=self._target_feature.vocabulary.pad_id)

    def batch(self, examples: Sequence[Mapping[str, Any]], rows: int) -> HostBatch:
        """Model features of at most `rows` examples; the rows that are left are zeros."""
        return self._features.pad(examples, self._config.task_feature_lengths, rows)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of predicted token ids, up to EOS."""
        vocabulary = self._target_feature.vocabulary
        ids = prompts.without_padding(vocabulary, np.asarray(tokens))
        return vocabulary.decode([int(token) for token in ids])

    def record(self, example: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
        """An example as JSON: its texts as they were before tokenizing, or decoded where the task
        keeps none.

        Args:
          example: one of `examples`.
          whole: every feature, tokens included.
        """
        if whole:
            return {key: as_json(value) for key, value in example.items()}
        texts = {
            key: as_json(value) for key, value in example.items() if key.endswith(PRETOKENIZED)
        }
        if texts:
            return texts
        features = self._task.output_features
        present = [key for key in self._names if key in example]
        return {
            key: features[key].vocabulary.decode([int(token) for token in example[key]])
            for key in present
        }

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the task's metrics need of a model: 'prediction', 'score', both, or nothing where
        the task has no metrics.

        Raises:
          ValueError: a metric needs something else.
        """
        kinds = sorted({int(metric.model_output_type) for metric in self._task.metric_objs})
        unknown = [
            seqio.metrics.ModelOutputType.to_str(kind) for kind in kinds if kind not in _OUTPUTS
        ]
        if unknown:
            raise ValueError(
                f"a metric of the task '{self.name}' needs {unknown[0]}: only metrics of"
                " predictions and of scores are computed"
            )
        return tuple(_OUTPUTS[kind] for kind in kinds)

    def evaluate(
        self, examples: Sequence[Mapping[str, Any]], outputs: Mapping[str, Sequence[Any]]
    ) -> TaskResult:
        """The task's metrics, computed as SeqIO's Evaluator does.

        Args:
          examples: all examples.
          outputs: for each of `self.outputs`, one entry per example: predicted token ids, or the
            score of the target.

        Raises:
          ValueError: two metrics of the task have one name.
        """
        values: dict[str, float] = {}
        found: dict[str, Sequence[Any]] = {}
        for metric in self._task.metric_objs:
            output = np.array(outputs[_OUTPUTS[metric.model_output_type]])
            instance = metric.from_model_output(
                examples, output, self._task.output_features, _TARGETS
            )
            if isinstance(instance, seqio.metrics.CollectingMetric):
                computed, inferences = instance.actual_compute(
                    examples, self._task.output_features, _TARGETS
                )
            else:
                computed, inferences = (
                    instance.compute(),
                    getattr(instance, "targets_and_inferences", {}),
                )
            found |= inferences or {}
            for name, value in computed.items():
                if name in values:
                    raise ValueError(
                        f"two metrics of the task '{self.name}' are named {name!r}: rename one"
                    )
                value = value.value if isinstance(value, seqio.metrics.Scalar) else value
                if np.ndim(value) == 0 and not isinstance(value, seqio.metrics.MetricValue):
                    values[name] = float(value)
        return TaskResult(
            metrics=values, targets=found.get(_TARGETS), predictions=found.get("prediction")
        )


def task_examples(
    config: DatasetConfig, features: FeatureConverter, few_shot: prompts.FewShot | None = None
) -> tuple[TaskExamples, ...]:
    """The tasks of the mixture that have the split, by name.

    Args:
      config: what to read.
      features: the model's converter.
      few_shot: solved examples before each input, or None.

    Raises:
      ValueError: the name or the split is unknown, or the data are unusable.
    """
    mixture = lookup.find(config, features)
    if mixture is None:
        tasks = resolve.tasks_with_split(config)
        for task in tasks:
            lengths = config.task_feature_lengths
            check_all_read(features, lengths, task.output_features, what=f"the task '{task.name}'")
        return tuple(TaskExamples(task, config, features, few_shot) for task in tasks)
    dataset = CachedDataset(config, features, mixture)
    cached = {task.manifest.task: task for task, _ in mixture.tasks_with(config.split)}
    config = dataclasses.replace(config, use_cached=False)
    return tuple(
        TaskExamples(task, config, features, few_shot, cached=(dataset, cached[task.name]))
        for task in resolve.tasks(config)
        if task.name in cached
    )


def as_json(value: Any) -> Any:
    """A feature, target or prediction as JSON knows it; bytes as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
