"""SeqIO's converter for decoder-only models, of the features that `DecoderOnlyFeatures` describes.
Imports TensorFlow.
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from upcycle_jax.features.names import DECODER_ONLY, DOCUMENTS, INPUTS, TARGETS

_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
_TOKENS, _DOCUMENTS, _WEIGHTS = "tokens", "documents", "weights"
"""What a row is made of. Each is above 0 where there is a token, so that SeqIO's packing and
padding, which take 0 for padding, keep ids of 0.
"""
_PACKED = f"{_TOKENS}_positions"
"""What SeqIO's packing adds: the position in the example that a token comes from."""


class DecoderOnlyConverter(seqio.FeatureConverter):
    """Makes the batches of `DecoderOnlyFeatures` inside tf.data.

    Args:
      pack: several examples a row; those that say which documents they hold are rows already.
      bos_id: see `DecoderOnlyFeatures`.
      mask_documents: likewise.
    """

    TASK_FEATURES: Mapping[str, Any] = {TARGETS: _SPEC}
    MODEL_FEATURES = dict.fromkeys(DECODER_ONLY, _SPEC)
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}  # all five are there without packing too

    def __init__(self, *, pack: bool, bos_id: int, mask_documents: bool):
        super().__init__(pack=pack, bos_id=bos_id)
        self._mask_documents = mask_documents

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """See `seqio.FeatureConverter`. Lengths of 'inputs' ask for them."""
        names = (INPUTS, TARGETS) if INPUTS in task_feature_lengths else (TARGETS,)
        self.TASK_FEATURES = dict.fromkeys(names, _SPEC)
        return super().__call__(ds, task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """See `seqio.FeatureConverter`."""
        return dict.fromkeys(DECODER_ONLY, sum(task_feature_lengths.values()))

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = dict.fromkeys((_TOKENS, _DOCUMENTS, _WEIGHTS), sum(task_feature_lengths.values()))
        joined = ds.map(self._joined, num_parallel_calls=tf.data.AUTOTUNE)
        if DOCUMENTS in ds.element_spec:
            # Rows of documents are full. Packing would hold as many of them as a row has tokens.
            rows = seqio.utils.trim_and_pad_dataset(joined, lengths)
        else:
            rows = self._pack_or_pad(joined, lengths)
        return rows.map(self._row, num_parallel_calls=tf.data.AUTOTUNE)

    def _joined(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Inputs and targets of an example as one sequence; ids and weights are 1 too large."""
        targets = example[TARGETS]
        inputs = example[INPUTS] if INPUTS in self.TASK_FEATURES else targets[:0]
        documents = tf.ones_like(targets)
        if DOCUMENTS in example:
            documents = tf.cast(example[DOCUMENTS], tf.int32)[: tf.size(targets)]
        # Inputs belong to the targets' first document.
        first = tf.concat([documents[:1], [1]], axis=0)[0]
        return {
            _TOKENS: tf.concat([inputs, targets], axis=0) + 1,
            _DOCUMENTS: tf.concat([tf.fill([tf.size(inputs)], first), documents], axis=0),
            _WEIGHTS: tf.concat([tf.ones_like(inputs), 2 * tf.ones_like(targets)], axis=0),
        }

    def _row(self, row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The five features of a row, int32 `[T]` each; as `DecoderOnlyFeatures` makes them."""
        real = row[_DOCUMENTS] > 0
        index = tf.range(tf.size(real))
        starts = (index == 0) & real
        if self._mask_documents:
            documents = row[_DOCUMENTS]
            starts |= real & (documents != tf.concat([[0], documents[:-1]], axis=0))
            if _PACKED in row:
                starts |= real & (row[_PACKED] == 0)
        segments = tf.cumsum(tf.cast(starts, tf.int32))
        firsts = tf.concat([[0], tf.boolean_mask(index, starts)], axis=0)  # of segments 0, 1, ...
        tokens = row[_TOKENS] - 1
        before = tf.concat([[self.bos_id], tokens[:-1]], axis=0)
        values = (
            tf.where(starts, self.bos_id, before),
            tokens,
            row[_WEIGHTS] - 1,
            segments,
            index - tf.gather(firsts, segments),
        )
        return {
            name: tf.where(real, value, 0) for name, value in zip(DECODER_ONLY, values, strict=True)
        }
