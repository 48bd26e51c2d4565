"""Batches of decoder-only models: rows of 'targets', each token predicted from those before it in
its segment; with 'inputs', which stand before the targets and are read but not learnt.

Axis legend: B rows, T tokens of a row: as many as targets, and inputs where there are any, may have
together.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from upcycle_jax import checks
from upcycle_jax.features.base import (
    Example,
    HostBatch,
    Lengths,
    check_lengths,
    token_features,
)
from upcycle_jax.features.names import DECODER_ONLY, DOCUMENTS, INPUTS, TARGETS

if TYPE_CHECKING:
    import jax
    import seqio


@dataclasses.dataclass(frozen=True)
class DecoderOnlyFeatures:
    """See `base.FeatureConverter`. A batch has five features, all int32 `[B, T]`, packed or not:

    decoder_target_tokens: what is predicted.
    decoder_input_tokens: the token before each, `bos_id` where a segment begins.
    decoder_loss_weights: 1 for targets, 0 for inputs and padding.
    decoder_segment_ids: counted from 1 in each row; 0 is padding, and nothing else says what is
      padding, since 0 is an ordinary token of many vocabularies. Attention stays within a segment.
    decoder_positions: counted from 0 in each segment; 0 for padding.

    The features are those of `seqio.LMFeatureConverter`, and of `seqio.PrefixLMFeatureConverter`
    where `TASK_FEATURE_LENGTHS` names 'inputs' too, but for the padding.

    Attributes:
      bos_id: what is read before the first token of a segment: the tokenizer's BOS, or EOS where it
        has none.
      mask_documents: whether each document is a segment. False: a row is one segment, in which
        documents see those before them.
    """

    bos_id: checks.CountOrZero = 0
    mask_documents: bool = True

    task_features: ClassVar[tuple[str, ...]] = (TARGETS,)
    optional_features: ClassVar[tuple[str, ...]] = (INPUTS,)
    targets: ClassVar[str] = "decoder_target_tokens"
    unit: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        checks.check_fields(self)

    @property
    def annotations(self) -> tuple[str, ...]:
        """See `base.FeatureConverter`."""
        return (DOCUMENTS,) if self.mask_documents else ()

    @property
    def usual_lengths(self) -> Lengths:
        """See `base.FeatureConverter`."""
        return {TARGETS: 512}

    def specs(
        self, batch_size: int, lengths: Lengths, *, packed: bool = False
    ) -> dict[str, "jax.ShapeDtypeStruct"]:
        """See `base.FeatureConverter`."""
        import jax

        check_lengths(self, lengths)
        spec = jax.ShapeDtypeStruct((batch_size, self._length(lengths)), np.dtype(np.int32))
        return dict.fromkeys(DECODER_ONLY, spec)

    def pad(self, examples: Sequence[Example], lengths: Lengths, rows: int) -> HostBatch:
        """See `base.FeatureConverter`."""
        missing: list[list[Example]] = [[]] * (rows - len(examples))
        return self.pack([[example] for example in examples] + missing, lengths)

    def pack(self, rows: Sequence[Sequence[Example]], lengths: Lengths) -> HostBatch:
        """See `base.FeatureConverter`: rows have room for all of their examples."""
        names, shape = token_features(self, lengths), (len(rows), self._length(lengths))
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        real, starts = np.zeros(shape, bool), np.zeros(shape, bool)
        for row, examples in enumerate(rows):
            first = 0
            for example in examples:
                parts = [np.asarray(example.get(name, ()))[: lengths[name]] for name in names]
                count, targets = sum(map(len, parts)), len(parts[names.index(TARGETS)])
                here = slice(first, first + count)
                tokens[row, here] = np.concatenate(parts)
                weights[row, here.stop - targets : here.stop] = 1
                real[row, here] = True
                starts[row, here] = _document_starts(example, count, targets)
                first = here.stop
        if not self.mask_documents:
            starts[:, 1:] = False
        return self._features(tokens, weights, real, starts)

    def _features(
        self, tokens: np.ndarray, weights: np.ndarray, real: np.ndarray, starts: np.ndarray
    ) -> HostBatch:
        """The five features of rows, of which `real` says what is no padding, and `starts` where
        segments begin, all `[B, T]`.
        """
        index = np.arange(tokens.shape[1])
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        inputs = np.where(starts, self.bos_id, before)
        features = (inputs, tokens, weights, np.cumsum(starts, axis=1), positions)
        return {
            name: np.where(real, values, 0).astype(np.int32)
            for name, values in zip(DECODER_ONLY, features, strict=True)
        }

    def row_capacity(self, lengths: Lengths) -> tuple[int, ...]:
        """See `base.FeatureConverter`: a row is one sequence."""
        return (self._length(lengths),)

    def row_usage(self, sizes: np.ndarray) -> np.ndarray:
        """See `base.FeatureConverter`."""
        return sizes.sum(axis=1, keepdims=True)

    def random(
        self, vocab_size: int | None, *, batch_size: int = 2, length: int = 32, seed: int = 0
    ) -> HostBatch:
        """See `base.FeatureConverter`: the last quarter of every row but the first is padding."""
        if vocab_size is None:
            raise ValueError("random tokens need the model's vocab_size")
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, vocab_size, (batch_size, length), np.int32)
        kept = np.full(batch_size, length - length // 4)
        kept[:1] = length
        examples = [{TARGETS: row[:count]} for row, count in zip(tokens, kept, strict=True)]
        return self.pad(examples, {TARGETS: length}, batch_size)

    def real_targets(self, batch: Mapping[str, Any]) -> Any:
        """See `base.FeatureConverter`."""
        return batch["decoder_segment_ids"] > 0

    def describe(self, batch: Mapping[str, Any]) -> str:
        """See `base.FeatureConverter`."""
        rows, length = np.shape(batch[self.targets])
        return f"{rows} x {length} tokens"

    def seqio_converter(self, *, pack: bool) -> "seqio.FeatureConverter":
        """See `base.FeatureConverter`."""
        from upcycle_jax.features import decoder_only_seqio

        return decoder_only_seqio.DecoderOnlyConverter(
            pack=pack, bos_id=self.bos_id, mask_documents=self.mask_documents
        )

    def _length(self, lengths: Lengths) -> int:
        return sum(lengths[name] for name in token_features(self, lengths))


def _document_starts(example: Example, tokens: int, targets: int) -> np.ndarray:
    """Where documents of an example begin, bool `[tokens]`, of which the last ones are targets.
    Inputs belong to the targets' first document.
    """
    starts = np.zeros(tokens, bool)
    documents = np.asarray(example.get(DOCUMENTS, ()))[:targets]
    if len(documents):
        starts[tokens - targets + 1 :] = documents[1:] != documents[:-1]
    starts[:1] = True
    return starts
