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

from upcycle_jax.data import prompts, resolve, seqio_source
from upcycle_jax.data.cache.format import CachedTask
from upcycle_jax.data.dataset import DatasetConfig, HostBatch

Example = dict[str, Any]
"""One example as SeqIO gives it: tokens of 'inputs' and 'targets', and whatever else the task keeps
(`inputs_pretokenized`, `idx`, ...).
"""

_OUTPUTS = {
    seqio.metrics.ModelOutputType.PREDICTION: "prediction",
    seqio.metrics.ModelOutputType.SCORE: "score",
}
PRETOKENIZED = "_pretokenized"
SHOTS = "num_shots"
"""Feature that says how many solved examples stand before an input."""


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
      few_shot: solved examples that stand before each input, or None.
      cached: where the examples are read, instead of through the task.
    """

    def __init__(
        self,
        task: seqio.Task,
        config: DatasetConfig,
        few_shot: prompts.FewShot | None = None,
        *,
        cached: CachedTask | None = None,
    ):
        self._task, self._config, self._cached = task, config, cached
        self._shots = prompts.Shots(few_shot, task, config) if few_shot is not None else None

    @property
    def name(self) -> str:
        """The task's name."""
        return self._task.name

    @property
    def eos_id(self) -> int:
        """The id that ends a target."""
        eos_id = self._task.output_features["targets"].vocabulary.eos_id
        return 1 if eos_id is None else int(eos_id)

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
            from upcycle_jax.data.cache import batches

            return batches.whole_examples(self._config, self._cached)
        dataset = self._task.get_dataset(
            sequence_length=dict(self._config.task_feature_lengths),
            split=self._config.split,
            use_cached=self._config.use_cached,
            shuffle=False,
            seed=self._config.seed or 0,
            num_epochs=1,
            try_in_mem_cache=False,
        )
        return iter(tfds.as_numpy(dataset))

    def _with_shots(self, example: Mapping[str, Any]) -> Example:
        assert self._shots is not None
        feature = self._task.output_features["inputs"]
        given = np.asarray(example["inputs"])
        ends = (
            bool(len(given))
            and feature.vocabulary.eos_id is not None
            and int(given[-1]) == feature.vocabulary.eos_id
        )
        ids, text, count = self._shots.before(
            prompts.text_of(self._task, example, "inputs"),
            ends=ends or (feature.add_eos and not len(given)),
        )
        return {**example, "inputs": ids, f"inputs{PRETOKENIZED}": text.encode(), SHOTS: count}

    def options(
        self, example: Mapping[str, Any], given: prompts.Options | None = None
    ) -> tuple[str, ...]:
        """The answers to choose from; see `prompts.options`."""
        return prompts.options(self._task, example, given)

    def has_options(self, example: Mapping[str, Any], given: prompts.Options | None = None) -> bool:
        """Whether anything says which answers the example allows."""
        return prompts.find_options(self._task, example, given) is not None

    def answered(self, example: Mapping[str, Any], text: str) -> Example:
        """The example with this text as its target.

        Raises:
          ValueError: it is longer than targets may be.
        """
        feature, length = (
            self._task.output_features["targets"],
            self._config.task_feature_lengths["targets"],
        )
        ids = prompts.tokens(feature, text, ends=feature.add_eos)
        if len(ids) > length:
            raise ValueError(
                f"the answer {text!r} of the task '{self.name}' has {len(ids)} tokens: raise"
                f" TASK_FEATURE_LENGTHS['targets'] ({length})"
            )
        return {**example, "targets": ids}

    def batch(self, examples: Sequence[Mapping[str, Any]], rows: int) -> HostBatch:
        """Model features of at most `rows` examples, as SeqIO's EncDecFeatureConverter makes them;
        the rows that are left are zeros.
        """
        lengths = self._config.task_feature_lengths
        inputs, targets = (
            _padded([example.get(key, ()) for example in examples], rows, lengths[key])
            for key in ("inputs", "targets")
        )
        return {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.int32),
        }

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of predicted token ids, up to EOS."""
        ids = [int(token) for token in np.trim_zeros(np.asarray(tokens), "b")]
        return self._task.output_features["targets"].vocabulary.decode(ids)

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
        present = [key for key in ("inputs", "targets") if key in example]
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
                examples, output, self._task.output_features, "targets"
            )
            if isinstance(instance, seqio.metrics.CollectingMetric):
                computed, inferences = instance.actual_compute(
                    examples, self._task.output_features, "targets"
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
            metrics=values, targets=found.get("targets"), predictions=found.get("prediction")
        )


def task_examples(
    config: DatasetConfig, few_shot: prompts.FewShot | None = None
) -> tuple[TaskExamples, ...]:
    """The tasks of the mixture that have the split, by name.

    Args:
      config: what to read.
      few_shot: solved examples before each input, or None.

    Raises:
      ValueError: the name or the split is unknown, or the data are unusable.
    """
    seqio_source._keep_off_accelerators()
    cache = config.cache()
    if cache is not None:
        config = dataclasses.replace(config, use_cached=False)
        cached = {task.manifest.task: task for task, _ in cache.tasks_with(config.split)}
        having = (task for task in resolve.tasks(config) if task.name in cached)
        return tuple(
            TaskExamples(task, config, few_shot, cached=cached[task.name]) for task in having
        )
    tasks = seqio_source._check_split(config, resolve.tasks(config))
    return tuple(TaskExamples(task, config, few_shot) for task in tasks)


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


def _padded(sequences: Sequence[Any], rows: int, length: int) -> np.ndarray:
    """Int32 `[rows, length]`; longer sequences are cut."""
    out = np.zeros((rows, length), np.int32)
    for row, sequence in zip(out, sequences, strict=False):
        tokens = np.asarray(sequence, np.int32)[:length]
        row[: len(tokens)] = tokens
    return out
