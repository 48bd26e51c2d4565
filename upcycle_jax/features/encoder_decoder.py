"""Batches of encoder-decoder models: 'inputs' are encoded, 'targets' decoded with teacher forcing.

Axis legend: B rows, I input tokens of a row, T target tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from upcycle_jax.features import sequences
from upcycle_jax.features.base import Example, HostBatch, Lengths, check_lengths
from upcycle_jax.features.names import INPUTS, TARGETS

if TYPE_CHECKING:
    import jax
    import seqio


@dataclasses.dataclass(frozen=True)
class EncoderDecoderFeatures:
    """See `base.FeatureConverter`. The features are those of `seqio.EncDecFeatureConverter`:

    encoder_input_tokens `[B, I]`, decoder_input_tokens, decoder_target_tokens and
    decoder_loss_weights `[B, T]`, and of packed rows encoder_segment_ids, encoder_positions
    `[B, I]`, decoder_segment_ids and decoder_positions `[B, T]`; all int32.
    """

    task_features: ClassVar[tuple[str, ...]] = (INPUTS, TARGETS)
    optional_features: ClassVar[tuple[str, ...]] = ()
    annotations: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[str] = "decoder_target_tokens"
    unit: ClassVar[str] = "tokens"

    @property
    def usual_lengths(self) -> Lengths:
        """See `base.FeatureConverter`."""
        return {INPUTS: 512, TARGETS: 128}

    def specs(
        self, batch_size: int, lengths: Lengths, *, packed: bool = False
    ) -> dict[str, "jax.ShapeDtypeStruct"]:
        """See `base.FeatureConverter`."""
        import jax

        check_lengths(self, lengths)
        inputs, targets = lengths[INPUTS], lengths[TARGETS]
        features = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": targets,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": targets,
        }
        if packed:
            features |= {
                "encoder_segment_ids": inputs,
                "encoder_positions": inputs,
                "decoder_segment_ids": targets,
                "decoder_positions": targets,
            }
        return {
            name: jax.ShapeDtypeStruct((batch_size, length), np.dtype(np.int32))
            for name, length in features.items()
        }

    def pad(self, examples: Sequence[Example], lengths: Lengths, rows: int) -> HostBatch:
        """See `base.FeatureConverter`."""
        inputs, targets = (
            sequences.padded([example.get(name, ()) for example in examples], rows, lengths[name])
            for name in self.task_features
        )
        return _features(inputs, targets)

    def pack(self, rows: Sequence[Sequence[Example]], lengths: Lengths) -> HostBatch:
        """See `base.FeatureConverter`. Segment ids count from 1, positions from 0 in each
        example.
        """
        batch: HostBatch = {}
        for name, tokens_name, stack in (
            (INPUTS, "encoder_input_tokens", "encoder"),
            (TARGETS, "decoder_target_tokens", "decoder"),
        ):
            tokens, segments, positions = sequences.packed(
                [[example[name] for example in row] for row in rows], lengths[name]
            )
            batch |= {
                tokens_name: tokens,
                f"{stack}_segment_ids": segments,
                f"{stack}_positions": positions,
            }
        targets = batch["decoder_target_tokens"]
        batch["decoder_input_tokens"] = sequences.shifted(targets, batch["decoder_positions"])
        batch["decoder_loss_weights"] = sequences.loss_weights(targets)
        return batch

    def row_capacity(self, lengths: Lengths) -> tuple[int, ...]:
        """See `base.FeatureConverter`: a row has one sequence of inputs and one of targets."""
        return tuple(lengths[name] for name in self.task_features)

    def row_usage(self, sizes: np.ndarray) -> np.ndarray:
        """See `base.FeatureConverter`."""
        return sizes

    def random(
        self, vocab_size: int | None, *, batch_size: int = 2, length: int = 32, seed: int = 0
    ) -> HostBatch:
        """See `base.FeatureConverter`: the last quarter of every row but the first is padding."""
        if vocab_size is None:
            raise ValueError("random tokens need the model's vocab_size")
        rng = np.random.default_rng(seed)
        inputs, targets = (
            rng.integers(1, vocab_size, (batch_size, length), np.int32) for _ in range(2)
        )
        for tokens in (inputs, targets):
            tokens[1:, length - length // 4 :] = 0
        return _features(inputs, targets)

    def real_targets(self, batch: Mapping[str, Any]) -> Any:
        """See `base.FeatureConverter`: 0 is padding."""
        return batch[self.targets] > 0

    def describe(self, batch: Mapping[str, Any]) -> str:
        """See `base.FeatureConverter`."""
        return ", ".join(
            f"{rows} x {length} {name}"
            for name, (rows, length) in (
                (INPUTS, np.shape(batch["encoder_input_tokens"])),
                (TARGETS, np.shape(batch["decoder_target_tokens"])),
            )
        )

    def seqio_converter(self, *, pack: bool) -> "seqio.FeatureConverter":
        """See `base.FeatureConverter`."""
        import seqio

        return seqio.EncDecFeatureConverter(pack=pack)


def _features(inputs: np.ndarray, targets: np.ndarray) -> HostBatch:
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": sequences.shifted(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": sequences.loss_weights(targets),
    }
